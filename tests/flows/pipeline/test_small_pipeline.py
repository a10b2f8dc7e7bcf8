"""All stages on real photographs with a few training steps each, through every door."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import small_project
import yaml

from flows.versioning import graph as versioning

CHANGED = "generate.num_inference_steps"


def ultraflux(project: Path, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | changed
    options = {"cwd": project, "env": environment, "text": True, "timeout": 1500}
    return subprocess.run(["ultraflux", *words], capture_output=True, **options)


@pytest.fixture(scope="module")
def project(small_clone: Callable[..., Path]) -> Path:
    """A clone in which the pipeline has run once."""
    made = small_clone("small")
    done = ultraflux(made, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_every_stage_ran_and_the_second_run_skips_them_all(project: Path) -> None:
    graph = versioning.stage_graph(project)
    assert versioning.stale_stages(project, graph) == {}
    before = (project / "dvc.lock").read_bytes()
    done = ultraflux(project, "run")
    assert done.returncode == 0, done.stderr
    marks = [line.split()[0] for line in done.stdout.splitlines() if line[:7].strip()]
    assert marks.count("same") == len(graph) == 18
    # `dvc repro` sees the same state: nothing to do, not a byte of the lock changed.
    subprocess.run(["dvc", "repro", "-q"], cwd=project, check=True, timeout=300)
    assert (project / "dvc.lock").read_bytes() == before


def test_selection_follows_the_official_signals(project: Path, root: Path) -> None:
    manifest = pandas.read_parquet(project / "data" / "caption" / "manifest.parquet")
    official = pandas.read_csv(root / "tests" / "reference" / "signals.csv").set_index("file")
    assert len(manifest) == len(small_project.PHOTOS)
    for row in manifest.to_dict("records"):
        values = official.loc[Path(row["uri"]).name]
        assert row["entropy_bits"] == values["shannon_entropy"]
        assert row["flat_fraction"] == values["flat_percentage"]
        passes = (
            values["width"] * values["height"] >= 3840 * 2160
            and values["flat_percentage"] <= 0.5
            and values["shannon_entropy"] >= 7.0
        )
        assert row["kept"] == passes


def test_the_human_channel_is_retrieved_has_evidence_and_is_merged(project, typed) -> None:
    released = pandas.read_parquet(project / "data" / "slices" / "manifest.parquet")
    released.index = [Path(uri).stem for uri in released["uri"]]
    hikers = released.loc["mount-batok-java"]
    assert (hikers["query"], hikers["channel"]) == ("hikers on a volcano", "human")
    assert (hikers["person_scorer"], hikers["person_count"]) == ("hand", 6)
    assert (hikers["is_character"], hikers["kept"]) == (True, True)
    assert hikers["split"] in {"train", "eval"}
    others = released.drop("mount-batok-java")
    assert set(others["channel"]) == {"general"}
    assert not others["is_character"].any()
    # Its folder is a dependency of the stage: a box that is marked anew is looked at.
    assert "data/scores" in versioning.dependencies(project, "people")
    page = project / "datasheet.html"
    done = typed(project, "corpus", "datasheet", "--output", page.name)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert all(word in text for word in ("1 with people", "human", "general"))
    page.unlink()


def test_no_evaluation_image_is_trained_on(project: Path) -> None:
    slices = {
        name: set(pandas.read_parquet(project / f"data/slices/{name}.parquet")["image_id"])
        for name in ("vae", "stage1", "stage2", "eval")
    }
    assert slices["eval"]
    for name in ("vae", "stage1", "stage2"):
        assert not slices[name] & slices["eval"]
    assert slices["stage2"] <= slices["stage1"]


def test_mlflow_has_the_tree_the_curves_the_corpus_and_the_lineage(project: Path) -> None:
    import mlflow.models
    from mlflow import MlflowClient

    from flows.tracking.uploader import tracking_uri, use_store

    use_store(tracking_uri(project))
    client = MlflowClient(tracking_uri(project))
    experiment = client.get_experiment_by_name("ultraflux")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    pipelines = [run for run in runs if run.data.tags["ultraflux.kind"] == "pipeline"]
    first = min(pipelines, key=lambda run: run.info.start_time)
    children = {
        run.info.run_name: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == first.info.run_id
    }
    graph = versioning.stage_graph(project)
    assert set(children) == set(graph)
    assert all(run.info.status == "FINISHED" for run in [first, *children.values()])
    vae = children["vae"]
    losses = client.get_metric_history(vae.info.run_id, "loss")
    assert len(losses) == small_project.SETTINGS["vae.steps"]
    assert any(item.path.endswith(".png") for item in client.list_artifacts(vae.info.run_id))
    written = {
        (item.dataset.name, item.dataset.digest)
        for item in children["slices"].inputs.dataset_inputs
    }
    read = {(i.dataset.name, i.dataset.digest) for i in vae.inputs.dataset_inputs}
    assert {"slices/stage1", "slices/eval"} <= {name for name, _ in written}
    assert {pair for pair in read if pair[0] == "slices/vae"} <= written
    for run in children.values():
        assert run.data.metrics["system/stage_memory_megabytes"] > 0
    files = {item.path for item in client.list_artifacts(children["validate"].info.run_id)}
    assert {"report.html", "failed_rows.parquet"} <= files
    assert "report.html" in children["validate"].data.tags["mlflow.note.content"]
    assert "[validate](#/experiments/" in first.data.tags["mlflow.note.content"]
    for model in ("ultraflux-transformer", "ultraflux-autoencoder-f16"):
        (version,) = client.search_model_versions(f"name='{model}'")
        assert (
            version.tags["mlflow.source.git.commit"] == first.data.tags["mlflow.source.git.commit"]
        )
        assert version.tags["dvc.md5"].endswith(".dir")
        assert mlflow.models.get_model_info(f"models:/{model}/{version.version}").signature
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    for name, run in children.items():
        assert run.data.tags["ultraflux.stage_key"]
        assert "mlflow.source.git.commit" in run.data.tags
        for out in lock[name]["outs"]:
            assert run.data.tags[f"dvc.out.{out['path']}"] == out["md5"]
    assert "stage.vae.run_id" in first.data.tags
    # A skipped stage links to the run that made its result.
    later = [run for run in pipelines if run.info.run_id != first.info.run_id]
    for run in later:
        assert run.data.tags["stage.vae.run_id"] == vae.info.run_id


def test_lineage_walks_from_a_generated_picture_to_photographs_and_back(project, typed) -> None:
    picture = sorted((project / "data/generate/images").glob("*.png"))[0]
    done = typed(project, "lineage", str(picture), "--json")
    assert done.returncode == 0, done.stderr

    def steps(node: dict[str, Any]) -> list[dict[str, Any]]:
        return [node, *(found for child in node["children"] for found in steps(child))]

    back = steps(json.loads(done.stdout))
    assert [step["title"] for step in back if step["kind"] == "missing"] == []
    photos = {s["title"] for s in back if s["kind"] == "photograph"}
    assert photos
    assert photos <= {f"data/sample/{name}" for name in small_project.PHOTOS}
    runs = {step["title"].split()[0] for step in back if step["kind"] == "run"}
    assert {"ingest", "slices", "vae", "dit_stage1", "dit_stage2", "generate"} <= runs
    stage2 = pandas.read_parquet(project / "data/slices/stage2.parquet")["uri"].iloc[0]
    forth = steps(json.loads(typed(project, "lineage", stage2, "--json").stdout))
    assert picture.name in {step["title"] for step in forth if step["kind"] == "picture"}


@pytest.mark.slow
def test_a_run_is_reproduced_with_equal_outputs_restored_and_computed_again(project: Path) -> None:
    before = {p: p.read_bytes() for p in (project / "data/slices").glob("*.parquet")}
    cheap = [argument for stage in ("select", "slices") for argument in ("--stage", stage)]
    done = ultraflux(project, "reproduce", "pipeline", "--recompute", *cheap, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["warnings"] == []
    how = {one["stage"]: one["how"] for one in found["stages"] if one["verdict"] == "equal"}
    assert len(how) == 18
    assert {stage for stage, made in how.items() if made == "computed"} == {
        "source",
        "select",
        "slices",
    }
    for path, data in before.items():
        assert (Path(found["tree"]) / path.relative_to(project)).read_bytes() == data


def test_the_report_and_the_images_are_there(project, typed) -> None:
    page = (project / "data" / "evaluate" / "report.html").read_text(encoding="utf-8")
    for photo in small_project.PHOTOS:
        assert photo in page
    images = sorted(path.name for path in (project / "data/generate/images").glob("*.png"))
    assert len(images) == len(small_project.SETTINGS["generate.sizes"])
    decision = json.loads((project / "data/promote/decision.json").read_text())
    assert decision["promoted"] is False  # four steps teach nothing: the gate must refuse
    refused = typed(project, "promote")
    assert refused.returncode == 1
    assert "not promoted" in refused.stderr


def test_generate_paints_from_the_trained_weights_reproducibly(project, typed) -> None:
    arguments = ("generate", "--prompt", "a red tree", "--size", "160x96", "--steps", "2")
    pictures = []
    # In a process of its own, and in one that has done other things before.
    for folder, run in (("one", ultraflux), ("two", typed)):
        done = run(project, *arguments, "--output", folder)
        assert done.returncode == 0, done.stderr
        pictures.append((project / done.stdout.strip()).read_bytes())
    assert pictures[0] == pictures[1]


def test_a_changed_threshold_re_runs_selection_but_no_signal(project: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    try:
        path.write_text(before.replace("min_entropy_bits: 7.0", "min_entropy_bits: 6.9"))
        stale = versioning.stale_stages(project, versioning.stage_graph(project))
        assert "select" in stale
        assert not {"ingest", "signals", "quality", "people"} & set(stale)
    finally:
        path.write_text(before)


def dvc(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["dvc", *arguments], cwd=project, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dvc_metrics_name_every_stage_that_measures(project: Path) -> None:
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"]
    data = {path: entry["data"] for path, entry in shown.items()}
    assert data["data/select/summary.json"]["candidates"] == len(small_project.PHOTOS)
    assert data["data/vae/metrics.json"]["psnr_after_db"] > 0
    for stage in ("dit_stage1", "dit_stage2"):
        assert "validation_loss_drop" in data[f"data/{stage}/metrics.json"]
    assert set(data) == {
        path
        for stage in yaml.safe_load((project / "dvc.yaml").read_text())["stages"].values()
        for path in stage.get("metrics", [])
    }


def test_dvc_plots_show_curves_without_gaps_and_pictures(project: Path, tmp_path: Path) -> None:
    shown = json.loads(dvc(project, "plots", "show", "--json", "-o", str(tmp_path)))
    assert not shown.get("errors")
    plots = shown["data"]
    curve = plots["data/vae/history.csv"][0]
    assert curve["type"] == "vega"
    # Steps at which nothing was measured are left out, not drawn as zero.
    assert '{"not": {"field": "psnr_db", "oneOf": ["", null]}}' in json.dumps(curve)
    for stage in ("dit_stage1", "dit_stage2"):
        assert plots[f"data/{stage}/history.csv"]
        assert '"aggregate": "mean"' in json.dumps(plots[f"data/{stage}/validation.csv"])
    assert {entry["type"] for entry in plots["data/generate/grid.png"]} == {"image"}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def edited(project: Path) -> Iterator[Path]:
    """The project, whose code and lock are brought back afterwards."""
    lock = (project / "dvc.lock").read_bytes()
    yield project
    subprocess.run(["git", "reset", "-q", "--hard"], cwd=project, check=True)
    subprocess.run(["git", "clean", "-q", "-f", "components", "flows"], cwd=project, check=True)
    (project / "dvc.lock").write_bytes(lock)
    subprocess.run(["dvc", "checkout", "-q", "data/code"], cwd=project, check=True)


def stale(project: Path) -> dict[str, str]:
    return versioning.stale_stages(project, versioning.stage_graph(project))


def run_own_code(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As `ultraflux`, with the clone's own code rather than that of the installed one."""
    return ultraflux(project, *arguments, PYTHONPATH=str(project))


