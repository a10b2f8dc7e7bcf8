"""Pairwise preference by a vision-language model."""
