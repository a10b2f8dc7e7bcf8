"""DVC: the graph, the lock, what is stale, and what the code of a stage means."""
