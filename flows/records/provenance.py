"""Where a result came from: commit, package lock, host and interpreter, as MLflow tags."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from components.files.weight_folders import file_digest
from components.settings.yaml_files import read_yaml
from flows.records.programs import git_answer

# Of untracked files: what is neither code nor settings may be large, or a secret.
_KEPT_SUFFIXES = frozenset({".py", ".yaml", ".yml", ".toml", ".j2", ".jsonl"})
_KEPT_FILE_BYTES = 2**20
_KEPT_BYTES = 2**24


def _untracked(root: Path) -> list[str]:
    """Files that are neither in the commit nor ignored, in the order of their names."""
    which = ("--others", "--exclude-standard", "--", ":!dvc.lock")
    listed = git_answer(root, "ls-files", "-z", *which) or ""
    names = sorted(name for name in listed.split("\0") if name)
    return [name for name in names if (root / name).is_file()]


def changes_since_commit(root: Path) -> bytes:
    """Patch from HEAD to the files at hand, without dvc.lock; empty in a clean tree.

    Untracked code and settings that are not ignored are in it as new files, up to 1 MiB each and
    16 MiB together.
    """
    room, kept = _KEPT_BYTES, []
    for name in _untracked(root):
        size = (root / name).stat().st_size
        fits = size <= min(_KEPT_FILE_BYTES, room)
        if fits and Path(name).suffix in _KEPT_SUFFIXES:
            kept.append(name)
            room -= size
    if not kept:
        return _tracked_changes(root)
    # Git shows new files in a diff once an index names them: a copy, so that the user's stays.
    index = root / (git_answer(root, "rev-parse", "--git-path", "index") or "")
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "index"
        if index.is_file():
            shutil.copyfile(index, copied)
        env = os.environ | {"GIT_INDEX_FILE": str(copied)}
        names = os.fsencode("\0".join(kept))
        listed = ["--pathspec-from-file=-", "--pathspec-file-nul"]
        subprocess.run(
            ["git", "--literal-pathspecs", "add", "--intent-to-add", *listed],
            cwd=root,
            env=env,
            input=names,
            capture_output=True,
        )
        return _tracked_changes(root, env)


def _tracked_changes(root: Path, env: dict[str, str] | None = None) -> bytes:
    command = ["git", "diff", "--binary", "HEAD", "--", ":!dvc.lock"]
    return subprocess.run(command, cwd=root, env=env, capture_output=True).stdout


def _source(root: Path) -> Path | None:
    """`ingest.source`; None where the settings do not say."""
    try:
        values = read_yaml(root / "params.yaml")
        return root / values["ingest"]["source"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _changes(root: Path) -> bytes:
    """Tracked changes, then name and content of every untracked file; of large ones the size.

    Photographs are data: the table of the source says which they were (data/source).
    """
    lines = []
    source = _source(root)
    for name in _untracked(root):
        is_data = source is not None and (root / name).is_relative_to(source)
        # Otherwise every pipeline over an untracked folder would hash all of its photographs here.
        if is_data and Path(name).suffix not in _KEPT_SUFFIXES:
            continue
        size = (root / name).stat().st_size
        content = file_digest(root / name) if size <= _KEPT_FILE_BYTES else f"{size} bytes"
        lines.append(f"{name} {content}\n")
    return _tracked_changes(root) + os.fsencode("".join(lines))


def changes_digest(root: Path) -> str:
    """sha256 of what differs from the commit (tag `git.diff_sha256`); empty in a clean tree."""
    # dvc.lock changes with every run, so it does not count as a code change.
    if not git_answer(root, "status", "--porcelain", "--", ":!dvc.lock"):
        return ""
    changes = _changes(root)
    return hashlib.sha256(changes).hexdigest() if changes else ""


def provenance_tags(root: Path) -> dict[str, str]:
    """Tags that say which code, packages and machine made a run; unknown ones are left out."""
    tags = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    commit = git_answer(root, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        changes = changes_digest(root)
        tags["git.dirty"] = str(bool(changes)).lower()
        if changes:
            tags["git.diff_sha256"] = changes
    for name, file in {
        "lock.sha256": "requirements.lock",
        "settings.sha256": "params.yaml",
    }.items():
        path = root / file
        if path.is_file():
            tags[name] = file_digest(path)
    return tags


def locked_packages(text: str) -> dict[str, str]:
    """Version by package of a requirements lock, as far as it is for this interpreter.

    The lock is universal: a package may stand in it twice, each time with a marker.
    """
    from packaging.requirements import Requirement

    found = {}
    for line in text.splitlines():
        if "==" not in line or line.startswith((" ", "#")):
            continue
        requirement = Requirement(line.removesuffix("\\").strip())
        if requirement.marker is None or requirement.marker.evaluate():
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found
