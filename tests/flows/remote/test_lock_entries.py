"""Entries of dvc.lock between clones: staleness without data, belief by hashes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from flows.remote import lock_entries
from flows.versioning import graph as versioning


def repro(root: Path) -> None:
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)


def test_what_is_stale_is_known_without_the_data(toy: Path) -> None:
    repro(toy)
    graph = versioning.stage_graph(toy)
    shutil.rmtree(toy / "data")
    (toy / "data").mkdir()
    shutil.rmtree(toy / ".dvc" / "cache")
    assert lock_entries.stale_without_data(toy, graph) == {}
    (toy / "params.yaml").write_text("project: {name: toy}\nvalue: 2\n")
    reasons = lock_entries.stale_without_data(toy, graph)
    assert set(reasons) == {"a", "b", "c", "d"}
    assert "params.yaml" in reasons["a"]
    (toy / "params.yaml").write_text("project: {name: toy}\nvalue: 1\n")
    (toy / "source").write_text("more\n")
    reasons = lock_entries.stale_without_data(toy, graph)
    assert reasons["a"] == reasons["c"] == "source (modified)"
    assert reasons["b"] == "after a"
    (toy / "source").write_text("photographs\n")
    lock = versioning.read_lock(toy)
    lock["a"]["outs"][0]["md5"] = "0" * 32
    lock_entries.merge_entries(toy, {"a": lock["a"]})
    reasons = lock_entries.stale_without_data(toy, graph)
    assert reasons["b"] == reasons["c"] == "data/a (modified)"


def test_an_entry_about_another_version_of_an_input_is_not_believed(toy: Path) -> None:
    repro(toy)
    lock = versioning.read_lock(toy)
    assert lock_entries.foreign_inputs(lock["d"], lock) == []
    changed = json.loads(json.dumps(lock))
    changed["b"]["outs"][0]["md5"] = "0" * 32
    assert lock_entries.foreign_inputs(lock["d"], changed) == ["data/b"]
