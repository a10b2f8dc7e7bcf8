"""Metadata put into a file: tensors byte for byte, ModelSpec's hash, the same bytes again."""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from components.files.safetensors_header import HASH, describe_file, metadata_of

ABOUT = {"modelspec.title": "Föhn", "a": "b"}


def test_tensors_stay_and_the_hash_is_theirs(tmp_path):
    path = tmp_path / "w.safetensors"
    state = {"b": torch.arange(7.0), "a": torch.ones(3, 5, dtype=torch.bfloat16)}
    save_file(state, path, {"format": "pt", "old": "gone"})
    before = path.read_bytes()
    describe_file(path, ABOUT)
    with safe_open(path, "pt") as opened:
        found = opened.metadata()
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert data[start:] == before[8 + int.from_bytes(before[:8], "little") :]
    assert found == {
        **ABOUT,
        "format": "pt",
        HASH: f"0x{hashlib.sha256(data[start:]).hexdigest()}",
    }
    assert metadata_of(path) == found
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert list(json.loads(data[8:start])["__metadata__"]) == sorted(found)
    assert [one.name for one in tmp_path.iterdir()] == ["w.safetensors"]


def test_describing_again_gives_the_same_bytes(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2)}, path)
    assert metadata_of(path) == {}
    describe_file(path, ABOUT)
    first = path.read_bytes()
    describe_file(path, ABOUT)
    assert path.read_bytes() == first
