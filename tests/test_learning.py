"""Learning is real: the embedded profile as committed, values as logged to MLflow."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_embedded_profile_learns(clone: Callable[..., Path]) -> None:
    """VAE PSNR on held-out crops +3 dB; every training photograph comes back from its caption."""
    from mlflow import MlflowClient

    from flows.tracking.uploader import tracking_uri

    project = clone("learning", {})
    done = subprocess.run(["ultraflux", "run"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    client = MlflowClient(tracking_uri(project))
    experiment = client.get_experiment_by_name("ultraflux")
    assert experiment is not None
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    psnr = client.get_metric_history(runs["vae"].info.run_id, "psnr_db")
    assert psnr[-1].value - psnr[0].value >= 3.0
    stage1 = runs["dit_stage1"].data.metrics
    assert stage1["training_images_loss_drop"] >= 0.5
    found = runs["evaluate"].data.metrics
    # Learned by heart: said in the record, and no claim about captions that it never saw.
    assert found["validation_loss_drop"] < 0
    assert found["twins"] == found["twins_recognised"] == 8
    assert found["twin_psnr_db_worst"] >= 18.0
    model = client.get_model_version_by_alias("ultraflux-transformer", "candidate")
    assert model.tags["weights.path"].startswith("data/dit_stage2")
