"""The table of edits in docs/training_states.md, each tried on an unfinished run."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from components.settings.schema import load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoints import CheckpointStore
from components.training.distributed.run_states import (
    CHECKPOINTS,
    METRICS_FILE,
    RunState,
    StateRefused,
)
from flows.cli import app
from flows.running.training_state import Wish, identity_of, open_state
from flows.stages.contract import state_folder
from flows.versioning.graph import stage_identity
from flows.versioning.parameters import flatten
from flows.versioning.setting_overrides import merged, parse_assignments, read_params

ROOT = Path(__file__).parents[3]
STAGE, STEP = "dit_stage1", 12
TABLE = (ROOT / "docs" / "training_states.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\S+)` \| (goes on|asks|asks, does not load) \|$", re.MULTILINE)
ROWS = ROW.findall(TABLE)
INPUTS = ("data/code/dit_stage1.json", "data/slices/stage1.parquet")
INPUTS += ("data/latents/index.parquet", "data/text_embeddings/index.parquet")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings and the graph of the project, over inputs of a few bytes."""
    project = tmp_path_factory.mktemp("edited") / "project"
    for name in INPUTS:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(f"{name}\n")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, project / name)
    (project / ".gitignore").write_text("data\nruns\n")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=project, check=True)
    return project


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(copy)
    return copy


@functools.cache
def inputs_of(project: Path) -> dict[str, str]:
    """Hashes of the inputs, which DVC takes a while to give."""
    return stage_identity(project, STAGE)[1]


def opened(project: Path, edit: str, **inputs: str) -> RunState:
    """What the stage does first: find its state under settings of which one is edited."""
    settings = parse_settings(
        merged(read_params(project), parse_assignments([edit] if edit else []))
    )
    identity = identity_of(project, STAGE, settings, inputs_of(project) | inputs)
    return open_state(project, identity, Wish.of(settings), 1)


def begin(project: Path) -> RunState:
    """An unfinished run of 12 steps that took an hour each."""
    state = opened(project, "")
    CheckpointStore(state.folder / CHECKPOINTS, 2).save(
        STEP, lambda folder: (folder / "weights").write_text("learned")
    )
    log = MetricLog(state.folder / METRICS_FILE)
    for step in range(1, STEP + 1):
        log.log({"step_s": 3600.0}, step)
    return opened(project, "")


def key(edit: str) -> str:
    """By the command."""
    done = CliRunner().invoke(app, ["stage", "key", STAGE, *(["-S", edit] if edit else [])])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()[0]


def tried(project: Path, edit: str) -> str:
    """What a run does about an edit, in the words of the table."""
    (name, value), *_ = flatten(parse_assignments([edit]))
    try:
        state = opened(project, edit)
    except StateRefused as problem:
        said = str(problem)
        assert f"an unfinished run is at step {STEP} of 900 ({STEP}.00 device hours)" in said
        # The one setting, and where it goes.
        assert re.findall(r"^    (\S+) .* -> (.*)$", said, re.MULTILINE) == [(name, str(value))]
        return "asks" if "--continue-from dit_stage1/" in said else "asks, does not load"
    assert state.step == STEP
    return "goes on"


def test_every_edit_of_the_table_does_what_the_table_says(project: Path) -> None:
    state = begin(project)
    assert len(ROWS) >= 20
    assert {what for _, what in ROWS} == {"goes on", "asks", "asks, does not load"}
    assert [(edit, tried(project, edit)) for edit, _ in ROWS] == ROWS
    # The command knows them apart as well.
    assert state.folder == state_folder(project, STAGE, key("dit_stage1.watch_every=7"))
    assert state.folder != state_folder(project, STAGE, key("dit_stage1.steps=200"))


def test_other_data_and_other_code_ask_by_name(project: Path) -> None:
    begin(project)
    for name, shown in (("data/latents", "data/latents"), (INPUTS[0], "code")):
        assert name in inputs_of(project)
        with pytest.raises(StateRefused, match=rf"conditions:\n    {shown}\n  go on"):
            opened(project, "", **{name: "another"})


def test_a_state_whose_checkpoint_is_damaged_is_listed_so_and_not_pruned(project: Path) -> None:
    state = begin(project)
    assert state.checkpoint is not None
    (state.checkpoint[1] / "weights").write_text("")
    # Nor where it is not the state of the settings now.
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("gamma: ", "gamma: 1"))
    words = ["stage", "states", STAGE, "--prune", "--json"]
    (row,) = json.loads(CliRunner().invoke(app, words).stdout)
    assert row["differs"] != "current"
    assert (row["status"], row["step"], row["removed"]) == ("damaged", STEP, False)
    assert (state.folder / "state.json").is_file()


def test_a_default_that_is_written_out_is_no_edit(project: Path) -> None:
    """Every setting of the stage that params.yaml leaves out, written with its default."""
    begin(project)
    before = key("")
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    whole = load_settings(path).model_dump(mode="json")
    assert whole[STAGE].keys() > written[STAGE].keys()
    assert "divergence" in whole[STAGE].keys() - written[STAGE].keys()
    for section in (STAGE, "objective", "models", "runtime"):
        written[section] = whole[section]
    path.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    assert key("") == before
    assert opened(project, "").step == STEP
    # Also one that is taken away again, and a whole number for a float.
    path.write_text(text, encoding="utf-8")
    assert opened(project, f"{STAGE}.sigma_range=[0, 1]").step == STEP
