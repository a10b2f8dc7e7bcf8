"""Latents and text embeddings on disk, as records of one size that are read by position."""
