"""What a run says of itself, on disk, before any server is told."""
