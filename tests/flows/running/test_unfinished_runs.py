"""What a stage does about an unfinished run of another past, for each way to answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from components.settings.schema import parse_settings
from components.settings.yaml_files import read_yaml
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import CheckpointUnreadable
from components.training.distributed.checkpoints import CheckpointStore
from components.training.distributed.run_states import (
    CHECKPOINTS,
    METRICS_FILE,
    RunIdentity,
    RunState,
    StateRefused,
    mark_finished,
)
from flows.running.training_state import (
    AT_STAKE_S,
    Wish,
    identity_of,
    open_state,
    segment_tags,
    wished_stage,
)

STEP = 12
Open = Callable[..., RunState]


def identity(**settings: object) -> RunIdentity:
    before: dict[str, object] = {"dit_stage1.steps": 24, "dit_stage1.learning_rate": 1e-4}
    return RunIdentity(
        stage="dit_stage1", settings=before | settings, weights={}, data={}, code="cc"
    )


NEW = identity(**{"dit_stage1.learning_rate": 5e-5})


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the state of an identity under a wish, in one process."""

    def open_(one: RunIdentity, on_changed: str = "refuse", **wish: object) -> RunState:
        return open_state(tmp_path, one, Wish(on_changed, **wish), 1)  # type: ignore[arg-type]

    return open_


def unfinished(opened: Open, seconds: float) -> RunState:
    """A run at step 12 of 24 that has worked for `seconds`."""
    state = opened(identity())
    CheckpointStore(state.folder / CHECKPOINTS, 2).save(
        STEP, lambda folder: (folder / "weights").write_text("learned")
    )
    log = MetricLog(state.folder / METRICS_FILE)
    for step in range(1, STEP + 1):
        log.log({"step_s": seconds / STEP}, step)
    return opened(identity())


