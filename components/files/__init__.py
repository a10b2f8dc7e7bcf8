"""Files that are there whole or not at all, weights with an identity, what code means."""
