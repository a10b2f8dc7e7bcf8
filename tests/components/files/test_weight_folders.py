"""Weight folders: clear errors, digests, class check."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from components.files.weight_folders import (
    WeightsMissing,
    folder_digest,
    require_class,
    resolve_folder,
)

COMMAND = "hf download owner/model --local-dir weights/model"


def _folder(path: Path, weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (path / weights).write_bytes(b"weights")
    return path


def test_a_complete_folder_is_returned(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "vae")
    assert resolve_folder(str(folder), "Flux VAE", COMMAND) == folder


@pytest.mark.parametrize(
    ("weights", "reason"), [("model.bin", "only pickled weights"), ("readme.md", "no safetensors")]
)
def test_folders_without_safetensors_are_refused(tmp_path: Path, weights: str, reason: str) -> None:
    with pytest.raises(WeightsMissing, match=reason):
        resolve_folder(_folder(tmp_path / "vae", weights), "Flux VAE", COMMAND)


def test_missing_folder_is_one_line_with_name_place_and_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing) as raised:
        resolve_folder(tmp_path / "none", "Flux VAE", COMMAND)
    error = raised.value
    assert (error.name, error.expected, error.command) == (
        "Flux VAE",
        str(tmp_path / "none"),
        COMMAND,
    )
    assert str(error) == f"Flux VAE not found at {tmp_path / 'none'}; get it with: {COMMAND}"
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsMissing, match="it is a file") as raised:
        resolve_folder(tmp_path / "file", "Flux VAE", COMMAND)
    copy = pickle.loads(pickle.dumps(raised.value))
    assert copy.command == COMMAND
    assert str(copy) == str(raised.value)


def test_digest_depends_on_names_and_bytes_but_not_on_place_or_hidden_files(
    tmp_path: Path,
) -> None:
    first, second = _folder(tmp_path / "a"), _folder(tmp_path / "b" / "c")
    (second / ".cache").mkdir()
    (second / ".cache" / "lock").write_text("x")
    assert folder_digest(first) == folder_digest(second)
    (second / "model.safetensors").write_bytes(b"weightz")
    assert folder_digest(first) != folder_digest(second)
    (first / "model.safetensors").rename(first / "other.safetensors")
    assert folder_digest(first) != folder_digest(_folder(tmp_path / "d"))


def test_another_class_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "vae")
    require_class(folder, None, ("AutoencoderKLF16", "AutoencoderKL"))
    require_class(tmp_path, "vae", ("AutoencoderKL",))
    with pytest.raises(ValueError, match="holds a AutoencoderKL, expected FluxTransformer2DModel"):
        require_class(folder, None, ("FluxTransformer2DModel",))
    with pytest.raises(WeightsMissing, match=r"config\.json"):
        require_class(tmp_path, None, ("AutoencoderKL",))
