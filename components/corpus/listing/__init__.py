"""What lies under a source: names, kinds, sizes and times, and the content of each file."""
