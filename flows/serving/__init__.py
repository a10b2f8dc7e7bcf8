"""The served tier: Prefect and MLflow on a PostgreSQL of the project's own."""
