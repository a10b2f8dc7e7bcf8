"""Working trees of one clone: another commit or other settings, over one DVC cache.

A tree is a detached Git worktree with a `params.yaml` of its own. Stages that trees share come
from DVC's run cache. A tree that exists already is brought to the present commit and used again, so
what was interrupted there is resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from components.corpus.listing.source_table import KNOWN_FILES
from components.files.whole_files import write_text
from flows.records import programs
from flows.records.records import RUN_TAGS
from flows.tracking.uploader import tracking_uri
from flows.versioning import graph as versioning
from flows.versioning.profiles import settings_text

_ORIGINALS = Path("data/ingest/originals")
"""Downloaded photographs; DVC versions them as shards only."""


class TreeRefused(RuntimeError):
    """A working tree cannot be made; one line."""


git = partial(programs.git, failure=TreeRefused)


def add_tree(root: Path, tree: Path, commit: str) -> None:
    """Make a worktree at `commit`.

    Raises:
        TreeRefused: Git refuses, such as where there is a folder with files already.
    """
    tree.parent.mkdir(parents=True, exist_ok=True)
    # Forced: one whose folder somebody deleted is still on Git's list, and its place would be
    # refused. Not `prune`: a person's own tree may be on a disk that is not there now.
    git(root, "worktree", "add", "-q", "--force", "--detach", str(tree), commit)


def share(root: Path, tree: Path, source: str | None) -> None:
    """Give a tree what Git does not carry: DVC's cache and remotes, weights, photographs, scores.

    Args:
        root: the clone.
        tree: the worktree.
        source: `ingest.source`; a link where Git and DVC do not have it.
    """
    from dvc.config import Config

    # config.local is not in Git: remotes and their passwords would be missing in the tree.
    local = Config(str(root / ".dvc")).load_one("local")
    with Config(str(tree / ".dvc")).edit("local") as values:
        values.update(local)
        # The folder that holds files/md5 and the run cache.
        values["cache"]["dir"] = str(versioning.cache_folder(root).parents[1])
    for folder in (Path("weights"), Path("data/scores")):
        _link_children(root / folder, tree / folder)
    if source and not (tree / source).exists() and not (tree / f"{source}.dvc").is_file():
        _link(root / source, tree / source)
    # What was read of photographs that a tree links to is not read again.
    _link(root / KNOWN_FILES, tree / KNOWN_FILES)
    if (root / _ORIGINALS).is_dir() and not (tree / _ORIGINALS).exists():
        # Links of single files: `ingest` removes what a corpus no longer names.
        shutil.copytree(root / _ORIGINALS, tree / _ORIGINALS, copy_function=_link_or_copy)


def _link_children(folder: Path, into: Path) -> None:
    """`.gitignore` names a folder `weights/`: a link in its place would be a change."""
    if folder.is_dir():
        into.mkdir(parents=True, exist_ok=True)
        for child in folder.iterdir():
            _link(child, into / child.name)


def _link(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def settings_tree(root: Path, tree: Path, values: Mapping[str, Any]) -> Path:
    """Working tree at `tree`, at the present commit, with `values` as its settings.

    Args:
        root: the clone.
        tree: folder of the tree, made where it does not exist.
        values: all of its params.yaml.

    Returns:
        `tree`.

    Raises:
        TreeRefused: tracked files other than params.yaml and dvc.lock have uncommitted changes,
            so the tree would not run the code at hand; or Git refuses.
    """
    changed = {line[3:] for line in git(root, "status", "--porcelain", "-uno").splitlines()}
    if foreign := sorted(changed - {"params.yaml", "dvc.lock"}):
        raise TreeRefused(
            f"{foreign[0]} has uncommitted changes, which a working tree would not see; "
            "commit them first"
        )
    commit = git(root, "rev-parse", "HEAD")
    if tree.is_dir():
        # Its own dvc.lock stays: what ran there needs no second look.
        git(tree, "checkout", "-q", "--", "params.yaml")
        git(tree, "checkout", "-q", "--detach", commit)
    else:
        add_tree(root, tree, commit)
    write_text(tree / "params.yaml", settings_text(values))
    share(root, tree, values.get("ingest", {}).get("source"))
    return tree


def tree_environment(
    tree: Path, *, record_in: Path | None = None, tags: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Environment for programs that run in a tree.

    Args:
        tree: its code comes before an editable installation's.
        record_in: a clone whose MLflow store gets the tree's runs; None: the tree's own.
        tags: for the tree's pipeline runs.
    """
    env = os.environ | {"PYTHONPATH": str(tree)}
    if record_in is not None:
        env["MLFLOW_TRACKING_URI"] = tracking_uri(record_in)
    if tags:
        env[RUN_TAGS] = json.dumps(tags)
    return env
