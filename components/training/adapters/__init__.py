"""Low-rank adapters as files: their algebra, names and metadata."""
