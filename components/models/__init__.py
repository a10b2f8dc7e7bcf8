"""Model parts: positional encoding, transformer, F16 autoencoder, text encoders, pipeline."""
