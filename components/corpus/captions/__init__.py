"""Captions: those that came with the images, those that models write, and what both must pass."""
