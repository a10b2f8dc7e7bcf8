"""Post-training of the autoencoder's decoder; the encoder stays as it is."""
