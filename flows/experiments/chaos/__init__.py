"""Faults on purpose: a pipeline of one's own is disturbed at random and must come out the same."""
