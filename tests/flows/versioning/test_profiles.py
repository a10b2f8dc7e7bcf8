"""Profiles: what is in them composes to a params.yaml, and what cannot be read is one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from components.settings.schema import SettingsError
from components.settings.yaml_files import read_yaml
from flows.versioning.profiles import compose, settings_text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"runtime:\n  device: cpu\n  device: cuda\n", "line 3: the key 'device' is there twice"),
        (b"project: {name: caf\xe9}\n", r"not UTF-8 at byte 19 \(line 1\)"),
        (b"dit_stage1: {steps: 0200}\n", "line 1: 0200 is read in two ways"),
        (b"project: [\n", "not valid YAML"),
        (b"[1]\n", "expected a mapping, got list"),
    ],
)
def test_a_profile_that_cannot_be_read_is_one_line_that_names_it(
    root: Path, tmp_path: Path, content: bytes, said: str
) -> None:
    shutil.copytree(root / "conf", tmp_path / "conf")
    (tmp_path / "conf" / "profiles" / "mine.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"profiles/mine\.yaml:? {said}") as caught:
        compose(tmp_path, "mine")
    assert "\n" not in str(caught.value)


def test_composed_texts_that_look_like_numbers_to_dvc_are_in_quotes(tmp_path: Path) -> None:
    values = {"a": "08", "b": "1e5", "c": "yes", "d": 1e-5, "e": 200, "f": None, "g": -1, "h": "x"}
    (tmp_path / "params.yaml").write_text(settings_text(values))
    assert read_yaml(tmp_path / "params.yaml") == values == yaml.safe_load(settings_text(values))
