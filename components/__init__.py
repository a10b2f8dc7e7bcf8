"""UltraFlux library: corpus, models, objectives, training, evaluation (no orchestrator)."""
