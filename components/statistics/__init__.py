"""Tests of hypotheses that more than one room needs."""
