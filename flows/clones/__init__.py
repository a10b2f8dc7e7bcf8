"""Stages and whole runs in other clones and working trees over one DVC cache."""
