"""Where encoders run."""

from __future__ import annotations

import pytest
import yaml

from components.settings.schema import Settings, parse_settings
from components.training.encoding.encoder_workers import encoder_limits


def settings(root, workers: int) -> Settings:
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["runtime"].update(workers=workers, engine="local", device="cpu")
    return parse_settings(values)


@pytest.mark.parametrize(
    ("workers", "pretrained", "in_stage"),
    [(1, None, True), (1, "weights/x", True), (2, None, True), (2, "weights/x", False)],
)
def test_workers_start_only_where_they_save_time(root, workers, pretrained, in_stage):
    limits = encoder_limits(settings(root, workers), pretrained)
    assert (limits is None) == in_stage
    if limits is not None:
        assert limits.workers == workers