def test_a_comment_a_docstring_and_a_renamed_module_make_nothing_stale(edited: Path) -> None:
    library = edited / "components"
    edit(library / "files/whole_files.py", "from __future__", "# A comment.\nfrom __future__")
    edit(library / "objectives/haar.py", '"""One-level', '"""The one-level')
    (library / "images/pixel_range.py").rename(library / "images/value_range.py")
    for path in library.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("images.pixel_range", "images.value_range"), encoding="utf-8")
    assert stale(edited) == {}
    listed = run_own_code(edited, "stage", "list")
    assert listed.stdout.count("up to date") == 18, listed.stderr
    # DVC looks at files: it runs `code`, whose outputs are the same bytes, and nothing after it;
    # `source` is asked at every time.
    done = subprocess.run(
        ["dvc", "repro"],
        cwd=edited,
        env=os.environ | {"PYTHONPATH": str(edited)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"Running stage '(\w+)'", done.stdout)) == {"code", "source"}
    assert "source: unchanged" in done.stderr


CONSTANT = "components/objectives/flow_matching.py"
TRAINING = ("dit_stage1", "dit_stage2")


def test_a_changed_constant_makes_exactly_its_closure_stale(edited: Path) -> None:
    edit(edited / CONSTANT, "TIME_EPSILON = 1e-4", "TIME_EPSILON = 2e-4")
    reasons = stale(edited)
    assert set(reasons) == {"code", *TRAINING, "generate", "evaluate", "promote"}
    for name in TRAINING:
        assert reasons[name] == "its code: components.objectives.flow_matching"
        assert reasons["generate"] == "after dit_stage2"
    # What a person has frozen stays as it is, whatever becomes of its code.
    edit(edited / "dvc.yaml", "  dit_stage1:\n", "  dit_stage1:\n    frozen: true\n")
    assert "dit_stage1" not in stale(edited)
    edit(edited / "dvc.yaml", "    frozen: true\n", "")
    refused = run_own_code(edited, "stage", "run", "dit_stage1")
    assert refused.returncode == 2
    assert "is not of this code (its code: components.objectives.flow_matching)" in refused.stderr


