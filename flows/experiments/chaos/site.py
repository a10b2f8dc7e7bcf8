"""What is disturbed: clones of a commit in a folder of their own, and the commands typed in them.

`origin` is the commit with the settings of the drill; `undisturbed` runs once, alone, and its
hashes are the right ones; `disturbed` runs under faults; `worker` is the clone of the workers of
`--engine pools`; `remote` is the DVC remote that these two share; `tmp` is TMPDIR of all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from components.telemetry.last_words import last_words
from flows.records.programs import git
from flows.remote.data_remote import PATIENCE, REMOTE
from flows.tracking.tier import services_dir
from flows.versioning import graph as versioning
from flows.versioning.lock_hashes import out_hashes

MARK = "ULTRAFLUX_CHAOS"
"""Stands in the environment of everything that a drill starts; nothing else is ever touched."""
SMALL = "conf/small.yaml"
_FOREIGN = ("PREFECT_", "MLFLOW_", "ULTRAFLUX_", "DVC_")
"""Settings of this shell that would lead out of the drill."""


class ChaosRefused(RuntimeError):
    """The drill cannot start; one line."""


_git = partial(git, failure=ChaosRefused)


@dataclass(frozen=True)
class Site:
    """The folder of a drill."""

    folder: Path
    token: str
    """Value of `MARK`."""
    shared: dict[str, str] = field(default_factory=dict)
    """Variables that name the drill's own servers, once they run."""

    @property
    def undisturbed(self) -> Path:
        """The clone that nobody touches."""
        return self.folder / "undisturbed"

    @property
    def disturbed(self) -> Path:
        """The clone under faults."""
        return self.folder / "disturbed"

    @property
    def worker(self) -> Path:
        """The clone of the workers."""
        return self.folder / "worker"

    @property
    def remote(self) -> Path:
        """The DVC remote."""
        return self.folder / "remote"

    @property
    def temporary(self) -> Path:
        """TMPDIR."""
        return self.folder / "tmp"

    def environment(self, clone: Path) -> dict[str, str]:
        """That of a command in a clone: its code, the mark, nothing that leads elsewhere."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
        own.pop("PYTHONDONTWRITEBYTECODE", None)
        programs = str(Path(sys.executable).parent)
        return own | {
            MARK: self.token,
            "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONPATH": str(clone),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            "ULTRAFLUX_GPU_LOCKS": str(self.folder / "gpus"),
            REMOTE: str(self.remote),
            PATIENCE: "120",
            **self.shared,
        }

    def run(self, clone: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """A finished command in a clone."""
        return subprocess.run(
            command,
            cwd=clone,
            env=self.environment(clone),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, clone: Path, *command: str) -> str:
        """Standard output of a command that has to work.

        Raises:
            ChaosRefused: it did not; with the last thing that it said.
        """
        done = self.run(clone, *command)
        if done.returncode:
            said = last_error(done.stdout + done.stderr)
            raise ChaosRefused(f"{' '.join(command)} in {clone}: {said}")
        return done.stdout

    def start(
        self, clone: Path, command: Sequence[str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """A command in a clone that goes on beside this process."""
        return subprocess.Popen(
            command,
            cwd=clone,
            env=self.environment(clone),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def last_error(text: str) -> str:
    """The line of an output that says how it ended: the last error, else the last line."""
    return last_words(text, "error:", "FAIL")[:300]


def make_site(root: Path, folder: Path, token: str, settings: Mapping[str, Any] | None) -> Site:
    """Clones of the commit that is checked out at `root`.

    Args:
        root: a project of one's own.
        folder: an empty one.
        token: of the drill.
        settings: values by their paths (`vae.steps`) and the photographs of `SMALL`; None: the
            project as it is.

    Raises:
        ChaosRefused: no Git repository with a commit, or no such setting.
    """
    site = Site(folder, token)
    for made in (site.temporary, site.remote):
        made.mkdir(parents=True)
    origin = folder / "origin"
    _git(folder, "clone", "-q", str(root), str(origin))
    if settings is not None:
        make_small(origin, settings)
    # Results of other settings, and of another machine.
    _git(origin, "rm", "-q", "--ignore-unmatch", "dvc.lock")
    _git(origin, "add", "-A")
    who = ["-c", "user.name=chaos", "-c", "user.email=chaos@localhost"]
    _git(origin, *who, "commit", "-q", "--allow-empty", "-m", "Drill")
    for clone in (site.undisturbed, site.disturbed):
        _git(folder, "clone", "-q", str(origin), str(clone))
    return site


def make_small(clone: Path, settings: Mapping[str, Any]) -> None:
    """Change settings in a clone's params.yaml and keep the photographs of `SMALL` alone.

    Raises:
        ChaosRefused: no such setting.
    """
    from flows.versioning.setting_overrides import read_params

    values = read_params(clone)
    for name, value in settings.items():
        *sections, key = name.split(".")
        section: Any = values
        for one in sections:
            section = section.get(one, {})
        if key not in section:
            raise ChaosRefused(f"{name}: no such setting in {clone / 'params.yaml'}")
        section[key] = value
    text = yaml.safe_dump(values, sort_keys=False)
    (clone / "params.yaml").write_text(text, encoding="utf-8")
    photos = set(small(clone)["photos"])
    sample = clone / "data" / "sample"
    for path in sample.glob("*.jpg"):
        if path.name not in photos:
            path.unlink()
    captions = sample / "captions.jsonl"
    if captions.is_file():
        lines = captions.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if json.loads(line)["file"] in photos)
        captions.write_text(kept, encoding="utf-8")


def small(root: Path) -> dict[str, Any]:
    """Content of `SMALL`.

    Raises:
        ChaosRefused: the project has none.
    """
    path = root / SMALL
    if not path.is_file():
        raise ChaosRefused(f"{path} is missing: give --as-is to disturb the project as it is")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def output_hashes(clone: Path) -> dict[str, str]:
    """DVC hash by output path of every stage in dvc.lock."""
    stages = versioning.read_lock(clone)
    found: dict[str, str] = {}
    for entry in stages.values():
        found |= out_hashes(entry)
    return found


def made_anew(clone: Path) -> None:
    """Forget every result of a clone; servers, their databases and records stay."""
    (clone / "dvc.lock").unlink(missing_ok=True)
    for folder in (clone / ".dvc" / "cache", clone / ".dvc" / "tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    _git(clone, "checkout", "-q", "--", ".")
    _git(clone, "clean", "-q", "-fdx", "data", "baselines")
    kept = {services_dir(clone).name, "records", "logs", "flow-runs", ".gitignore"}
    for path in (clone / "runs").glob("*"):
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".lock":
            path.unlink()
