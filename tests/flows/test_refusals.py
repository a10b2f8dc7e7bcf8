"""Wrong names are refused before anything heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from components.settings.schema import load_settings
from flows.running.recorded_stage import with_doubts
from flows.stages.contract import StageResult

HEAVY = ("torch", "prefect", "mlflow", "diffusers", "transformers", "great_expectations", "dvc")
TYPED = (
    "run --until nosuch",
    "run --engine nosuch",
    "stage run nosuch",
    "stage key nosuch",
    "stage key dit_stage1 -S nosuch.x=1",
    "stage states nosuch",
    "stage fingerprint nosuch",
    "config compose --profile nosuch",
    "plan --profile nosuch",
    "plan --stage nosuch",
    "plan --settings nosuch.yaml",
    "new nosuch",
    "measure nosuch --json",
    "corpus look nosuch",
    "evaluate nosuch --system a=b",
    "report nosuch",
    "judge --a nosuch --b b --prompts p --endpoint http://127.0.0.1:1/v1 --model m",
    "generate --prompt x --size nosuch",
    "generate --prompt x --size 256x256 --rope nosuch",
    "generate --prompt x --size 256x256 --model nosuch",
    "generate --prompt x --size 256x256 --memory nosuch",
    "stores rebuild shard --store nosuch",
    "stores verify nosuch",
    "diagnose wavelet --store nosuch",
    "weights get nosuch",
    "weights list nosuch",
    "weights verify nosuch",
    "weights adapter nosuch --out out",
    "weights export nosuch --out out",
    "weights export data --out out --layout nosuch",
    "ablate nosuch",
    "sweep -S nosuch.x=1,2",
    "sweep -S dit_stage1.steps=nosuch",
    "sweep -S dit_stage1.steps=1,2 --until nosuch",
    "submit -S nosuch.x=1",
    "submit --profile nosuch",
    "promote --alias nosuch",
    "sign nosuch",
    "verify nosuch",
)
# One process imports the command line; each command runs in a copy of it.
PROBE = """
import json, os, sys, time, traceback
from flows.cli import main

for typed in json.loads(sys.stdin.read()):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2)
        began = time.process_time()
        sys.argv, code = ["ultraflux", *typed.split()], None
        try:
            main()
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
        heavy = [name for name in HEAVY if name in sys.modules]
        print("\\n" + json.dumps([typed, code, heavy, time.process_time() - began]), flush=True)
        os._exit(0)
    os.close(writer)
    said, _, found = os.fdopen(reader).read().rstrip().rpartition("\\n")
    os.wait()
    print(json.dumps([*json.loads(found), said]))
"""


def probed(commands: Sequence[str], project: Path) -> dict[str, tuple[int, list[str], float, str]]:
    """Each command's exit status, heavy modules, CPU seconds and words."""
    done = subprocess.run(
        # Safe path: the code of these tests, not the project's copy of it.
        [sys.executable, "-P", "-c", PROBE.replace("HEAVY", repr(HEAVY))],
        input=json.dumps(commands),
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {typed: (code, heavy, seconds, said) for typed, code, heavy, seconds, said in rows}


@pytest.fixture(scope="module")
def refused(root: Path) -> dict[str, tuple[int, list[str], float, str]]:
    return probed(TYPED, root)


@pytest.mark.parametrize("typed", TYPED)
def test_a_wrong_name_is_one_line_and_costs_no_heavy_import(
    refused: dict[str, tuple[int, list[str], float, str]], typed: str
) -> None:
    code, heavy, seconds, said = refused[typed]
    assert (code in {1, 2}, heavy) == (True, []), said
    assert "nosuch" in said
    assert len(said.strip().splitlines()) == 1, said
    # 0.2 to 0.7 s on a quiet core; tests beside it make a core twice as slow.
    assert seconds < 2.0


READ_PARAMS = (
    "compare HEAD workspace --no-mlflow",
    "sweep -S vae.steps=1 --dry-run",
    "ablate ladder --dry-run",
    "stage key vae",
    "stage list",
    "sync",
    "plan",
    "config compose --check",
    "run --until source",
)
NO_PARAMS = {
    "a conflict": b"<<<<<<< HEAD\nproject: {name: a}\n",
    "a byte that is no text": b"project: {name: a}\n# \xff\n",
    "a list": b"- project\n",
    "a section that is none": b"project:\n",
}


@pytest.fixture(scope="module")
def project(clone: Callable[..., Path]) -> Path:
    return clone("broken", {})


@pytest.mark.parametrize(
    "kind",
    [
        "a conflict",
        pytest.param("a byte that is no text", marks=pytest.mark.slow),
        pytest.param("a list", marks=pytest.mark.slow),
        pytest.param("a section that is none", marks=pytest.mark.slow),
    ],
)
def test_settings_that_cannot_be_read_are_one_line_of_every_command(
    project: Path, kind: str
) -> None:
    (project / "params.yaml").write_bytes(NO_PARAMS[kind])
    for command, (code, _, _, said) in probed(READ_PARAMS, project).items():
        assert "Traceback" not in said, f"{command}: {said}"
        # Settings without sections can be compared, and every section that is missing is named.
        if kind != "a section that is none":
            assert re.fullmatch(r"error: .+", said.strip()), f"{command}: {said}"
            assert code in {1, 2}, command


def test_params_that_are_missing_can_be_composed(
    project: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (project / "params.yaml").unlink()
    assert "ultraflux config compose" in typed(project, "stage", "list").stderr
    missing = typed(project, "config", "compose", "--check")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "params.yaml is missing" in missing.stderr
    assert typed(project, "config", "compose").returncode == 0
    assert typed(project, "config", "compose", "--check").returncode == 0
    assert typed(project, "config", "check").returncode == 0


def test_settings_that_cannot_reach_what_they_say_are_valid_with_a_warning(
    project: Path, typed: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("warmup_steps: 20", "warmup_steps: 2000"))
    checked = typed(project, "config", "check")
    assert (checked.returncode, checked.stdout.count("is valid")) == (0, 1)
    line = "warmup_steps 2000 exceeds steps 900: learning_rate ends at 0.00135, not 0.003"
    assert checked.stderr == f"warning: dit_stage1: {line}\n"
    # The stage's own line ends with it, and no other's.
    settings = load_settings(path)
    assert with_doubts(StageResult(summary="60 steps"), "dit_stage1", settings).summary == (
        f"60 steps; warning: {line}"
    )
    assert with_doubts(StageResult(summary="20 steps"), "dit_stage2", settings).summary == (
        "20 steps"
    )
