"""Originals through DVC remotes: a local folder, and S3 as a real server speaks it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from components.corpus.manifest import SCHEMA, write_table
from components.images.original_lookup import OriginalLookup

DVC = [sys.executable, "-m", "dvc"]
MANIFEST = "data/ingest/manifest.parquet"


def dvc(root: Path, *arguments: str) -> str:
    done = subprocess.run([*DVC, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pack(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "corpus", "pack", "--manifest", MANIFEST]
    return subprocess.run(
        [*command, *arguments], cwd=root, capture_output=True, text=True, check=False
    )


def photographs(root: Path, numbers: range) -> dict[str, bytes]:
    """Files and the manifest that names them."""
    folder = root / "data" / "photographs"
    folder.mkdir(parents=True, exist_ok=True)
    by_id, rows = {}, []
    for number in numbers:
        data = b"\xff\xd8\xff" + hashlib.sha256(bytes([number])).digest() * 300
        (folder / f"{number}.jpg").write_bytes(data)
        image_id = hashlib.sha256(data).hexdigest()
        by_id[image_id] = data
        rows.append(
            {"image_id": image_id, "uri": f"data/photographs/{number}.jpg", "integrity": "ok"}
        )
    (root / MANIFEST).parent.mkdir(exist_ok=True)
    write_table(pd.DataFrame(rows).reindex(columns=SCHEMA.names), root / MANIFEST)
    return by_id


def forget(root: Path) -> None:
    """Another machine: no photographs, no store, no cache."""
    for name in ("data/photographs", "data/images", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(root / name)


def read_all(root: Path) -> dict[str, bytes]:
    from components.corpus.manifest import read_table

    found = OriginalLookup(root).find_all(read_table(root / MANIFEST))
    return {original.image_id: original.read_bytes() for original in found}


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "data/images").iterdir()}


@pytest.mark.slow
def test_a_local_remote_brings_back_every_byte_and_version(
    clone: Callable[..., Path], tmp_path: Path
) -> None:
    root = clone("local-remote", {}, [])
    first = photographs(root, range(40))
    done = pack(root)
    assert done.returncode == 0, done.stderr
    assert "40 originals" in done.stdout
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "add", "data/images.dvc"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-qm", "images"], cwd=root, check=True)
    dvc(root, "remote", "add", "-d", "team", str(tmp_path / "remote"))
    dvc(root, "push", "data/images")

    second = photographs(root, range(41))
    old = contents(root)
    before = {file for file in (tmp_path / "remote").rglob("*") if file.is_file()}
    assert "1 of them new" in pack(root).stdout
    dvc(root, "push", "data/images")
    new = contents(root)
    added = {file for file in (tmp_path / "remote").rglob("*") if file.is_file()} - before
    # One shard, the index and the list of files.
    assert len(added) == 3
    forget(root)
    dvc(root, "pull", "data/images")
    assert contents(root) == new
    assert read_all(root) == second
    # Linked from the cache: packing again must not write to what the cache holds.
    photographs(root, range(40))
    assert pack(root).returncode == 0
    assert contents(root) == old
    subprocess.run([*git, "checkout", "-q", "data/images.dvc"], cwd=root, check=True)
    assert dvc(root, "status", "data/images.dvc").strip().endswith("up to date.")
    assert {key: second[key] for key in first} == read_all(root)


def test_an_original_that_cannot_be_packed_is_one_error_line(clone: Callable[..., Path]) -> None:
    root = clone("unpackable", {}, [])
    photographs(root, range(4))
    (root / "data/photographs/2.jpg").unlink()
    done = pack(root, "--no-track")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 1 originals could not be packed, the first is 2.jpg")
    assert len(done.stderr.splitlines()) == 1
    assert "3 originals" in done.stdout


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The S3 server, with its credentials in this process's environment."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return s3_server


def objects(url: str) -> dict[str, int]:
    import boto3

    pages = boto3.client("s3", endpoint_url=url).get_paginator("list_objects_v2")
    return {
        item["Key"]: item["Size"]
        for page in pages.paginate(Bucket="corpus")
        for item in page.get("Contents", [])
    }


@pytest.mark.slow
def test_after_one_more_photograph_s3_receives_one_shard(
    clone: Callable[..., Path], s3: Any
) -> None:
    root = clone("s3-remote", {}, [])
    photographs(root, range(40))
    assert pack(root).returncode == 0
    dvc(root, "remote", "add", "-d", "team", "s3://corpus/images")
    dvc(root, "remote", "modify", "team", "endpointurl", s3.url)
    dvc(root, "push", "data/images")
    before = objects(s3.url)
    assert len(before) == len(contents(root)) + 1

    expected = photographs(root, range(41))
    assert pack(root).returncode == 0
    # What the server is asked to store, by its own log.
    requests = len(s3.log.read_text().splitlines())
    dvc(root, "push", "data/images")
    sent = [line for line in s3.log.read_text().splitlines()[requests:] if '"PUT ' in line]
    added = objects(s3.url).keys() - before.keys()
    assert len(added) == len(sent) == 3
    stored = contents(root)
    forget(root)
    dvc(root, "pull", "data/images")
    assert contents(root) == stored
    assert read_all(root) == expected
