"""Evidence of people, and what is not safe for work."""
