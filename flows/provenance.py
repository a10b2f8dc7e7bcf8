"""Where a result came from: commit, package lock, host and interpreter, as MLflow tags."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
from pathlib import Path

from components.models.weights import file_digest


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def changes_since_commit(root: Path) -> bytes:
    """`git diff HEAD` of tracked files without dvc.lock; empty in a clean tree or outside git."""
    command = ["git", "diff", "--binary", "HEAD", "--", ":!dvc.lock"]
    return subprocess.run(command, cwd=root, capture_output=True).stdout


def _changes(root: Path) -> bytes:
    """Tracked changes, then name and content hash of every untracked file that is not ignored."""
    others = (_git(root, "ls-files", "--others", "--exclude-standard", "--", ":!dvc.lock")) or ""
    names = [name for name in others.splitlines() if (root / name).is_file()]
    lines = [f"{name} {file_digest(root / name)}\n" for name in names]
    return changes_since_commit(root) + "".join(lines).encode()


def provenance_tags(root: Path) -> dict[str, str]:
    """Tags that say which code, packages and machine made a run; unknown ones are left out."""
    tags = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    commit = _git(root, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        # dvc.lock changes with every run, so it does not count as a code change.
        changes = _git(root, "status", "--porcelain", "--", ":!dvc.lock")
        tags["git.dirty"] = str(bool(changes)).lower()
        if changes:
            tags["git.diff_sha256"] = hashlib.sha256(_changes(root)).hexdigest()
    for name, file in {
        "lock.sha256": "requirements.lock",
        "settings.sha256": "params.yaml",
    }.items():
        path = root / file
        if path.is_file():
            tags[name] = file_digest(path)
    return tags
