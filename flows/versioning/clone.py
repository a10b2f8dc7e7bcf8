"""A clone of the project as one object that travels: its root, and what DVC says of it.

A command makes one `Clone` and passes it on. Reading dvc.yaml takes DVC longest, so questions that
belong together are asked inside one `with clone.opened():`, which reads it once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.versioning import graph as versioning
from flows.versioning.graph import StageNode
from flows.versioning.parameters import stage_parameters


@dataclass(frozen=True)
class Clone:
    """A folder with dvc.yaml, params.yaml and a git repository."""

    root: Path

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """One unit of work over one opening of DVC's `Repo`; other threads wait for its end.

        The files are those of its beginning, so a unit holds questions only: it ends before a stage
        is run, before dvc.lock, dvc.yaml or DVC's configuration is written, and before anything
        that takes long. A question outside any unit reads the files as they are then.
        """
        with versioning.open_repo(self.root) as repo:
            yield repo

    def graph(self, until: str | None = None) -> dict[str, StageNode]:
        """Stages in order, up to one of them or all.

        Raises:
            GraphError: see `flows.versioning.graph.stages_until`.
        """
        return versioning.stages_until(self.root, until)

    def stage(self, name: str) -> StageNode:
        """One stage without its place in the graph.

        Raises:
            GraphError: no such stage, or it has no valid `meta`.
        """
        return versioning.stage_node(self.root, name)

    def stale(self, graph: Mapping[str, StageNode]) -> dict[str, str]:
        """Those stages of a graph that have to be looked at again, with reasons."""
        return versioning.stale_stages(self.root, dict(graph))

    def identity(self, name: str) -> tuple[str, dict[str, str]]:
        """A stage's key, and the hashes of its dependencies that are in it.

        Raises:
            GraphError: a dependency is not there.
        """
        return versioning.stage_identity(self.root, name)

    def has_cached_result(self, name: str) -> bool:
        """Whether `dvc repro` would restore a stage from the cache."""
        return versioning.has_cached_result(self.root, name)

    def parameters(self, name: str) -> dict[str, Any]:
        """The settings that dvc.yaml declares for a stage, by dotted name."""
        return stage_parameters(self.root, name)

    def lock(self) -> dict[str, Any]:
        """`stages` of dvc.lock as it is now, empty before the first run."""
        return versioning.read_lock(self.root)
