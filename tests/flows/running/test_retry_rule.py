"""Which failures of a stage are refused (exit code 2) and which may be tried again (1)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.running.recorded_stage import PARENT_RECORD

SCRIPT = """
import json, sys, types
from pathlib import Path

from components.files.weight_folders import ComponentsMissing, WeightsMissing
from components.images.decoding import ImageUndecodable
from components.settings.bad_input import BadInput
from components.settings.schema import SettingsError
from flows.running.recorded_stage import run_stage
from flows.running.gpu_lock import GpusMissing
from flows.stages.contract import StageFailed

problems = [
    WeightsMissing("VAE", "weights/vae", "hf download ..."),
    ComponentsMissing([WeightsMissing("VAE", "weights/vae", "hf download ...")]),
    *(kind("one line") for kind in (
        BadInput, ImageUndecodable, GpusMissing, StageFailed, SettingsError,
        ValueError, KeyError, IndexError, PermissionError,
        RuntimeError, ConnectionError, OSError, MemoryError,
    )),
]
codes = {}
for problem in problems:
    for kind in (type(problem), type(f"Our{type(problem).__name__}", (type(problem),), {})):
        raised = kind.__new__(kind, *problem.args)
        raised.__dict__.update(problem.__dict__)
        raised.args = problem.args

        def run(context, raised=raised):
            raise raised

        module = types.ModuleType("flows.stages.ingest")
        module.run = run
        sys.modules["flows.stages.ingest"] = module
        codes[kind.__name__] = run_stage("ingest", Path.cwd())
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def exit_codes(
    trivial_clone: Callable[[Path, int], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, int]:
    """By name of the class that the stage raised; `Our...` are subclasses of them."""
    clone = trivial_clone(tmp_path_factory.mktemp("retries"), 1)
    # With a parent the stage leaves its record to the pipeline's uploader.
    env = os.environ | {"PYTHONPATH": str(clone), PARENT_RECORD: "pipeline-x"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=clone, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    codes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return codes


@pytest.mark.parametrize("prefix", ["", "Our"])
@pytest.mark.parametrize(
    "name",
    [
        "BadInput",
        "WeightsMissing",
        "ComponentsMissing",
        "ImageUndecodable",
        "GpusMissing",
        "StageFailed",
        "SettingsError",
        "ValueError",
        "KeyError",
        "IndexError",
        "PermissionError",
    ],
)
def test_what_a_retry_cannot_cure_is_refused_and_so_is_a_subclass_of_it(
    exit_codes: dict[str, int], name: str, prefix: str
) -> None:
    assert exit_codes[prefix + name] == 2


@pytest.mark.parametrize("name", ["RuntimeError", "ConnectionError", "OSError", "MemoryError"])
def test_anything_else_may_be_tried_again(exit_codes: dict[str, int], name: str) -> None:
    assert exit_codes[name] == exit_codes[f"Our{name}"] == 1
