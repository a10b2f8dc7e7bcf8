"""Every value of params.yaml: typed, bounded, documented."""
