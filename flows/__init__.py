"""Orchestration of UltraFlux: thin layers of Prefect, DVC, MLflow and Great Expectations."""