@pytest.mark.slow
def test_results_are_kept_across_a_change_of_code_that_a_person_vouches_for(edited: Path) -> None:
    edit(edited / CONSTANT, "TIME_EPSILON = 1e-4", "TIME_EPSILON = 2e-4")
    # The installed code is the old one: run in its place it would make the old results.
    outputs = {name: versioning.lock_entry(edited, name)["outs"] for name in TRAINING}
    why = "only t below 2e-4 differs, and no step drew one"
    done = run_own_code(edited, "stage", "accept", *TRAINING, "--why", why)
    assert done.returncode == 0, done.stderr
    assert stale(edited) == {}
    assert {name: versioning.lock_entry(edited, name)["outs"] for name in TRAINING} == outputs
    again = run_own_code(edited, "stage", "accept", "dit_stage1", "--why", why)
    assert again.returncode == 2
    assert "nothing to accept" in again.stderr
    picture = sorted((edited / "data/generate/images").glob("*.png"))[0]
    assert why in run_own_code(edited, "lineage", str(picture), "--json").stdout
    assert run_own_code(edited, "sync").returncode == 0
    kinds = {run["tags"]["ultraflux.kind"] for run in tracked(edited) if why in str(run)}
    assert kinds == {"acceptance", "stage"}


def tracked(project: Path) -> list[dict[str, Any]]:
    from mlflow import MlflowClient

    from flows.tracking.uploader import tracking_uri, use_store

    use_store(tracking_uri(project))
    client = MlflowClient(tracking_uri(project))
    experiment = client.get_experiment_by_name("ultraflux")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return [{"name": run.info.run_name, "tags": run.data.tags} for run in runs]


