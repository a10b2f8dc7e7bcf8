"""What past runs tell: lineage, comparisons, forecasts, registered systems."""
