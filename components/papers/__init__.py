"""Papers of a corpus and a model: what others read before they use them."""
