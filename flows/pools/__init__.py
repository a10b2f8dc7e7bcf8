"""Prefect deployments, work pools, workers, automations and artifacts."""
