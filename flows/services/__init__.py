"""Servers and workers of this machine: Prefect, MLflow, PostgreSQL."""
