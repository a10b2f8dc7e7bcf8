"""`ultraflux chaos` by the command, on a pipeline of trivial stages and on the small one."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.experiments.chaos.drill import Drill
from flows.experiments.chaos.faults import schedule
from flows.experiments.chaos.site import MARK, Site
from flows.records.owners import own_flow_run
from flows.records.records import RunDescription, RunResult, open_record
from flows.running.leftovers import leftovers
from flows.versioning.torn_files import mend_after_kills


def chaos(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ultraflux", "chaos", *arguments, "--json"],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        timeout=3000,
    )


def of_the_drill(folder: Path) -> list[str]:
    """What still runs in a drill's folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.cwd().startswith(str(folder)):
                found.append(" ".join(process.info["cmdline"] or []))
        except psutil.Error:
            continue
    return found


def test_a_killed_pipeline_of_trivial_stages_comes_out_the_same(
    trivial_clone: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    project = trivial_clone(tmp_path, 1)
    folder = tmp_path / "drill"
    arguments = ("--minutes", "5", "--faults", "1", "--every", "2", "--engine", "local")
    done = chaos(project, *arguments, "--as-is", "--kind", "pipeline", "--folder", str(folder))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (fault,) = report["faults"]
    assert (fault["kind"], fault["said"]) == ("pipeline", "nothing: it was killed")
    assert report["starts"] == 2
    assert report["problems"] == []
    # Every fault is a line, as it happened.
    (line,) = (folder / "faults.jsonl").read_text().splitlines()
    assert json.loads(line) == fault
    assert of_the_drill(folder) == []
    # Nothing was done to the project itself.
    assert not (project / "data" / "ingest").exists()


@pytest.mark.slow
def test_a_drill_that_is_ended_in_its_undisturbed_run_leaves_no_process(
    trivial_clone: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    project = trivial_clone(tmp_path, 3)
    folder = tmp_path / "drill"
    drill = subprocess.Popen(
        ["ultraflux", "chaos", "--minutes", "5", "--as-is", "--folder", str(folder)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any("flows.tracking.uploader" in line for line in of_the_drill(folder)):
        assert time.monotonic() < deadline
        assert drill.poll() is None
        time.sleep(0.1)
    drill.terminate()
    _, said = drill.communicate(timeout=120)
    assert drill.returncode == 130
    assert "what the drill had started is stopped" in said
    assert of_the_drill(folder) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "spark"], "choose local, prefect or pools"),
        (["--kind", "printer"], "choose from pipeline, dvc"),
        (["--within", "paint"], "choose from "),
        (["--folder", "."], "is not empty"),
    ],
)
def test_what_cannot_be_drilled_is_one_line(
    toy: Path, typed: Callable[..., Any], arguments: list[str], said: str
) -> None:
    done = typed(toy, "chaos", "--minutes", "1", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def drill(toy_template: Path, tmp_path: Path) -> Drill:
    """A drill whose clones are toys, at the end of a round."""
    site = Site(tmp_path, "token-of-the-toys")
    site.temporary.mkdir()
    for clone in (site.undisturbed, site.disturbed):
        subprocess.run(["cp", "-a", str(toy_template), str(clone)], check=True)
        (clone / "dvc.lock").write_text(LOCK)
        # As every command does that asks DVC.
        mend_after_kills(clone)
    made = Drill(
        site, schedule(0, 1.0, ["stage"]), lasts_s=0.0, most_faults=1, served=False, say=print
    )
    made.learn_what_is_right()
    return made


LOCK = """\
schema: '2.0'
stages:
  a: {cmd: x, outs: [{path: data/a, hash: md5, md5: aaaa}]}
  b: {cmd: x, outs: [{path: data/b, hash: md5, md5: bbbb}]}
"""


def test_a_round_without_a_trace_has_no_problem(drill: Drill) -> None:
    assert drill.other_hashes() == []
    assert drill.open_runs("prefect") == []
    assert drill.left_running() == []
    assert drill.left_on_disk([], []) == []


def test_another_hash_and_a_missing_output_are_named(drill: Drill) -> None:
    lock = drill.site.disturbed / "dvc.lock"
    lock.write_text(LOCK.replace("bbbb", "cccc").replace("data/a", "data/e"))
    assert drill.other_hashes() == [
        "data/a has None, undisturbed aaaa",
        "data/b has cccc, undisturbed bbbb",
        "data/e has aaaa, undisturbed None",
    ]


def test_a_run_that_reads_as_running_is_named(drill: Drill) -> None:
    clone = drill.site.disturbed
    record = open_record(clone, RunDescription(kind="stage", name="vae"))
    own_flow_run(clone, "1234")
    (said,) = drill.open_runs("local")
    assert said == f"vae reads as running ({record.record_id})"
    record.finish(RunResult(status="KILLED"))
    # This process owns the flow run, and lives.
    assert drill.open_runs("prefect") == []
    (clone / "runs/flow-runs/1234.json").write_text("{}")
    assert drill.open_runs("prefect") == ["flow run 1234 has no owner and no end"]
    assert drill.open_runs("local") == []


def test_what_lies_about_is_named_unless_clean_lists_it(drill: Drill) -> None:
    clone = drill.site.disturbed
    (drill.site.temporary / "tmpabc").mkdir()
    (clone / "data" / "half.parquet").touch()
    (clone / ".dvc" / "cache" / "files").mkdir(parents=True, exist_ok=True)
    (clone / ".dvc" / "cache" / "files" / "half").touch()
    listed = clone / "runs" / "attempts" / "a-1-2" / "outcome.json"
    listed.parent.mkdir(parents=True)
    listed.touch()
    state = clone / "runs" / "dit_stage1" / "4c2b3a0e6d37026d"
    logs = state / "ranks" / "0001" / "none_y7rv0o5o"
    logs.mkdir(parents=True)
    for path in (logs / "stderr.log", state / "restarts.jsonl", state / ".writing-half"):
        path.touch()
    names = [one.path for one in leftovers(clone)]
    assert names == ["runs/attempts/a-1-2"]
    assert drill.left_on_disk(names, ["runs/dit_stage1/4c2b3a0e6d37026d"]) == [
        ".dvc/cache/files/half",
        "data/half.parquet",
        "runs/dit_stage#/#/.writing-half",
        "TMPDIR/tmpabc",
    ]
    # Logs go with their state; of one that no command lists they are nobody's.
    assert drill.left_on_disk([".dvc", "data"], ["runs/dit_stage1/4c2b3a0e"]) == [
        "runs/attempts/a-#-#/outcome.json",
        "runs/dit_stage#/#/.writing-half",
        "runs/dit_stage#/#/ranks/#/none_y#rv#o#o/stderr.log",
        "runs/dit_stage#/#/restarts.jsonl",
    ]


def test_what_still_runs_is_named(drill: Drill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.experiments.chaos.drill.GOING_S", 0.0)
    left = subprocess.Popen(["sleep", "611"], env=os.environ | {MARK: drill.site.token})
    try:
        assert drill.left_running() == [f"{left.pid} sleep 611"]
    finally:
        left.kill()
        left.wait()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "prefect"])
def test_two_minutes_of_faults_over_training_change_no_hash(root: Path, engine: str) -> None:
    done = chaos(root, "--minutes", "2", "--every", "8", "--engine", engine, "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["faults"]) >= 3
