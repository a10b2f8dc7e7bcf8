"""Bad input at the front door: each gives one clear line, or simply works."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest


def run(project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ultraflux", "run"], cwd=project, capture_output=True, text=True, timeout=300
    )


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_an_empty_photo_folder_names_the_folder_and_the_setting(
    clone: Callable[..., Path],
) -> None:
    project = clone("empty", {"ingest.source": "data/empty"}, [])
    (project / "data" / "empty").mkdir()
    (project / "data" / "empty" / "captions.jsonl").touch()
    done = run(project)
    assert done.returncode == 1
    (line,) = error_lines(done)
    assert "data/empty" in line
    assert "ingest.source" in line
    assert "Traceback" not in done.stderr


def test_a_missing_photo_folder_is_one_line_too(clone: Callable[..., Path]) -> None:
    project = clone("missing", {"ingest.source": "data/nowhere"}, [])
    done = run(project)
    assert done.returncode == 2
    (line,) = error_lines(done)
    assert "ingest.source = data/nowhere" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_with_nothing_left_after_selection_the_counts_and_the_rule_are_named(
    clone: Callable[..., Path],
) -> None:
    """Three small photographs, one unreadable and one empty file: five rows, five reasons."""
    small = ["ng-32703.jpg", "spacex-81773.jpg", "galen-crout-175291.jpg"]
    project = clone("nothing", {}, small)
    (project / "data" / "sample" / "broken.jpg").write_bytes(b"\xff\xd8 no picture at all")
    (project / "data" / "sample" / "zero.png").touch()
    done = run(project)
    assert done.returncode == 1
    (line,) = error_lines(done)
    assert "resolution" in line
    assert "select" in line
    # What was computed is kept: the bad files are rows with a reason, not a crash.
    rows = pandas.read_parquet(project / "data" / "ingest" / "manifest.parquet")
    assert len(rows) == 5
    integrity = {Path(r["uri"]).name: r["integrity"] for r in rows.to_dict("records")}
    assert integrity["broken.jpg"] != "ok"
    assert integrity["zero.png"] != "ok"
    signals = pandas.read_parquet(project / "data" / "signals" / "signals.parquet")
    assert len(signals) == 3  # only what can be decoded is measured


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root")
def test_a_read_only_data_folder_is_refused_before_anything_runs(
    clone: Callable[..., Path], tmp_path: Path
) -> None:
    project = clone("read-only", {}, [])
    command = ["ultraflux", "run"]
    if os.geteuid() == 0:
        # Root may write anywhere, so the run happens as nobody, who owns nothing here.
        for folder in (project, *project.parents):
            if folder != Path(folder.anchor):
                folder.chmod(folder.stat().st_mode | 0o055)
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        probe = subprocess.run([*nobody, *command, "--help"], capture_output=True, cwd=project)
        if probe.returncode != 0:
            pytest.skip("the environment is not readable for another user")
        command = [*nobody, *command]
    else:
        (project / "data").chmod(0o555)
    done = subprocess.run(
        command,
        cwd=project,
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    (line,) = error_lines(done)
    assert "cannot be written" in line
    assert str(project / "data") in line
