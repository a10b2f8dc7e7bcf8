"""Benchmark suites, and the systems that are measured on them."""
