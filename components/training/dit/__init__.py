"""Training of the diffusion transformer, from a stage's settings to exported weights."""