def test_other_changes_cannot_be_accepted(edited: Path) -> None:
    edit(edited / "params.yaml", "min_entropy_bits: 7.0", "min_entropy_bits: 6.9")
    done = run_own_code(edited, "stage", "accept", "select", "--why", "it is close")
    assert done.returncode == 2
    assert "nothing to accept" in done.stderr
    with (edited / "components/corpus/selection/rules.py").open("a", encoding="utf-8") as file:
        file.write("\n_UNUSED = 1\n")
    done = run_own_code(edited, "stage", "accept", "select", "--why", "it is close")
    assert done.returncode == 2
    assert "more than its code has changed" in done.stderr
    assert "params.yaml" in done.stderr


@pytest.mark.slow
def test_an_experiment_equals_a_normal_run_and_metrics_diff_shows_it(project: Path) -> None:
    copies = {name: project.with_name(name) for name in ("experiment", "normal")}
    for copy in copies.values():
        shutil.copytree(project, copy, symlinks=True)
    before = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    dvc(copies["experiment"], "exp", "run", "-n", "more-steps", "-S", f"{CHANGED}=3")
    path = copies["normal"] / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["generate"]["num_inference_steps"] = 3
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    done = ultraflux(copies["normal"], "run")
    assert done.returncode == 0, done.stderr
    locks = [yaml.safe_load((copy / "dvc.lock").read_text()) for copy in copies.values()]
    assert locks[0] == locks[1]
    changed = {name for name, entry in locks[0]["stages"].items() if entry != before[name]}
    assert changed == {"generate", "evaluate", "promote"}
    experiment = copies["experiment"]
    table = json.loads(dvc(experiment, "exp", "show", "--json"))
    assert "more-steps" in json.dumps(table)
    compared = json.loads(dvc(experiment, "params", "diff", "--json"))
    assert compared["params.yaml"][CHANGED] == {"old": 2, "new": 3, "diff": 1}


