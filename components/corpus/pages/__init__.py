"""Pages and figures about a corpus: datasheet, differences, drift."""
