"""Identity of a training run, what another one differs in, and going on from a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import CheckpointUnreadable
from components.training.distributed.checkpoints import CheckpointStore
from components.training.distributed.run_states import (
    CHECKPOINTS,
    METRICS_FILE,
    RunIdentity,
    RunState,
    StateRefused,
    begin_state,
    continue_from,
    described,
    fragments,
    lost_states,
    mark_finished,
    read_state,
    read_states,
    remove_state,
    resume_state,
    unneeded,
)


def identity(**changes: Any) -> RunIdentity:
    values: dict[str, Any] = {
        "stage": "dit_stage1",
        "settings": {"dit_stage1.steps": 24, "dit_stage1.learning_rate": 1e-4},
        "weights": {},
        "data": {"data/latents": "aa"},
        "code": "cc",
    }
    values["settings"] = values["settings"] | changes.pop("settings", {})
    return RunIdentity(**(values | changes))


def worked(runs: Path, one: RunIdentity, step: int, seconds: float = 2.0) -> RunState:
    """A state with a checkpoint at `step`, kept aside from what trains."""
    folder = runs / one.key[:16]
    begin_state(folder, one, 1)
    CheckpointStore(folder / CHECKPOINTS, 2).save(
        step, lambda path: (path / "weights").write_bytes(b"w" * 100)
    )
    log = MetricLog(folder / METRICS_FILE)
    for number in range(1, step + 3):
        log.log({"loss": 1.0 / number, "step_s": seconds}, number)
    state = read_state(folder)
    assert state is not None
    return state


@given(
    st.dictionaries(
        st.sampled_from(["dit_stage1.steps", "dit_stage1.schedule", "objective.gamma"]),
        st.integers(1, 3),
    ),
    st.dictionaries(st.sampled_from(["data/latents", "data/slices"]), st.sampled_from("ab")),
)
def test_identities_are_equal_exactly_when_nothing_differs(settings, data) -> None:
    here, there = identity(), identity(settings=settings, data=data)
    assert (here.key == there.key) == (here.changes_to(there) == {})
    assert {name: (b, a) for name, (a, b) in here.changes_to(there).items()} == there.changes_to(
        here
    )


def test_the_order_and_the_writing_of_settings_do_not_matter() -> None:
    turned = RunIdentity(
        stage="dit_stage1",
        settings={"dit_stage1.learning_rate": 1e-4, "dit_stage1.steps": 24.0},
        weights={},
        data={"data/latents": "aa"},
        code="cc",
    )
    assert turned.key == identity().key
    assert turned.changes_to(identity()) == {}


def test_changes_are_named_one_by_one() -> None:
    there = identity(
        settings={"dit_stage1.steps": 30},
        data={"data/latents": "bb"},
        code="dd",
        weights={"w": "1"},
    )
    found = identity().changes_to(there)
    assert found == {
        "dit_stage1.steps": (24, 30),
        "w": (None, "1"),
        "data/latents": ("aa", "bb"),
        "code": ("cc", "dd"),
    }
    assert described(found, 1) == "dit_stage1.steps 24 -> 30 and 3 more"
    assert described({"data/latents": ("aa", "bb")}) == "data/latents"


def test_a_state_tells_its_step_time_and_past(tmp_path: Path) -> None:
    state = worked(tmp_path, identity(), 6)
    assert (state.name, state.step, state.steps) == (f"dit_stage1/{identity().key[:16]}", 6, 24)
    # Steps after the checkpoint will be made again and are not at stake.
    assert state.seconds() == pytest.approx(12.0)
    assert not state.finished
    # Looking at a state is no work on it.
    for path in (*state.folder.rglob("*"), state.folder):
        os.utime(path, (1e9, 1e9))
    state.seconds()
    assert state.modified() == 1e9
    mark_finished(state.folder)
    assert read_states(tmp_path)[0].finished
    (tmp_path / "no-state").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "state.json").write_text("{")
    assert len(read_states(tmp_path)) == 1


def test_going_on_links_the_checkpoint_and_writes_the_past_down(tmp_path: Path) -> None:
    old = worked(tmp_path, identity(), 6)
    new = identity(settings={"dit_stage1.learning_rate": 5e-5})
    state = continue_from(old, tmp_path / new.key[:16], new, 2)
    assert state.step == 6
    assert old.checkpoint is not None
    assert state.checkpoint is not None
    weights = [one[1] / "weights" for one in (old.checkpoint, state.checkpoint)]
    assert os.path.samefile(*weights)
    rows = list(MetricLog(state.folder / METRICS_FILE).rows())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    again = read_state(state.folder)
    assert again is not None
    first, second = again.segments
    assert (first.from_step, first.changes) == (0, {})
    assert second.from_step == 6
    assert second.changes == {"dit_stage1.learning_rate": (1e-4, 5e-5), "processes": (1, 2)}
    before = read_state(old.folder)
    assert before is not None
    assert before.continued_by == new.key
    # The files that both names stand for are freed with the last of them.
    assert before.size_bytes() < 100 + sum(
        path.stat().st_size for path in old.folder.rglob("*.json*")
    )


def test_a_call_that_was_killed_is_made_again(tmp_path: Path) -> None:
    old = worked(tmp_path, identity(), 6)
    new = identity(settings={"dit_stage1.steps": 30})
    folder = tmp_path / new.key[:16]
    aside = tmp_path / f".continuing-{folder.name}"
    (aside / CHECKPOINTS / "step-00000099").mkdir(parents=True)
    assert read_state(folder) is None
    state = continue_from(old, folder, new, 1)
    assert state.step == 6
    assert not aside.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"dit_stage1.precision": "fp32"}}, "does not fit dit_stage1.precision"),
        ({"weights": {"models.transformer.pretrained": "f"}}, "models.transformer.pretrained"),
        ({"settings": {"dit_stage1.steps": 5}}, "is at step 6, beyond dit_stage1.steps"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(tmp_path: Path, changes, said: str) -> None:
    old = worked(tmp_path, identity(), 6)
    new = identity(**changes)
    with pytest.raises(StateRefused, match=said):
        continue_from(old, tmp_path / new.key[:16], new, 1)
    assert not (tmp_path / new.key[:16]).exists()


def second_stage(start: str, **data: str) -> RunIdentity:
    return RunIdentity(
        stage="dit_stage2",
        settings={"dit_stage2.initial_weights": start},
        weights={},
        data={"data/latents": "l", "data/dit_stage1/raw": "r", "data/dit_stage1/ema": "e"}
        | {f"data/dit_stage1/{name}": value for name, value in data.items()},
        code="cc",
    )


def test_the_weights_that_a_stage_before_made_are_its_start_and_the_others_are_not() -> None:
    old = second_stage("stage1_ema")
    assert old.unloadable(second_stage("stage1_ema", ema="new")) == ["data/dit_stage1/ema"]
    assert old.unloadable(second_stage("stage1_ema", raw="new")) == []
    assert old.unloadable(second_stage("stage1_raw")) == ["dit_stage2.initial_weights"]
    pretrained = second_stage("pretrained")
    assert pretrained.unloadable(second_stage("pretrained", raw="new", ema="new")) == []


def test_random_weights_are_another_start_with_another_seed() -> None:
    def seeded(seed: int, **weights: str) -> RunIdentity:
        return identity(settings={"project.seed": seed}, weights=weights)

    assert seeded(0).unloadable(seeded(1)) == ["project.seed"]
    given = {"models.transformer.pretrained": "f"}
    assert seeded(0, **given).unloadable(seeded(1, **given)) == []


def test_going_on_takes_the_checkpoint_before_a_damaged_one(tmp_path: Path, capsys) -> None:
    old = worked(tmp_path, identity(), 6)
    store = CheckpointStore(old.folder / CHECKPOINTS, 2)
    newest = store.save(9, lambda path: (path / "weights").write_bytes(b"w" * 100))
    (newest / "weights").write_bytes(b"v" * 100)
    old = read_states(tmp_path)[0]
    assert old.step == 9
    new = identity(settings={"dit_stage1.learning_rate": 5e-5})
    state = continue_from(old, tmp_path / new.key[:16], new, 1)
    assert (state.step, state.segments[-1].from_step) == (6, 6)
    assert "going on from step 6" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "", None])
def test_a_state_whose_name_is_lost_is_told_from_none(tmp_path: Path, damage) -> None:
    state = worked(tmp_path / "dit_stage1", identity(), 6)
    (state.folder / "state.json").unlink()
    if damage is not None:
        (state.folder / "state.json").write_text(damage)
    assert read_states(tmp_path / "dit_stage1") == []
    (lost,) = lost_states(tmp_path / "dit_stage1")
    assert (lost.name, lost.step, lost.seconds()) == (state.name, 6, pytest.approx(12.0))
    assert lost_states(tmp_path / "none") == []


def cut(state: RunState) -> Path:
    """Damage the only checkpoint of a state."""
    assert state.checkpoint is not None
    file = state.checkpoint[1] / "weights"
    file.write_bytes(b"half")
    return file


def test_a_state_whose_checkpoints_are_damaged_is_not_empty_and_not_gone_on_from(
    tmp_path: Path,
) -> None:
    stage = tmp_path / "dit_stage1"
    file = cut(worked(stage, identity(), 6))
    (state,) = read_states(stage)
    assert (state.step, state.checkpoint, state.damaged) == (6, None, (6, file))
    assert state.seconds() == pytest.approx(12.0)
    assert list(unneeded([state], None)) == []
    new = identity(settings={"dit_stage1.learning_rate": 5e-5})
    with pytest.raises(CheckpointUnreadable, match=r"weights: damaged.* no checkpoint before"):
        continue_from(state, stage / new.key[:16], new, 1)
    # Without its name it is lost, and no part that a kill has left.
    (state.folder / "state.json").unlink()
    assert [one.step for one in lost_states(stage)] == [6]
    assert fragments(stage) == []


def test_a_state_without_a_step_to_go_on_from_is_pruned(tmp_path: Path) -> None:
    """Diverged after its only checkpoint, or never beyond the one that a run can go back to."""
    diverged, begun = worked(tmp_path, identity(), 6), worked(tmp_path, identity(code="y"), 0)
    assert CheckpointStore(diverged.folder / CHECKPOINTS, 2).reject(lambda *_: True) == [6]
    reasons = {state.name: why for state, why in unneeded(read_states(tmp_path), None)}
    assert reasons == dict.fromkeys((diverged.name, begun.name), "has no checkpoint")
    (diverged.folder / "state.json").unlink()
    assert fragments(tmp_path) == [diverged.folder]


def test_a_damaged_finished_state_is_not_the_one_that_is_kept_to_go_on_from(tmp_path: Path) -> None:
    for name, age in (("whole", 50), ("damaged", 20)):
        state = worked(tmp_path, identity(code=name), 6)
        mark_finished(state.folder)
        if name == "damaged":
            cut(state)
        for path in (*state.folder.rglob("*"), state.folder):
            os.utime(path, (1e9 - age, 1e9 - age))
    states = read_states(tmp_path)
    assert [state.identity.code for state in states] == ["damaged", "whole"]
    assert list(unneeded(states, None)) == []


def test_as_many_steps_as_are_done_may_be_asked_for(tmp_path: Path) -> None:
    old = worked(tmp_path, identity(), 6)
    new = identity(settings={"dit_stage1.steps": 6})
    assert continue_from(old, tmp_path / new.key[:16], new, 1).step == 6


def test_another_number_of_processes_is_a_segment_and_no_other_state(tmp_path: Path) -> None:
    state = worked(tmp_path, identity(), 6)
    assert resume_state(state, 1) is state
    more = resume_state(state, 4)
    assert more.folder == state.folder
    assert str(more.segments[-1]) == "from step 6: processes 1 -> 4"
    # Refused, or taken back before a step was saved.
    assert resume_state(more, 1).segments == state.segments
    assert resume_state(resume_state(state, 3), 2).segments[1].changes == {"processes": (1, 2)}
    new = identity(settings={"dit_stage1.learning_rate": 5e-5})
    gone_on = continue_from(state, tmp_path / new.key[:16], new, 2)
    changes = resume_state(gone_on, 1).segments[-1].changes
    assert changes == {"dit_stage1.learning_rate": (1e-4, 5e-5)}
    empty = begin_state(tmp_path / "empty", identity(code="x"), 1)
    assert len(resume_state(empty, 4).segments) == 1


@pytest.mark.parametrize("left", [".continuing-", ".removing-"])
def test_what_a_kill_left_of_a_state_is_a_fragment_and_no_state(tmp_path: Path, left: str) -> None:
    state = worked(tmp_path, identity(), 6)
    shutil.copytree(state.folder, tmp_path / f"{left}{state.folder.name}")
    (tmp_path / "unnamed" / "checkpoints").mkdir(parents=True)
    lost = worked(tmp_path, identity(code="lost"), 6).folder
    (lost / "state.json").unlink()
    assert [one.name for one in read_states(tmp_path)] == [state.name]
    # A checkpoint whose state.json was lost is work that somebody may want.
    names = [path.name for path in fragments(tmp_path)]
    assert names == [f"{left}{state.folder.name}", "unnamed"]
    assert fragments(tmp_path / "none") == []


def test_only_what_nothing_needs_is_named_for_removal(tmp_path: Path) -> None:
    made = {
        name: worked(tmp_path, identity(code=name), 6)
        for name in ("continued", "unfinished", "older", "newer", "current")
    }
    new = identity(code="next")
    continue_from(made["continued"], tmp_path / new.key[:16], new, 1)
    begin_state(tmp_path / identity(code="empty").key[:16], identity(code="empty"), 1)
    for age, name in ((50, "older"), (20, "newer"), (10, "current")):
        mark_finished(made[name].folder)
        for path in made[name].folder.rglob("*"):
            os.utime(path, (1e9 - age, 1e9 - age))
        os.utime(made[name].folder, (1e9 - age, 1e9 - age))
    states = read_states(tmp_path)
    found = unneeded(states, made["current"].identity.key)
    reasons = {state.identity.code: reason for state, reason in found}
    assert reasons.keys() == {"continued", "older", "newer", "empty"}
    assert reasons["continued"] == f"continued as {new.key[:16]}"
    # The current one is the newest finished one, so the others are not needed to go on from.
    remove_state(made["older"])
    assert not made["older"].folder.exists()
    assert not list(tmp_path.glob(".removing-*"))
    assert json.loads((made["newer"].folder / "state.json").read_text())["finished"]
