"""One run of the whole graph: checks before it, its record, and its Prefect flows."""
