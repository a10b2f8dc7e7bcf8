"""Numbers of pictures, measured once and kept by content."""
