"""Sweeps: every combination of settings is a run, what they share is computed once."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.experiments import sweep
from flows.experiments.sweep import (
    SetResult,
    better,
    differing_metrics,
    headline_metrics,
    ranked,
)
from flows.experiments.sweep_sets import SweepRefused, expand, sweep_name
from flows.history.run_evidence import finished_runs
from flows.records.records import RunDescription, RunResult, all_records, open_record
from flows.versioning import graph as versioning
from flows.versioning.setting_overrides import parse_assignments, read_params

PHOTOS = ["blue-wallpaper-portrait-2x3.jpg", "solus-tiles-dark.jpg"]


def test_every_combination_is_a_set_and_the_order_of_values_does_not_rename_it(
    root: Path,
) -> None:
    params = read_params(root)
    texts = ["dit_stage1.learning_rate=1e-4,3e-4", "dit_stage2.sigma_range=[0.5, 1.0],[0.6,1.0]"]
    sets = expand(texts, params)
    assert [tuple(one.overrides.values()) for one in sets] == [
        (1e-4, [0.5, 1.0]),
        (1e-4, [0.6, 1.0]),
        (3e-4, [0.5, 1.0]),
        (3e-4, [0.6, 1.0]),
    ]
    other = expand(["dit_stage1.learning_rate=3e-4,1e-4", texts[1]], params)
    assert {one.name for one in other} == {one.name for one in sets}
    assert sweep_name(other) == sweep_name(sets)
    assert sweep_name(sets).startswith("learning_rate-sigma_range-")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["vae.steps"], "expected section.key"),
        (["vae.stepz=1"], "no such setting"),
        (["nothing.steps=1"], "no such setting"),
        (["vae.steps.x=200"], "-S vae.steps.x: no such setting"),
        (["vae.steps.x.y=200"], "-S vae.steps.x.y: no such setting"),
        (["project.name.ultra=200"], "-S project.name.ultra: no such setting"),
        (["vae.steps=ten"], "vae.steps"),
        (["vae.steps=1,1"], "named twice"),
        (["vae.steps="], "no value"),
        (["vae.steps=1", "vae.steps=2"], "once per key"),
        ([f"vae.steps={','.join(map(str, range(1, 400)))}"], "at most 256"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_anything_runs(
    root: Path, texts: list[str], said: str
) -> None:
    with pytest.raises(SweepRefused, match=said):
        expand(texts, read_params(root))


@pytest.mark.parametrize(
    "metric",
    [
        "vae",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nothing.loss", "evaluate.psnr")),
    ],
)
def test_a_metric_of_no_stage_that_runs_is_refused_before_anything_runs(
    root: Path, metric: str
) -> None:
    command = ["ultraflux", "sweep", "-S", "vae.steps=1,2", "--until", "vae", "--dry-run"]
    command += ["--metric", metric]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"--metric {metric}: expected stage.metric of " in done.stderr


def test_a_metric_that_no_set_has_is_said_and_not_called_the_order(
    root: Path,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    made = [
        SetResult(f"s{steps}", {"vae.steps": steps}, "", metrics={"vae.loss": 1.0 / steps})
        for steps in (1, 2)
    ]
    # Sets are pipeline runs of minutes; what is said of their numbers is the command's own.
    monkeypatch.setattr(sweep, "run_sweep", lambda *_, **__: (None, made))
    monkeypatch.setattr(sweep, "finish", lambda *_: tmp_path / "results.json")
    command = ["sweep", "-S", "vae.steps=1,2", "--until", "vae"]
    done = typed(root, *command, "--metric", "source.nonsense")
    assert done.returncode == 1
    assert done.stderr == "error: --metric source.nonsense: no set has it; there are vae.loss\n"
    assert "sorted by vae.loss" in done.stdout
    assert typed(root, *command, "--metric", "vae.loss").returncode == 0


def test_numbers_without_a_point_are_numbers() -> None:
    assert parse_assignments(["a.b=1e-4", "a.c=[2E3, x]"]) == {"a": {"b": 1e-4, "c": [2000.0, "x"]}}
    assert parse_assignments(["a.name=1e-4x"]) == {"a": {"name": "1e-4x"}}


def test_sets_are_ranked_by_the_good_end_and_those_without_a_number_come_last() -> None:
    def result(name: str, **metrics: float) -> SetResult:
        named = {key.replace("__", "."): value for key, value in metrics.items()}
        return SetResult(name, {"vae.steps": 1}, name, metrics=named)

    results = [
        result("a", select__kept=5, dit__validation_loss_last=0.5, evaluate__psnr_db=20),
        result("b", select__kept=5, dit__validation_loss_last=0.4, evaluate__psnr_db=21),
        result("c"),
        result("d", select__kept=5, dit__validation_loss_last=math.nan, evaluate__psnr_db=19),
    ]
    loss = "dit.validation_loss_last"
    assert [one.name for one in ranked(results, loss, "lowest")] == ["b", "a", "c", "d"]
    assert [one.name for one in ranked(results, loss, "highest")] == ["a", "b", "c", "d"]
    # Wherever they stand: what has no number compares with nothing.
    assert [one.name for one in ranked(results[::-1], loss, "lowest")] == ["b", "a", "d", "c"]
    assert differing_metrics(results) == ["evaluate.psnr_db", loss]
    assert better("evaluate.generated_psnr_db") == "highest"
    assert better("dit_stage1.validation_loss_drop") == "highest"
    assert better(loss) == "lowest"
    assert better("select.kept") is None


def test_a_sets_metrics_are_of_the_run_that_made_its_outputs_in_any_tree(toy: Path) -> None:
    made = []
    for md5, kept in (("1" * 32, 5.0), ("2" * 32, 6.0)):
        record = open_record(toy, RunDescription(kind="stage", name="select"))
        record.finish(RunResult(status="FINISHED", metrics={"kept": kept}))
        record.set_outputs({"data/select/x": md5})
        made.append({"select": {"outs": [{"path": "data/select/x", "md5": md5}]}})
    runs = finished_runs(toy, {}, None)
    assert [headline_metrics(runs, lock) for lock in made] == [
        {"select.kept": 5.0},
        {"select.kept": 6.0},
    ]


def test_the_graph_ends_at_the_named_stage(toy: Path) -> None:
    assert list(versioning.stages_until(toy, "b")) == ["a", "b"]
    assert list(versioning.stages_until(toy, None)) == ["a", "b", "c", "d"]
    with pytest.raises(versioning.GraphError, match="no stage 'z'"):
        versioning.stages_until(toy, "z")


@pytest.mark.slow
def test_two_sets_at_once_share_their_stages_and_are_one_run_in_mlflow(
    clone: Callable[..., Path],
) -> None:
    from mlflow import MlflowClient

    from flows.tracking.uploader import tracking_uri

    project = clone("swept", {}, PHOTOS)
    command = ["ultraflux", "sweep", "-S", "select.min_entropy_bits=7.03,7.0"]
    command += ["--until", "select", "--parallel", "2", "--metric", "select.kept"]
    command += ["--order", "highest"]

    def sweep() -> tuple[list[dict], subprocess.CompletedProcess[str]]:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = (project / "runs" / "sweep").glob("*/results.json")
        return json.loads(file.read_text())["sets"], done

    sets, done = sweep()
    assert [one["settings"]["select.min_entropy_bits"] for one in sets] == [7.0, 7.03]
    kept = [one["metrics"]["select.kept"] for one in sets]
    assert kept[0] > kept[1]
    assert "sorted by select.kept, highest first" in done.stdout
    trees = [project / one["tree"] for one in sets]
    ran = [r.run.name for tree in trees for r in all_records(tree) if r.run.kind == "stage"]
    assert {stage: ran.count(stage) for stage in set(ran)} == {
        # Each working tree looks at the photographs itself, and finds what the other found.
        "source": 2,
        "ingest": 1,
        "signals": 1,
        "quality": 1,
        "people": 1,
        "select": 2,
    }
    client = MlflowClient(tracking_uri(project))
    experiment = client.get_experiment_by_name("ultraflux")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags["ultraflux.kind"] == "sweep")
    assert parent.data.metrics["best.select.kept"] == kept[0]
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    assert {run.data.tags["ultraflux.kind"] for run in children} == {"pipeline"}
    assert len(children) == 2
    # The same command has nothing to compute.
    again, _ = sweep()
    assert again == sets
    assert len([r for t in trees for r in all_records(t) if r.run.kind == "stage"]) == len(ran)
