"""Figures and numbers that show what the method does."""
