"""Classical signals of a photograph, with the semantics of the published tools."""
