"""What a run leaves behind: records, provenance, lineage, comparison, registry."""
