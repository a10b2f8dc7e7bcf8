"""Imports cost seconds in every worker and command: what is heavy comes in where it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("components.training.dit.trainer", ("diffusers", "bitsandbytes", "peft", "deepspeed")),
        ("components.training.dit.worker", ("diffusers", "bitsandbytes", "peft", "deepspeed")),
        ("components.models.backbones", ("torch", "diffusers", "transformers")),
        ("components.objectives.objective", ("torch",)),
        ("components.settings.schema", ("torch", "pandas")),
        ("flows.cli", ("torch", "pandas", "diffusers", "mlflow", "prefect", "dvc")),
    ],
)
def test_importing_a_module_leaves_out_what_it_does_not_need_yet(
    module: str, heavy: tuple[str, ...]
) -> None:
    code = (
        f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stderr.split() == []
