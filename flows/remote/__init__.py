"""Stages in clones that share a commit and a DVC remote: messages, data, lock entries, state."""
