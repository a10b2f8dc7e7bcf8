"""Working trees with other settings: uncommitted settings are fine, uncommitted code is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from flows.running.working_trees import TreeRefused, settings_tree


def test_edited_settings_alone_are_no_reason_to_refuse(toy: Path) -> None:
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("value: 1", "value: 2"))
    values = {"project": {"name": "toy"}, "value": 3}
    tree = settings_tree(toy, toy / "runs" / "tree", values)
    assert yaml.safe_load((tree / "params.yaml").read_text()) == values
    # Once more over the tree that is there.
    assert settings_tree(toy, tree, values | {"value": 4}) == tree
    assert yaml.safe_load((tree / "params.yaml").read_text())["value"] == 4


def test_changed_code_is_named_in_full(toy: Path) -> None:
    (toy / "dvc.yaml").write_text((toy / "dvc.yaml").read_text() + "# changed\n")
    with pytest.raises(TreeRefused, match=r"^dvc\.yaml has uncommitted changes"):
        settings_tree(toy, toy / "runs" / "tree", {})


@pytest.mark.usefixtures("tree_on_a_stick")
def test_a_tree_whose_folder_was_deleted_is_made_again_and_no_other_is_forgotten(toy: Path) -> None:
    values = {"project": {"name": "toy"}, "value": 3}
    tree = settings_tree(toy, toy / "runs" / "tree", values)
    shutil.rmtree(tree)
    assert settings_tree(toy, tree, values) == tree
    assert yaml.safe_load((tree / "params.yaml").read_text()) == values
