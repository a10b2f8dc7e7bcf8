"""From records to MLflow: uploads, datasets, the model registry."""
