"""Where a result came from: commit, package lock, host and interpreter, as MLflow tags."""

from __future__ import annotations

import hashlib
import platform
import socket
import subprocess
from pathlib import Path


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


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
    for name, file in {
        "lock.sha256": "requirements.lock",
        "settings.sha256": "params.yaml",
    }.items():
        path = root / file
        if path.is_file():
            tags[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return tags
