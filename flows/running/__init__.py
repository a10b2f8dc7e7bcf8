"""How stages run on this machine: locks, processes, DVC, records, the walk over the graph."""
