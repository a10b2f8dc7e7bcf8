"""Many pipeline runs: ablations, sweeps, reproductions, each in working trees of its own."""
