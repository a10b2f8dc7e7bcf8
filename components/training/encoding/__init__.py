"""Photographs to latents and captions to embeddings, once, before anything is trained."""
