"""DVC as the one definition of the graph."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flows.versioning import graph as versioning
from flows.versioning.profiles import compose


def repro(root: Path) -> None:
    subprocess.run(["dvc", "repro", "-q"], cwd=root, check=True)


def test_the_graph_comes_in_topological_order_with_its_meta(toy: Path) -> None:
    graph = versioning.stage_graph(toy)
    assert list(graph) == ["a", "b", "c", "d"]
    assert graph["d"].upstream == ("b", "c")
    assert graph["a"].outputs == ("data/a",)
    assert graph["b"].meta.retries == 1


def test_a_stage_without_meta_is_one_clear_error(toy: Path) -> None:
    text = (toy / "dvc.yaml").read_text().replace("pool: cpu", "pool: quantum", 1)
    (toy / "dvc.yaml").write_text(text)
    with pytest.raises(versioning.GraphError, match=r"stages\.a\.meta\.pool"):
        versioning.stage_graph(toy)


def test_stale_stages_carry_reasons_and_pull_in_what_is_below(toy: Path) -> None:
    graph = versioning.stage_graph(toy)
    assert set(versioning.stale_stages(toy, graph)) == {"a", "b", "c", "d"}
    repro(toy)
    assert versioning.stale_stages(toy, graph) == {}
    (toy / "source").write_text("more\n")
    reasons = versioning.stale_stages(toy, graph)
    assert "source (modified)" in reasons["a"]
    assert reasons["b"] == "after a"
    (toy / "source").write_text("photographs\n")
    (toy / "data" / "c").unlink()
    reasons = versioning.stale_stages(toy, graph)
    assert set(reasons) == {"c", "d"}


def test_a_stage_key_changes_with_dependency_parameter_and_command_only(toy: Path) -> None:
    repro(toy)
    first = versioning.stage_key(toy, "a")
    assert versioning.stage_key(toy, "a") == first
    (toy / "params.yaml").write_text("project: {name: other}\nvalue: 1\n")
    assert versioning.stage_key(toy, "a") == first
    (toy / "params.yaml").write_text("project: {name: other}\nvalue: 2\n")
    assert versioning.stage_key(toy, "a") != first


def test_the_lock_entry_has_output_hashes(toy: Path) -> None:
    assert versioning.lock_entry(toy, "a") is None
    repro(toy)
    entry = versioning.lock_entry(toy, "a")
    assert entry is not None
    assert len(entry["outs"][0]["md5"]) == 32


def test_an_experiment_with_another_value_changes_one_line_of_the_committed_settings(
    root: Path, tmp_path: Path
) -> None:
    from dvc.utils.serialize import modify_yaml

    before = (root / "params.yaml").read_text()
    assert before == compose(root, "embedded")
    copied = tmp_path / "params.yaml"
    copied.write_text(before)
    with modify_yaml(str(copied)) as values:  # as `dvc exp run -S` does
        values["dit_stage1"]["steps"] += 1
    pairs = zip(before.splitlines(), copied.read_text().splitlines(), strict=True)
    assert [line for line, other in pairs if line != other] == ["  steps: 900"]


def test_a_stage_without_its_input_says_which_and_how_to_make_it(toy: Path) -> None:
    with pytest.raises(versioning.GraphError, match=r"^b: data/a is missing; `ultraflux run --un"):
        versioning.stage_identity(toy, "b")
