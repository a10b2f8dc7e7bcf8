"""Training objectives: flow matching, Haar wavelets, SNR-aware Huber, VAE reconstruction."""
