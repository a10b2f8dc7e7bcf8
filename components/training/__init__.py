"""Training: buckets, stores, batch plan, curriculum, trainers and checkpoints."""
