"""UltraFlux MLOps library: corpus, models, objectives, training and evaluation (no orchestrator)."""
