"""A run is set up again from its record, and its outputs are compared by hash."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.experiments import reproduction
from flows.experiments.reproduction import (
    Recorded,
    ReproductionRefused,
    compare_locks,
    find_recorded,
    last_stage,
    set_up,
)
from flows.history.run_evidence import Evidence
from flows.records.provenance import changes_digest, changes_since_commit, provenance_tags
from flows.records.records import RUN_TAGS, Record, RunDescription, RunResult, open_record
from flows.records.trees import REPRODUCE, tree_place
from flows.running.leftovers import leftovers, remove
from flows.tracking.uploader import Uploader
from flows.versioning import graph as versioning


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def kept_run(root: Path) -> Record:
    """Bring the toy up to date with `dvc repro` and keep what the driver keeps."""
    record = open_record(
        root, RunDescription(kind="pipeline", name="pipeline", tags=provenance_tags(root))
    )
    (record.folder / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    changes = changes_since_commit(root)
    if changes:
        (record.folder / "changes.diff").write_bytes(changes)
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)
    (record.folder / "dvc.lock").write_bytes((root / "dvc.lock").read_bytes())
    files = ("params.yaml", "dvc.lock", "changes.diff")
    artifacts = [
        str((record.folder / name).relative_to(root))
        for name in files
        if (record.folder / name).is_file()
    ]
    record.finish(RunResult(status="FINISHED", artifacts=artifacts))
    return record


def find(root: Path, name: str, *, mlflow: bool = False) -> Recorded:
    return find_recorded(Evidence(root, mlflow=mlflow), name)


@pytest.fixture
def changed(toy: Path) -> tuple[Path, Record]:
    """A run with an edited file, an edited setting and a new file, and then other work."""
    (toy / "source").write_text("other photographs\n")
    (toy / "params.yaml").write_text("project: {name: toy}\nvalue: 7\n")
    (toy / "new.py").write_text("made = True\n")
    (toy / ".env").write_text("PASSWORD=secret\n")
    record = kept_run(toy)
    (toy / "new.py").unlink()
    git(toy, "checkout", "-q", "--", "source", "params.yaml")
    git(toy, "commit", "-qm", "later", "--allow-empty")
    return toy, record


def test_the_tree_has_the_runs_commit_changes_settings_and_lock(
    changed: tuple[Path, Record], tmp_path: Path
) -> None:
    root, record = changed
    tree = tmp_path / "tree"
    recorded = find(root, record.record_id)
    assert b"secret" not in recorded.changes
    warnings = set_up(root, recorded, tree)
    assert (tree / "source").read_text() == "other photographs\n"
    assert (tree / "new.py").read_text() == "made = True\n"
    assert "value: 7" in (tree / "params.yaml").read_text()
    assert (tree / "dvc.lock").read_bytes() == (record.folder / "dvc.lock").read_bytes()
    assert versioning.cache_folder(tree) == versioning.cache_folder(root)
    # The file that may be a secret is not kept, and the tags tell.
    assert len(warnings) == 1
    assert "not kept" in warnings[0]
    assert not (tree / ".env").exists()


def test_a_run_whose_changes_are_all_kept_gives_a_tree_of_the_same_digest(
    toy: Path, tmp_path: Path
) -> None:
    (toy / "source").write_text("other photographs\n")
    (toy / "new.py").write_text("made = True\n")
    index = (toy / ".git" / "index").read_bytes()
    record = kept_run(toy)
    assert (toy / ".git" / "index").read_bytes() == index
    tree = tmp_path / "tree"
    assert set_up(toy, find(toy, "pipeline"), tree) == []
    assert changes_digest(tree) == record.run.tags["git.diff_sha256"] != ""


def test_the_tree_is_gone_on_with_for_its_run_and_refused_for_another(
    changed: tuple[Path, Record], tmp_path: Path
) -> None:
    root, record = changed
    tree = tmp_path / "tree"
    first = find(root, record.record_id)
    set_up(root, first, tree)
    (tree / "mine").touch()
    set_up(root, first, tree)
    assert (tree / "mine").is_file()
    other = kept_run(root)
    with pytest.raises(ReproductionRefused, match="another folder"):
        set_up(root, find(root, other.record_id), tree)
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "thesis.tex").touch()
    with pytest.raises(ReproductionRefused, match="files already"):
        set_up(root, first, filled)
    assert [path.name for path in filled.iterdir()] == ["thesis.tex"]


def test_outputs_are_compared_stage_by_stage_and_a_cause_is_named(
    toy: Path, tmp_path: Path
) -> None:
    record = kept_run(toy)
    tree = tmp_path / "tree"
    recorded = find(toy, record.record_id)
    set_up(toy, recorded, tree)
    subprocess.run(["dvc", "checkout", "-q"], cwd=tree, check=True)
    assert {one.verdict for one in compare_locks(recorded, tree)} == {"equal"}
    (tree / "source").write_text("other bytes\n")
    subprocess.run(["dvc", "repro", "-q"], cwd=tree, check=True)
    found = {one.stage: one for one in compare_locks(recorded, tree)}
    assert {stage for stage, one in found.items() if one.verdict == "differs"} == {"c", "d"}
    assert found["c"].inputs == ("source",)
    assert found["d"].inputs == ("data/c",)
    assert list(found["c"].outputs) == ["data/c"]


def test_stages_that_did_not_end_are_not_compared(toy: Path, tmp_path: Path) -> None:
    record = kept_run(toy)
    statuses = {"stage.a": "ran", "stage.b": "failed", "stage.c": "skipped", "stage.d": "blocked"}
    record.finish(RunResult(status="FAILED", tags=statuses))
    recorded = find(toy, record.record_id)
    set_up(toy, recorded, tmp_path / "tree")
    assert [one.stage for one in compare_locks(recorded, tmp_path / "tree")] == ["a", "c"]


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_is_reproduced_as_far(toy: Path) -> None:
    graph = versioning.stage_graph(toy)

    def last(stages: list[str]) -> str | None:
        tags = {f"stage.{name}": "ran" for name in stages} | {"stage.a.run_id": "x"}
        return last_stage(Recorded("x", "HEAD", None, b"", tags=tags if stages else {}), toy)

    assert last([]) is None
    assert last(list(graph)) is None
    for name in graph:
        part = list(versioning.stages_until(toy, name))
        assert last(part) == (None if len(part) == len(graph) else name)


def test_a_run_of_another_clone_is_read_from_mlflow(
    changed: tuple[Path, Record], tmp_path: Path
) -> None:
    root, record = changed
    uploader = Uploader(root)
    uploader.sync()
    here = find(root, record.record_id)
    run_id = str(record.mlflow_run_id)
    record.folder.rename(tmp_path / "elsewhere")
    away = find(root, run_id, mlflow=True)
    assert (away.params, away.lock, away.changes) == (here.params, here.lock, here.changes)
    assert away.commit == here.commit


def test_a_revision_is_reproduced_from_its_own_lock(toy: Path, tmp_path: Path) -> None:
    kept_run(toy)
    with pytest.raises(ReproductionRefused, match=r"no dvc\.lock in this revision"):
        find(toy, "HEAD")
    git(toy, "add", "-f", "dvc.lock")
    git(toy, "commit", "-qm", "lock")
    recorded = find(toy, "HEAD")
    assert set_up(toy, recorded, tmp_path / "tree") == []
    assert {one.verdict for one in compare_locks(recorded, tmp_path / "tree")} == {"equal"}


def test_what_cannot_be_reproduced_is_refused_with_a_line(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ReproductionRefused, match="nor a Git revision"):
        find(toy, "nothing")
    unfinished = open_record(toy, RunDescription(kind="pipeline", name="pipeline"))
    with pytest.raises(ReproductionRefused, match=r"kept no dvc\.lock"):
        find(toy, unfinished.record_id)
    gone = Recorded("lost", "0" * 40, None, b"stages: {}\n")
    with pytest.raises(ReproductionRefused, match="git fetch"):
        set_up(toy, gone, tmp_path / "tree")


def reproduce(root: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    command = ["ultraflux", "reproduce", "--json", "--no-mlflow", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def with_settings(toy: Path, root: Path) -> None:
    """Make of the toy a project that `ultraflux run` takes."""
    (toy / "params.yaml").write_text((root / "params.yaml").read_text())
    (toy / "data" / "sample").mkdir()
    (toy / "data" / "sample" / "photo.txt").touch()
    graph = (toy / "dvc.yaml").read_text().replace("params: [value]", "params: [project.seed]")
    (toy / "dvc.yaml").write_text(graph.replace("  a:\n", "  ingest:\n"))


@pytest.mark.slow
def test_a_run_that_somebody_names_is_recorded_though_nothing_is_to_do(
    toy: Path, root: Path
) -> None:
    with_settings(toy, root)

    def records(**tags: str) -> int:
        env = os.environ | ({RUN_TAGS: json.dumps(tags)} if tags else {})
        done = subprocess.run(["ultraflux", "run"], cwd=toy, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        return len(list((toy / "runs" / "records").glob("pipeline-*")))

    assert [records(), records(), records(repeats="a")] == [1, 1, 2]


@pytest.mark.slow
def test_the_command_restores_or_computes_again_and_says_whether_all_is_equal(
    toy: Path, root: Path
) -> None:
    with_settings(toy, root)
    done = subprocess.run(["ultraflux", "run"], cwd=toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = next((toy / "runs" / "records").glob("pipeline-*")).name
    code, found = reproduce(toy, run)
    tree = Path(found["tree"])
    assert (code, found["equal"]) == (0, True)
    assert tree == toy / "runs" / "reproduce" / run
    assert (tree / "data" / "d").read_bytes() == (toy / "data" / "d").read_bytes()
    assert not (tree / "b.runs").exists(), "restored, not computed"
    # The new run stands in the clone's MLflow and names the one that it repeats.
    uploader = Uploader(toy)
    runs = uploader.client.search_runs([uploader.experiment_id])
    assert run in {r.data.tags.get("ultraflux.reproduces") for r in runs}
    code, found = reproduce(toy, run, "--recompute", "--stage", "b")
    assert (code, found["equal"]) == (0, True)
    assert (tree / "b.runs").read_text() == "run\n"
    code, found = reproduce(toy, run, "--recompute", "--into", str(toy / "runs" / "again"))
    assert (code, found["equal"]) == (0, True)
    assert (toy / "runs" / "again" / "b.runs").is_file()


@pytest.mark.slow
def test_a_stage_that_gives_other_bytes_is_found_out(toy: Path, tmp_path: Path) -> None:
    text = (toy / "dvc.yaml").read_text()
    drawn = text.replace("cat data/a source > data/c", "cat /proc/sys/kernel/random/uuid > data/c")
    (toy / "dvc.yaml").write_text(drawn)
    git(toy, "commit", "-qam", "random")
    record = kept_run(toy)
    recorded = find(toy, record.record_id)
    tree = tmp_path / "tree"
    set_up(toy, recorded, tree)
    subprocess.run(["dvc", "checkout", "-q"], cwd=tree, check=True)
    subprocess.run(["dvc", "repro", "-q", "-s", "-f", "c"], cwd=tree, check=True)
    found = {one.stage: one for one in compare_locks(recorded, tree)}
    assert found["c"].verdict == "differs"
    assert found["c"].inputs == ()


def test_a_reproduction_at_work_is_not_cleaned_away(
    toy: Path,
    typed: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = kept_run(toy).record_id
    tree = tree_place(toy, REPRODUCE, name)
    seen: dict[str, list[str]] = {}

    def looks(step: str) -> None:
        ours = getattr(reproduction, step)

        def look(*arguments: Any, **named: Any) -> Any:
            seen[step] = [one.path for one in leftovers(toy) if one.kind == "reproduction"]
            # Nothing is computed: the tree stands as it was set up.
            return True if step == "run_again" else ours(*arguments, **named)

        monkeypatch.setattr(reproduction, step, look)

    for step in ("run_again", "compare_locks"):
        looks(step)
    done = typed(toy, "reproduce", name, "--no-mlflow")
    assert done.returncode == 0, done.stderr
    assert seen == {"run_again": [], "compare_locks": []}
    (left,) = [one for one in leftovers(toy) if one.kind == "reproduction"]
    remove(toy, left)
    assert not tree.exists()
    assert list(tree.parent.iterdir()) == []
