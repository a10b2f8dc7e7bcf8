"""Metrics that need no weights, computed on native pixels."""
