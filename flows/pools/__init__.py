"""What a Prefect server is told and shows: pools, deployments, automations, artifacts."""
