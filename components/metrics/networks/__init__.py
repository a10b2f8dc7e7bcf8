"""Metrics that need a network: its preprocessing, its weights, its number."""
