"""What each metric means, what it needs, and how it is opened: one module a family."""