def test_weights_that_a_run_begins_with_count_by_their_content_and_not_by_their_place(
    root: Path, tmp_path: Path
) -> None:
    shutil.copyfile(root / "dvc.yaml", tmp_path / "dvc.yaml")
    values = read_yaml(root / "params.yaml")
    for name in ("base", "moved", "tuned"):
        (tmp_path / name).mkdir()
        # Larger than what is read at either end.
        (tmp_path / name / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (tmp_path / "moved" / ".cache").write_text("notes of a download")

    def begun(place: str) -> RunIdentity:
        values["models"]["transformer"]["pretrained"] = place
        return identity_of(tmp_path, "dit_stage1", parse_settings(values), {})

    first = begun("base")
    assert list(first.weights) == ["models.transformer.pretrained"]
    assert begun("moved") == first
    for place in (0, 3 * 2**20 - 1):
        with (tmp_path / "tuned" / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\1")
        assert begun("tuned").key != first.key
        with (tmp_path / "tuned" / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    (tmp_path / "tuned" / "model.safetensors").rename(tmp_path / "tuned" / "other.safetensors")
    assert begun("tuned").key != first.key


def test_the_same_past_goes_on_without_a_word(opened, capsys) -> None:
    state = unfinished(opened, 1e6)
    assert (state.step, capsys.readouterr().err) == (STEP, "")


@pytest.mark.parametrize(("seconds", "asks"), [(AT_STAKE_S, False), (AT_STAKE_S + 1, True)])
def test_more_than_ten_minutes_of_work_are_not_begun_again_unasked(
    opened, capsys, seconds, asks
) -> None:
    old = unfinished(opened, seconds)
    if asks:
        with pytest.raises(StateRefused, match=r"step 12 of 24 .*device hours"):
            opened(NEW)
        return
    assert opened(NEW).step == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"begins at step 0; the unfinished {old.name} at step 12 of 24 (600 s of work)" in line
    assert "dit_stage1.learning_rate 0.0001 -> 5e-05" in line


def test_settings_answer_for_unattended_runs(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    new = opened(NEW, "continue")
    assert new.step == STEP
    assert f"goes on from {old.name} at step 12 of 24 under dit_stage1" in capsys.readouterr().err
    tags = segment_tags(new.segments)
    assert list(tags) == ["segments.1", "segments.2"]
    assert "learning_rate" in tags["segments.2"]
    # What was gone on from is no question any more; another past asks about the newer one.
    other = identity(**{"dit_stage1.learning_rate": 1e-6})
    with pytest.raises(StateRefused, match=new.name):
        opened(other)
    assert opened(other, "restart").step == 0
    assert f"the unfinished {new.name} at step 12 of 24 stays" in capsys.readouterr().err
    assert old.folder.is_dir()
    assert new.folder.is_dir()


def test_options_answer_for_one_run(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    assert opened(NEW, restart=True).step == 0
    third = identity(**{"dit_stage1.learning_rate": 2e-5})
    assert opened(third, continue_from=old.name[:-4]).step == STEP
    # The option of one stage says nothing to the others.
    fourth = identity(**{"dit_stage1.learning_rate": 3e-5})
    with pytest.raises(StateRefused, match="an unfinished run is at step 12"):
        opened(fourth, continue_from=f"vae/{old.name.partition('/')[2]}")
    with pytest.raises(StateRefused, match=r"--continue-from dit_stage1/zz: no such state"):
        opened(fourth, continue_from="dit_stage1/zz")
    with pytest.raises(StateRefused, match="several states begin so"):
        opened(fourth, continue_from="dit_stage1/")


def test_an_own_state_goes_on_and_says_that_a_wish_is_not_used(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    new = opened(NEW, restart=True)
    capsys.readouterr()
    opened(NEW, continue_from=new.name[:-4])
    assert capsys.readouterr().err == ""
    opened(NEW, continue_from=old.name)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{new.name}, the state of these very settings" in line
    assert f"--continue-from {old.name} is not used" in line


def test_an_own_state_goes_on_and_says_how_it_would_begin_again(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    assert opened(identity(), restart=True).step == STEP
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{old.name} goes on at step 12: --restart is for a run of other settings" in line
    assert line.endswith(f"delete {old.folder}")
    shutil.rmtree(old.folder)
    assert opened(identity(), restart=True).step == 0
    assert opened(identity(), restart=True).step == 0
    assert capsys.readouterr().err == ""


def test_work_whose_checkpoint_is_damaged_is_asked_about_and_its_own_run_does_not_begin_again(
    opened, capsys
) -> None:
    old = unfinished(opened, 1e6)
    assert old.checkpoint is not None
    (old.checkpoint[1] / "weights").unlink()
    with pytest.raises(StateRefused, match=r"step 12 of 24") as refused:
        opened(NEW)
    assert f"bring the file back: {old.checkpoint[1] / 'weights'}" in str(refused.value)
    with pytest.raises(CheckpointUnreadable, match="no checkpoint before it"):
        opened(NEW, "continue")
    assert opened(identity()).damaged is not None
    capsys.readouterr()
    assert opened(NEW, restart=True).step == 0
    assert "weights is damaged) stays" in capsys.readouterr().err
    # Nor where its state.json is lost as well: the ranks meet the checkpoint, and refuse it.
    (old.folder / "state.json").unlink()
    assert opened(identity()).folder == old.folder
    assert capsys.readouterr().err == ""


def test_a_wish_that_no_stage_could_use_is_refused(opened, tmp_path: Path) -> None:
    old = unfinished(opened, 1e6)
    trains = "{cmd: x, meta: {trains: true}}"
    (tmp_path / "dvc.yaml").write_text(
        f"stages: {{vae: {trains}, dit_stage1: {trains}, ingest: {{cmd: x}}}}"
    )
    everything = ("ingest", "vae", "dit_stage1")
    assert wished_stage(tmp_path, old.name[:-4], everything) == "dit_stage1"
    for name, stages, problem in (
        ("dit_stage/01", everything, "stages that train: vae, dit_stage1"),
        ("ingest/01", everything, "stages that train: vae, dit_stage1"),
        ("dit_stage1", everything, "expected STAGE/KEY"),
        ("dit_stage1/zz", everything, "no such state"),
        (old.name, ("ingest", "vae"), "dit_stage1 is not part of this run"),
    ):
        with pytest.raises(StateRefused, match=problem):
            wished_stage(tmp_path, name, stages)


def test_a_setting_cannot_go_on_from_what_does_not_load(opened) -> None:
    unfinished(opened, 1e6)
    other = identity(**{"dit_stage1.precision": "fp32"})
    for way in ("refuse", "continue"):
        with pytest.raises(StateRefused, match=r"does not fit .*dit_stage1\.precision"):
            opened(other, way)
    assert opened(other, "restart").step == 0


def test_a_finished_run_stands_in_nobodys_way_and_is_offered(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    mark_finished(old.folder)
    assert opened(NEW).step == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"`--continue-from {old.name}` goes on from the finished run of 12 steps" in line
    more = identity(**{"dit_stage1.steps": 48})
    assert opened(more, continue_from=old.name).step == STEP


def test_a_state_that_cannot_be_read_is_asked_about_like_another(opened, capsys) -> None:
    old = unfinished(opened, AT_STAKE_S)
    (old.folder / "state.json").write_bytes(b"\xff\xfe")
    assert opened(NEW).step == 0
    assert "begins at step 0" in (said := capsys.readouterr().err)
    assert "state.json cannot be read; beside it is a checkpoint of step 12 (600 s of work)" in said
    log = MetricLog(old.folder / METRICS_FILE)
    log.log({"step_s": 3600.0}, STEP)
    other = identity(**{"dit_stage1.learning_rate": 1e-6})
    for way in ("refuse", "continue"):
        with pytest.raises(StateRefused, match=r"cannot be read.* step 12 \(1\.\d+ hours"):
            opened(other, way)
    assert opened(other, restart=True).step == 0


def test_an_own_state_json_that_is_damaged_is_made_again_with_a_line(opened, capsys) -> None:
    old = unfinished(opened, 1e6)
    (old.folder / "state.json").write_text("{")
    opened(identity())
    assert "state.json cannot be read; what it said of segments is lost" in capsys.readouterr().err
    assert opened(identity()).step == STEP
