"""A conversation with a model behind an API: requests, their cache, their cost."""
