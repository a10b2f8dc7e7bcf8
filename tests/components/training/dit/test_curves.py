"""Numbers of a training run, from a metric log that is whole and from one that has lost lines."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import pytest

from components.telemetry.metric_log import MetricLog
from components.training.dit.curves import (
    draw_curves,
    headline_metrics,
    history_table,
    missing_rows,
    say_missing_rows,
)
from components.training.dit.validation import LEVELS, ValidationLoss

STEPS = 20


def measured(loss: float, *suffixes: str) -> dict[str, float]:
    losses = ValidationLoss((loss,) * LEVELS, (2 * loss,) * LEVELS)
    both = [losses.metrics(one) | {f"training_images_loss{one}": loss / 2} for one in suffixes]
    return {name: value for one in both for name, value in one.items()}


def rows(lost: Collection[int] = ()) -> list[dict[str, Any]]:
    """A run whose loss falls from 20 to 1, measured every five steps; step 7 was left out."""
    log: list[dict[str, Any]] = [{"step": 0, **measured(4.0, "")}]
    for step in range(1, STEPS + 1):
        log.append({"step": step, **({"left_out": 1.0} if step == 7 else {"loss": 21.0 - step})})
        if step % 5 == 0:
            log.append({"step": step, **measured(4.0 - step / 10, "")})
    log.append({"step": STEPS, **measured(1.0, "_ema")})
    return [row for row in log if row["step"] not in lost]


FIRST = {
    "validation_loss_first": 4.0,
    "validation_objective_first": 8.0,
    "validation_loss_in_range_first": 4.0,
    "validation_loss_drop": 0.75,
    "training_images_loss_first": 2.0,
    "training_images_loss_drop": 0.75,
}
TRAIN = {"train_loss_first": 20.0, "train_loss_last": 1.0}
LAST = {
    "validation_loss_last": 1.0,
    "validation_loss_last_raw": 2.0,
    "validation_objective_last": 2.0,
    "validation_loss_in_range_last": 1.0,
    "training_images_loss_last": 0.5,
}


@pytest.mark.parametrize(
    ("lost", "missing", "kept"),
    [
        ((), "", FIRST | TRAIN),
        ((0,), "the validation before step 1", TRAIN),
        ((3, 4, 5, 9), "steps 3 to 5, 9", FIRST),
        (range(11), "the validation before step 1 and steps 1 to 10", {}),
        # Nothing was there when the run went on at its last step, and measured that once more.
        (range(20), "the validation before step 1 and steps 1 to 19", {}),
        (range(2, 20, 2), "steps 2, 4, 6, 8 and 5 more", FIRST),
    ],
)
def test_a_number_that_needs_a_lost_row_is_left_out_and_none_is_wrong(lost, missing, kept) -> None:
    log = rows(lost)
    assert missing_rows(log, STEPS) == missing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers = headline_metrics(log, (0.0, 1.0))
    # A mean over a tenth of 19 steps is one step.
    assert numbers == pytest.approx(LAST | kept)


def test_a_run_that_lost_all_has_its_last_numbers_and_curves_alone(tmp_path) -> None:
    log = [{"step": STEPS, **measured(2.0, "")}, {"step": STEPS, **measured(1.0, "_ema")}]
    assert history_table(log).empty
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert headline_metrics(log, (0.0, 1.0)) == pytest.approx(LAST)
        draw_curves(log, "dit_stage1", tmp_path / "curves.png")


def test_a_run_that_goes_on_beside_a_cut_log_says_what_is_lost(
    make_dit_job, tmp_path, capsys
) -> None:
    job = make_dit_job(tmp_path)
    log = MetricLog(job.metrics)
    for row in rows(lost=(4,)):
        log.log({name: value for name, value in row.items() if name != "step"}, row["step"])
    say_missing_rows(job, 3)
    assert capsys.readouterr().err == ""
    say_missing_rows(job, 6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{job.name}: {job.metrics} lacks step 4: numbers that need them")
    job.metrics.write_text("")
    say_missing_rows(job, 6)
    assert "lacks the validation before step 1 and steps 1 to 6: " in capsys.readouterr().err
