"""The project made small: six photographs and a few steps, with work left for every stage."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

_SMALL = yaml.safe_load(
    (Path(__file__).resolve().parents[1] / "conf" / "small.yaml").read_text(encoding="utf-8")
)
PHOTOS: tuple[str, ...] = tuple(_SMALL["photos"])
SETTINGS: dict[str, Any] = _SMALL["settings"]
LEARNED: dict[str, float] = {
    "vae_psnr_gain_db": 5.0,
    "validation_loss_drop": 0.5,
    "training_images_loss_drop": 0.9,
    "twins": 8.0,
    "twins_recognised": 8.0,
    "twin_psnr_db_worst": 20.0,
}
"""Measures of a run that passes the gate of the embedded profile."""
LONG_ENOUGH_TO_KILL: dict[str, Any] = SETTINGS | {
    "vae.steps": 12,
    "vae.eval_every": 4,
    "dit_stage1.steps": 12,
    "dit_stage1.validate_every": 4,
    "dit_stage2.steps": 6,
    "generate.num_inference_steps": 4,
}
"""Stages that train last some seconds, and resume from checkpoints on the way."""


def change_settings(project: Path, settings: Mapping[str, Any]) -> None:
    """Set values of a project's params.yaml by their paths, such as `vae.steps`.

    Raises:
        KeyError: no such setting.
    """
    path = project / "params.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        *sections, key = name.split(".")
        section = values
        for one in sections:
            section = section[one]
        if key not in section:
            raise KeyError(name)
        section[key] = value
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def keep_photos(project: Path, photos: Collection[str]) -> None:
    """Remove all other bundled photographs of a project, and their captions."""
    sample = project / "data" / "sample"
    for path in sample.glob("*.jpg"):
        if path.name not in photos:
            path.unlink()
    captions = sample / "captions.jsonl"
    lines = captions.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if json.loads(line)["file"] in photos)
    captions.write_text(kept, encoding="utf-8")
