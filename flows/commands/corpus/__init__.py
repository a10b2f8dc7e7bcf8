"""Commands about photographs: what is in the corpus, and what was measured."""
