"""Commands in environments that are not the developer's: each works, or says one line."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flows.services.servers import free_port

pytestmark = pytest.mark.slow
TIMEOUT_S = 600
NOBODY = 65534
DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def project(clone: Callable[..., Path]) -> Path:
    """A small clone that `run --until source` brings up to date in seconds."""
    return clone("project", {})


def ultraflux(
    folder: Path,
    *arguments: str,
    env: dict[str, str | None] | None = None,
    before: Sequence[str] = (),
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """A command in a folder, with variables changed (None: taken away)."""
    changed = os.environ | {"PYTHONPATH": str(folder)} | (env or {})
    # By its path: what PATH holds is one of the things that are changed.
    return subprocess.run(
        [*before, str(Path(sys.executable).parent / "ultraflux"), *arguments],
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
    "warnings that end programs": {"PYTHONWARNINGS": "error"},
    "no bytecode": {"PYTHONDONTWRITEBYTECODE": "1"},
    "optimised Python": {"PYTHONOPTIMIZE": "1", "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "7"},
    "a bare PATH": {"PATH": "/usr/bin:/bin"},
    "forced colours": {"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "NO_COLOR": None},
    "another language": {"LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de:fr", "LANG": "de_DE.UTF-8"},
    "a foreign MLflow experiment": {
        "MLFLOW_EXPERIMENT_NAME": "theirs",
        "MLFLOW_RUN_ID": "0" * 32,
        "MLFLOW_REGISTRY_URI": DEAD,
    },
    "a foreign Prefect home": {"PREFECT_HOME": "/nonexistent/prefect", "PREFECT_DEBUG_MODE": "1"},
    "caches that cannot be made": {"XDG_CACHE_HOME": "/proc/cache", "HF_HOME": "/proc/hf"},
    "a scheduler's variables": {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "10.0.0.1",
        "SLURM_PROCID": "3",
        "OMP_NUM_THREADS": "64",
    },
    "a hook of another repository": {"GIT_DIR": "/nonexistent/.git", "GIT_INDEX_FILE": "x"},
    "certificates that are not there": {
        "SSL_CERT_FILE": "/nonexistent/ca.pem",
        "REQUESTS_CA_BUNDLE": "/nonexistent/ca.pem",
        "CURL_CA_BUNDLE": "/nonexistent/ca.pem",
    },
    "a plotting back end with windows": {"MPLBACKEND": "TkAgg", "MPLCONFIGDIR": "/proc/mpl"},
    "thread counts of another machine": {"OMP_NUM_THREADS": "4,2", "MKL_NUM_THREADS": "all"},
    "no size of a terminal": {"COLUMNS": "0", "LINES": "none"},
    "temporary files nowhere": {"TMPDIR": "/nonexistent/tmp"},
    "an encoding of another age": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    "a Prefect log level that is none": {"PREFECT_LOGGING_LEVEL": "loud"},
    "a Prefect server of other work": {
        "PREFECT_SERVER_API_PORT": "1",
        "PREFECT_API_KEY": "theirs",
        "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite:////nonexistent/theirs.db",
    },
    "an MLflow login of other work": {
        "MLFLOW_TRACKING_USERNAME": "they",
        "MLFLOW_TRACKING_TOKEN": "theirs",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "maybe",
    },
    "switches of torch and numba": {
        "TORCH_LOGS": "loud",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "theirs",
        "CUDA_VISIBLE_DEVICES": "7",
        "NUMBA_CACHE_DIR": "/proc/numba",
        "NUMBA_NUM_THREADS": "99",
    },
    "an environment of another project": {
        "VIRTUAL_ENV": "/nonexistent/venv",
        "CONDA_PREFIX": "/nonexistent/conda",
        "PYTHONUSERBASE": "/nonexistent/base",
    },
    "a foreign DVC environment": {"DVC_GLOBAL_CONFIG_DIR": "/proc/dvc", "DVC_EXP_NAME": None},
}
NAMES = ("with a space", "größer", "100% sure", "a#b?c", "it's", "-dash", "d" * 120)
"""Folders that people have."""
HOSTILE_GIT = """\
[color]
    ui = always
[diff]
    noprefix = true
    external = /bin/false
[status]
    short = true
[log]
    showSignature = true
[commit]
    gpgsign = true
[core]
    autocrlf = true
    hooksPath = /nonexistent
    pager = /bin/false
