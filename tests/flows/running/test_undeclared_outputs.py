"""What a stage leaves in its folder: declared in dvc.yaml, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows.running.recorded_stage import _undeclared_outputs
from flows.versioning import graph as versioning


@pytest.fixture(scope="module")
def ingest() -> versioning.StageNode:
    """The stage as dvc.yaml has it."""
    return versioning.stage_node(Path(__file__).resolve().parents[3], "ingest")


def write(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_originals_that_ingest_fetched_are_declared_and_no_outputs(
    ingest: versioning.StageNode, tmp_path: Path
) -> None:
    write(
        tmp_path,
        "data/ingest/manifest.parquet",
        "data/ingest/.gitignore",
        "data/ingest/originals/abc/abcdef.jpg",
        "data/ingest/originals/.partial/half",
    )
    assert _undeclared_outputs(tmp_path, ingest) == []
    # DVC would take minutes over a million files.
    assert "data/ingest/originals" not in ingest.outputs


def test_a_file_that_nothing_declares_is_named(
    ingest: versioning.StageNode, tmp_path: Path
) -> None:
    write(tmp_path, "data/ingest/stray.txt", "data/ingest/originals.txt", "data/ingest/a/b")
    assert _undeclared_outputs(tmp_path, ingest) == [
        "data/ingest/a/b",
        "data/ingest/originals.txt",
        "data/ingest/stray.txt",
    ]


def test_a_folder_that_is_the_output_is_declared_as_a_whole(
    ingest: versioning.StageNode, tmp_path: Path
) -> None:
    whole = replace(ingest, outputs=("data/ingest",))
    write(tmp_path, "data/ingest/deep/file")
    assert _undeclared_outputs(tmp_path, whole) == []


def test_git_and_dvc_look_past_unversioned_folders(root: Path) -> None:
    """Otherwise every worker's clone would have changes that no commit has."""
    for node in versioning.stage_graph(root).values():
        for folder in node.meta.unversioned:
            assert folder.startswith(f"data/{node.name}/")
            for name, line in ((".gitignore", f"{folder}/"), (".dvcignore", f"/{folder}")):
                assert line in (root / name).read_text().splitlines(), f"{folder} in {name}"
