"""Commands in environments that are not the developer's: each works, or says one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
TIMEOUT_S = 600
NOBODY = 65534
DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def project(clone: Callable[..., Path]) -> Path:
    """A small clone that `run --until source` brings up to date in seconds."""
    return clone("project", {})


def ultraflux(
    folder: Path, *arguments: str, env: dict[str, str | None] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A command in a folder, with variables changed (None: taken away)."""
    changed = os.environ | {"PYTHONPATH": str(folder)} | (env or {})
    return subprocess.run(
        ["ultraflux", *arguments],
        cwd=folder,
        env={name: value for name, value in changed.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        **options,
    )


def is_one_line(done: subprocess.CompletedProcess[str], words: str) -> bool:
    """Whether a command ended with an error of one line that holds `words`."""
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    said = "Traceback" not in done.stderr and len(errors) == 1 and words in errors[0]
    return done.returncode not in {0, None} and said


WORKS: dict[str, dict[str, str | None]] = {
    "an http proxy": {"http_proxy": DEAD, "HTTP_PROXY": DEAD, "no_proxy": None, "NO_PROXY": None},
    "a proxy for everything": {"ALL_PROXY": DEAD, "all_proxy": DEAD, "no_proxy": "example.com"},
    "a foreign Prefect profile": {"PREFECT_PROFILE": "work"},
    "no home": {"HOME": None},
    "a home that is not there": {"HOME": "/nonexistent/home"},
    "forty columns": {"COLUMNS": "40"},
    "no terminal type": {"TERM": "dumb"},
    "no locale": {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0"},
    "another time zone": {"TZ": "Pacific/Kiritimati"},
    "warnings shown": {"PYTHONWARNINGS": "default"},
    "no bytecode": {"PYTHONDONTWRITEBYTECODE": "1"},
}


@pytest.mark.parametrize("quirk", WORKS)
def test_a_run_works_with(project: Path, quirk: str) -> None:
    done = ultraflux(project, "run", "--until", "source", env=WORKS[quirk])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pipeline up to date" in done.stdout


def test_a_proxy_does_not_stand_before_the_projects_own_server(project: Path) -> None:
    env = WORKS["an http proxy"]
    done = ultraflux(project, "run", "--engine", "prefect", "--until", "source", env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_small_places_to_write_in_are_enough(project: Path, tmp_path: Path) -> None:
    small = tmp_path / "tmp"
    small.mkdir()
    env = {"TMPDIR": str(small)}
    done = ultraflux(project, "run", "--until", "source", env=env, umask=0o077)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(small.iterdir()) == []


@pytest.mark.parametrize(
    ("env", "arguments", "words"),
    [
        ({"PREFECT_API_URL": f"{DEAD}/api"}, ["run", "--engine", "prefect"], "no Prefect server"),
        ({"PREFECT_API_URL": f"{DEAD}/api"}, ["run", "--engine", "pools"], "no Prefect server"),
        ({"PREFECT_API_URL": f"{DEAD}/api"}, ["submit"], "no Prefect server"),
        ({"PREFECT_API_URL": f"{DEAD}/api"}, ["deploy"], "no Prefect server"),
        ({"MLFLOW_TRACKING_URI": DEAD}, ["sync"], "did not take the records"),
        ({"ULTRAFLUX_PROJECT": "a/b"}, ["submit"], "no Prefect server"),
    ],
)
def test_a_server_that_is_away_is_one_line(
    project: Path, env: dict[str, str | None], arguments: list[str], words: str
) -> None:
    done = ultraflux(project, *arguments, env=env)
    assert is_one_line(done, words), done.stderr


def copied(project: Path, target: Path) -> Path:
    """The project's committed files alone, as an archive has them."""
    target.mkdir()
    packed = subprocess.run(
        ["git", "archive", "HEAD"], cwd=project, check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x"], cwd=target, input=packed, check=True)
    return target


def test_an_archive_without_git_works_and_says_so_once(project: Path, tmp_path: Path) -> None:
    folder = copied(project, tmp_path / "unpacked")
    first = ultraflux(folder, "run", "--until", "source")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "is in no git repository: DVC works without one" in first.stderr
    again = ultraflux(folder, "run", "--until", "source")
    assert again.returncode == 0
    assert "no git repository" not in again.stderr
    listed = ultraflux(folder, "stage", "list")
    assert listed.returncode == 0


@pytest.mark.parametrize("kind", ["worktree", "shallow", "detached", "moved"])
def test_every_kind_of_clone_works(project: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "worktree":
        command = ["git", "worktree", "add", "-q", "--detach", str(folder), "HEAD"]
        subprocess.run(command, cwd=project, check=True)
    else:
        depth = ["--depth", "1"] if kind == "shallow" else []
        subprocess.run(["git", "clone", "-q", *depth, f"file://{project}", folder], check=True)
    if kind == "detached":
        subprocess.run(["git", "checkout", "-q", "--detach"], cwd=folder, check=True)
    if kind == "moved":
        assert ultraflux(folder, "run", "--until", "source").returncode == 0
        folder = folder.rename(tmp_path / "elsewhere")
    done = ultraflux(folder, "run", "--until", "source")
    assert done.returncode == 0, done.stdout + done.stderr


def test_outside_of_a_clone_it_says_where_to_go(tmp_path: Path) -> None:
    done = ultraflux(tmp_path, "run")
    assert is_one_line(done, "change into a clone"), done.stderr


def test_foreign_dvc_settings_do_not_reach_the_pipeline(project: Path, tmp_path: Path) -> None:
    config = tmp_path / "config" / "dvc"
    config.mkdir(parents=True)
    (config / "config").write_text("[core]\n    remote = theirs\n    autostage = true\n")
    env = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    done = ultraflux(project, "run", "--until", "source", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    staged = subprocess.run(
        ["git", "diff", "--cached", "--name-only"], cwd=project, capture_output=True, text=True
    ).stdout
    assert staged == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_clone_of_somebody_else_is_one_line(project: Path, tmp_path: Path) -> None:
    folder = copied(project, Path(shutil.os.path.realpath(tmp_path)) / "theirs")
    for path in (tmp_path, *tmp_path.parents):
        if str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o005)
    done = ultraflux(
        folder, "run", env={"HOME": "/nonexistent"}, user=NOBODY, group=NOBODY, extra_groups=[]
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert re.search(r"error: .*cannot be written", done.stderr), done.stderr