"""


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
        # A history is cut off where Git packs it: by an address.
        source = ["--depth", "1", f"file://{project}"] if kind == "shallow" else [str(project)]
        subprocess.run(["git", "clone", "-q", *source, folder], check=True)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_clone_may_be_called(project: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    subprocess.run(["git", "clone", "-q", str(project), f"./{name}"], cwd=tmp_path, check=True)
    done = ultraflux(folder, "run", "--until", "source")
    assert done.returncode == 0, done.stdout + done.stderr
    # The records have reached the store of this clone, whatever its address had to look like.
    synced = ultraflux(folder, "sync")
    assert synced.stdout.strip() == "MLflow has everything", synced.stderr
    assert (folder / "runs" / "services" / "mlflow.db").stat().st_size > 0
    assert list(tmp_path.iterdir()) == [folder]


def test_servers_keep_their_databases_in_a_clone_of_any_name(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "100%25 a#b?c"
    subprocess.run(["git", "clone", "-q", str(project), folder], check=True)
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    try:
        done = ultraflux(folder, "up", *ports)
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        ultraflux(folder, "down")
    services = folder / "runs" / "services"
    for name in ("mlflow.db", "mlflow-users.db", "prefect/prefect.db"):
        assert (services / name).stat().st_size > 0
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_to_a_clone_and_a_folder_in_it_are_the_clone(project: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(project)
    for place in (link, project / "flows" / "stages"):
        done = ultraflux(place, "run", "--until", "source", env={"PYTHONPATH": str(project)})
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["submodule", "partial", "sparse"])
def test_clones_that_are_not_whole_repositories_work(
    project: Path, tmp_path: Path, kind: str
) -> None:
    allowed = ["-c", "protocol.file.allow=always"]
    if kind == "submodule":
        above = tmp_path / "above"
        subprocess.run(["git", "init", "-q", str(above)], check=True)
        command = ["git", *allowed, "submodule", "add", "-q", f"file://{project}", "inner"]
        subprocess.run(command, cwd=above, check=True)
        folder = above / "inner"
    else:
        folder = tmp_path / kind
        options = ["--filter=blob:none"] if kind == "partial" else ["--sparse"]
        subprocess.run(
            ["git", *allowed, "clone", "-q", *options, f"file://{project}", folder], check=True
        )
    if kind == "sparse":
        wanted = ["flows", "components", "conf", "data", "mlflow", "benchmarks", ".dvc"]
        subprocess.run(["git", "sparse-checkout", "set", *wanted], cwd=folder, check=True)
    done = ultraflux(folder, "run", "--until", "source")
    assert done.returncode == 0, done.stdout + done.stderr


def test_settings_of_git_that_change_its_answers_change_nothing(
    project: Path, tmp_path: Path
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(HOSTILE_GIT)
    done = ultraflux(project, "run", "--until", "source", env={"GIT_CONFIG_GLOBAL": str(config)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("form", ["module", "package"])
def test_packages_of_our_names_on_the_path_are_not_ours(
    project: Path, tmp_path: Path, form: str
) -> None:
    for name in ("components", "mlflow/store", "data"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    if form == "module":
        (tmp_path / "components.py").write_text("raise RuntimeError('another project')\n")
        (tmp_path / "components").rmdir()
    else:
        for part in ("files", "models", "corpus", "settings", "."):
            (tmp_path / "components" / part).mkdir(exist_ok=True)
            (tmp_path / "components" / part / "__init__.py").write_text("x = 1\n")
    path = f"{tmp_path}:{project}"
    done = ultraflux(project, "run", "--until", "source", env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr


def test_few_open_files_are_enough(project: Path) -> None:
    before = ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"']
    done = ultraflux(project, "run", "--until", "source", before=before)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_input_at_all_is_enough(project: Path) -> None:
    before = ["bash", "-c", 'exec "$0" "$@" <&-']
    done = ultraflux(project, "run", "--until", "source", before=before)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_narrow_terminal_shows_every_stage(project: Path) -> None:
    """A real terminal of 40 columns, as a program sees it."""
    seen = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        seen.extend(data)
        # Nothing would mean the end: the terminal would close, and the run hear of it.
        return data

    program = str(Path(sys.executable).parent / "ultraflux")
    code = f"cd {project} && stty cols 40 && exec {program} run --until source"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(project))
        patch.setenv("TERM", "xterm")
        patch.delenv("COLUMNS", raising=False)
        status = pty.spawn(["bash", "-c", code], read)
    assert status == 0, seen.decode(errors="replace")[-2000:]
    assert b"Pipeline up to date" in seen


def _read_only(place: Path) -> list[str]:
    """Words before a command that then sees a folder as a mount that nobody can write to."""
    script = f'mount --bind "{place}" "{place}" && mount -o remount,ro,bind "{place}"'
    return ["unshare", "--mount", "bash", "-c", f'{script} && exec "$0" "$@"']


def _may_mount(tmp_path: Path) -> bool:
    return subprocess.run([*_read_only(tmp_path), "true"], capture_output=True).returncode == 0


def test_a_home_that_cannot_be_written_is_enough(project: Path, tmp_path: Path) -> None:
    if not _may_mount(tmp_path):
        pytest.skip("nothing can be mounted here")
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "XDG_CONFIG_HOME": None, "XDG_CACHE_HOME": None}
    done = ultraflux(project, "run", "--until", "source", env=env, before=_read_only(home))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_clone_that_cannot_be_written_is_one_line(project: Path, tmp_path: Path) -> None:
    if not _may_mount(tmp_path):
        pytest.skip("nothing can be mounted here")
    folder = copied(project, tmp_path / "theirs")
    done = ultraflux(folder, "run", before=_read_only(folder))
    assert is_one_line(done, "cannot be written"), done.stderr


def _others_run_this_python() -> bool:
    """Whether another account may start what these tests start."""
    if os.geteuid() != 0:
        return False
    program = [str(Path(sys.executable).resolve()), "-c", ""]
    try:
        return not subprocess.run(program, user=NOBODY, group=NOBODY, extra_groups=[]).returncode
    except PermissionError:
        return False


@pytest.mark.skipif(not _others_run_this_python(), reason="no other account can run this Python")
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
