"""Corpus: sources, decoding, signals, quality, people, selection, captions and slices."""
