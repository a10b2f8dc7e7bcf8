"""Where a clone's working trees lie; each keeps records of its own."""

from __future__ import annotations

from pathlib import Path

SUBMITTED = "submitted"
SWEEP = "sweep"
ABLATE = "ablate"
REPRODUCE = "reproduce"
_DEPTHS = {SUBMITTED: 1, SWEEP: 2, ABLATE: 2, REPRODUCE: 1}
"""Names of a tree by its kind: one, or that of a group (a sweep, a design) and its own."""


def tree_place(root: Path, kind: str, *names: str) -> Path:
    """A tree's folder, or with fewer names that of its group."""
    return root.joinpath("runs", kind, *names)


def trees_of(root: Path, kind: str) -> list[Path]:
    """Every folder where a tree of a kind may be, in the order of their names."""
    return sorted((root / "runs" / kind).glob("/".join("*" * _DEPTHS[kind])))


def record_trees(root: Path) -> list[Path]:
    """The clone, and those of its working trees that have records."""
    trees = [tree for kind in _DEPTHS for tree in trees_of(root, kind)]
    return [root, *(tree for tree in trees if (tree / "runs" / "records").is_dir())]
