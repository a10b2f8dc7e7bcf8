"""Published tables filled from what was measured here."""
