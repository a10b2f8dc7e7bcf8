"""Self-contained pages about a run and about an evaluation."""
