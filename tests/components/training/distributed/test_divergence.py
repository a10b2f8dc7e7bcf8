"""The guard's arithmetic: what counts as diverged, what is remembered, where a run returns to."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from components.settings.training import DivergenceSettings
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.distributed.checkpoints import CheckpointStore
from components.training.distributed.divergence import (
    EVENTS_FILE,
    DivergenceGuard,
    batch_folder,
    read_events,
    write_events,
)


def guard_after(
    losses: list[float], norms: list[float] | None = None, **settings
) -> DivergenceGuard:
    guard = DivergenceGuard(DivergenceSettings(**{"warmup_steps": 10, **settings}))
    for step, (loss, norm) in enumerate(zip(losses, norms or losses, strict=True)):
        guard.accept(step, loss, norm)
    return guard


def test_until_it_forgets_the_statistics_are_mean_and_deviation_of_the_logarithms() -> None:
    draw = random.Random(0)
    losses = [math.exp(draw.gauss(-1.0, 0.5)) for _ in range(60)]
    guard = guard_after(losses, memory_steps=1000, sigmas=3.0)
    logs = [math.log(loss) for loss in losses]
    mean, spread = statistics.fmean(logs), statistics.pstdev(logs)
    limit = math.exp(mean + 3.0 * spread)
    assert guard.judge(0.999 * limit, 0.1) is None
    assert guard.judge(0.1, 0.999 * limit) is None
    said = guard.judge(1.001 * limit, 0.1)
    assert said is not None
    assert said.startswith("loss ")
    assert f"3.0 deviations above its running mean {math.exp(mean):.4g}" in said
    assert str(guard.judge(0.1, 1.001 * limit)).startswith("gradient norm ")


def test_old_steps_are_forgotten() -> None:
    guard = guard_after([100.0] * 50 + [1.0] * 400, memory_steps=20)
    assert guard.judge(100.0, 1.0) is not None
    assert guard_after([100.0] * 50 + [1.0] * 5, memory_steps=20).judge(100.0, 1.0) is None


def test_a_steady_run_is_judged_by_a_tenth_and_not_by_no_deviation() -> None:
    guard = guard_after([1.0] * 50, sigmas=8.0)
    assert guard.judge(math.exp(0.79), 1.0) is None
    assert guard.judge(math.exp(0.81), 1.0) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_once_and_whatever_the_settings(value) -> None:
    guard = DivergenceGuard(DivergenceSettings(sigmas=None))
    assert guard.judge(value, 1.0) == "loss is not finite"
    assert guard.judge(1.0, value) == "gradient norm is not finite"
    assert guard.judge(1e9, 1e9) is None


def test_spikes_are_not_judged_before_there_are_statistics() -> None:
    assert guard_after([1.0] * 9).judge(1e9, 1.0) is None
    assert guard_after([1.0] * 10).judge(1e9, 1.0) is not None


def test_an_elevated_loss_makes_the_next_checkpoints_unhealthy() -> None:
    guard = guard_after([1.0] * 50, sigmas=8.0)
    assert guard.is_healthy(50)
    guard.accept(50, math.exp(0.45), 1.0)
    assert not guard.is_healthy(51)
    assert not guard.is_healthy(60)
    assert guard.is_healthy(61)


def test_a_state_goes_through_json_and_gives_the_same_judgements() -> None:
    draw = random.Random(1)
    losses = [draw.lognormvariate(0, 0.3) for _ in range(40)]
    guard = guard_after(losses)
    guard.rolled_back(39, "loss is not finite", 30)
    copy = DivergenceGuard(guard.settings)
    copy.restore(json.loads(json.dumps(guard.state())))
    assert copy.state() == guard.state()
    assert copy.events == guard.events
    assert copy.judge(50.0, 1.0) == guard.judge(50.0, 1.0)
    kept = DivergenceGuard(guard.settings)
    kept.skipped(7, "loss is not finite")
    kept.restore(guard.state(), keep_events=True)
    assert [event.step for event in kept.events] == [7]


def test_where_a_run_returns_to_depends_on_the_step_alone() -> None:
    settings = DivergenceSettings(rollback_every=100, rollback_margin=30, left_out_steps=5)
    guard = DivergenceGuard(settings)
    assert [guard.anchor(step) for step in (0, 99, 129, 130, 229, 230)] == [0, 0, 0, 100, 100, 200]
    assert [step for step in range(0, 301, 50) if guard.is_anchor(step, 229)] == [100, 200, 300]
    begun = DivergenceGuard(settings, 140)
    assert begun.anchor(150) == 140
    assert begun.is_anchor(140, 150)
    assert begun.anchor(240) == 200


def test_a_rollback_leaves_out_the_last_batches_and_lowers_the_rate() -> None:
    guard = DivergenceGuard(DivergenceSettings(left_out_steps=3, rollback_rate=0.5, max_events=2))
    assert guard.rate == 1.0
    event = guard.rolled_back(10, "loss is not finite", 5)
    assert str(event) == "step 11: loss is not finite; back to step 5, steps 9 to 11 left out"
    assert [step for step in range(13) if guard.leaves_out(step)] == [8, 9, 10]
    assert guard.rate == 0.5
    assert not guard.is_exhausted
    guard.rolled_back(6, "loss is not finite", 5)
    assert [step for step in range(8) if guard.leaves_out(step)] == [5, 6]
    assert guard.rate == 0.25
    assert guard.is_exhausted


def saved(store: CheckpointStore, step: int, *, healthy: bool = True) -> None:
    opened = store.begin(step, healthy=healthy)
    (opened.aside / "weights").write_text(str(step))
    store.finish(opened)


def test_an_unhealthy_checkpoint_is_never_the_last_good_one(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    saved(store, 10)
    # Retention leaves the healthy one there, however many follow.
    for step in (20, 30):
        saved(store, step, healthy=False)
    assert store.steps() == [10, 30]
    # Without an event the newest is gone on from: no work is lost to a suspicion.
    assert newest_checkpoint(tmp_path) == (30, tmp_path / "step-00000030")
    assert store.reject(lambda _, healthy: not healthy) == [30]
    assert newest_checkpoint(tmp_path) == (10, tmp_path / "step-00000010")
    assert store.healthy_at(30) is None
    # The same step again, after going back.
    saved(store, 30)
    assert newest_checkpoint(tmp_path) == (30, tmp_path / "step-00000030.1")
    assert store.healthy_at(30) == tmp_path / "step-00000030.1"
    assert store.steps() == [30]


def test_of_several_healthy_checkpoints_the_newest_stays(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step, healthy in ((10, True), (20, True), (30, False), (40, False), (50, False)):
        saved(store, step, healthy=healthy)
    assert store.steps() == [20, 40, 50]


def test_what_a_rollback_may_need_stays_beside_the_newest(tmp_path) -> None:
    settings = DivergenceSettings(rollback_every=10, rollback_margin=5)
    guard = DivergenceGuard(settings)
    store = CheckpointStore(tmp_path, keep=1, is_needed=guard.is_anchor)
    for step in (0, 10, 13, 14, 16, 20, 24):
        saved(store, step)
    assert store.steps() == [10, 20, 24]


def test_files_and_lines_count_steps_from_1_and_files_of_before_are_read(tmp_path) -> None:
    guard = DivergenceGuard(DivergenceSettings(left_out_steps=2))
    guard.skipped(6, "loss is not finite")
    guard.rolled_back(10, "loss is not finite", 8)
    write_events(tmp_path, guard)
    left = json.loads((tmp_path / EVENTS_FILE).read_text())["events"]
    assert [(e["step"], e["back_to"], e["left_out"]) for e in left] == [
        (7, 7, [7, 7]), (11, 8, [10, 11]),
    ]  # fmt: skip
    assert list(read_events(tmp_path)) == guard.events
    assert batch_folder(tmp_path, 6).name == "step-00000007"
    assert [str(event).partition(":")[0] for event in guard.events] == ["step 7", "step 11"]
    (tmp_path / EVENTS_FILE).write_text(json.dumps(guard.state()["events"]))
    assert list(read_events(tmp_path)) == guard.events