@pytest.mark.slow
def test_two_pipelines_at_once_take_turns(project: Path) -> None:
    copy = project.with_name("turns")
    shutil.copytree(project, copy, symlinks=True)
    edit(copy / "params.yaml", "bootstrap_resamples: 100", "bootstrap_resamples: 101")
    runs = [
        subprocess.Popen(
            ["ultraflux", "run"],
            cwd=copy,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=900)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    waited = [text for text in said if "Another run" in text]
    (worked,) = [text for text in said if "Another run" not in text]
    assert len(waited) == 1
    assert "done  evaluate" in worked
    assert "done  evaluate" not in waited[0]
    assert versioning.stale_stages(copy, versioning.stage_graph(copy)) == {}


def first_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0]


@pytest.mark.slow
def test_an_unfinished_training_run_meets_settings_that_have_changed(project, typed) -> None:
    """Warned, edited and gone on with, through the commands a person types."""
    copy = project.with_name("edited-run")
    shutil.copytree(project, copy, symlinks=True)
    small_project.change_settings(copy, {"dit_stage1.steps": 500, "dit_stage1.checkpoint_every": 2})
    key = first_line(typed(copy, "stage", "key", "dit_stage1"))
    state = copy / "runs" / "dit_stage1" / key[:16]
    with (copy / "stage.log").open("w+") as log:
        process = subprocess.Popen(
            ["ultraflux", "stage", "run", "dit_stage1"],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stderr=log,
        )
        deadline = time.monotonic() + 240
        while not (state / "checkpoints" / "latest").exists():
            assert process.poll() is None, (copy / "stage.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(120) == 130
    said = (copy / "stage.log").read_text()
    # The pipeline's own run is finished: it stands in nobody's way, and can be gone on from.
    assert "--continue-from dit_stage1/" in said
    rows = [json.loads(line) for line in (state / "metrics.jsonl").read_text().splitlines()]
    assert f"error: dit_stage1: interrupted, saved at step {rows[-1]['step']} of 500;" in said
    # As if each step had taken an hour: too much to be begun again without a word.
    lines = [json.dumps(row | ({"step_s": 3600.0} if "step_s" in row else {})) for row in rows]
    (state / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    unseen = {"dit_stage1.checkpoint_every": 3, "dit_stage1.watch_every": 7}
    small_project.change_settings(copy, unseen | {"models.transformer.card.license": "mit"})
    assert first_line(typed(copy, "stage", "key", "dit_stage1")) == key
    small_project.change_settings(copy, {"dit_stage1.learning_rate": 5e-5})
    refused = run_own_code(copy, "stage", "run", "dit_stage1")
    assert refused.returncode == 2
    step = int((state / "checkpoints" / "latest").read_text()[5:13])
    assert f"an unfinished run is at step {step} of 500 ({step}.00 device hours)" in refused.stderr
    assert "-> 5e-05" in refused.stderr
    assert f"--continue-from dit_stage1/{key[:16]}" in refused.stderr

    small_project.change_settings(copy, {"dit_stage1.steps": step + 1})
    done = run_own_code(
        copy, "stage", "run", "dit_stage1", "--continue-from", f"dit_stage1/{key[:6]}"
    )
    assert done.returncode == 0, done.stderr
    card = (copy / "data/dit_stage1/ema/README.md").read_text(encoding="utf-8")
    assert f"| 1 to {step} | as begun |" in card
    assert f"| {step + 1} to {step + 1} | dit_stage1.learning_rate" in card
    listed = json.loads(typed(copy, "stage", "states", "--json").stdout)
    now = next(row for row in listed if row["differs"] == "current")
    assert (now["step"], now["status"], len(now["segments"])) == (step + 1, "finished", 2)
    pruned = typed(copy, "stage", "states", "dit_stage1", "--prune")
    assert pruned.returncode == 0, pruned.stderr
    assert not state.exists()
    assert (copy / "runs" / now["state"]).is_dir()
    shutil.rmtree(copy)
