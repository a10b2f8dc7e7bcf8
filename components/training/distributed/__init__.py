"""Processes of a training run: launched, joined, supervised, their checkpoints committed."""
