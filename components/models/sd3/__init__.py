"""SD3 as the second backbone: transformer, text encoders, pipeline and settings."""
