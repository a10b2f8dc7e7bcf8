"""Evaluation: what is measured on images and models, how certainly, and how it is shown."""
