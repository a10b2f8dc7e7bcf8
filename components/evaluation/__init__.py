"""Evaluation: what is measured on images and models, with which uncertainty, and how it is shown."""
