"""Commands about the method and its weights."""
