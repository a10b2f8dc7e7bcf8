"""From pictures to numbers: cards, weights, and the registry of all metrics."""
