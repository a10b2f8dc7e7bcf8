"""`ultraflux sign` and `ultraflux verify` of pictures, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from components.files.content_credentials import CHAIN_SETTING, certificate_chain
from components.files.signatures import KEY_SETTING, signing_key
from components.generation.image_metadata import save_with_metadata

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_SETTING, raising=False)
    monkeypatch.delenv(CHAIN_SETTING, raising=False)


def picture(path: Path) -> Path:
    fields = {"prompt": "a frozen lake", "ultraflux_key": "k", "sha256_transformer": "ab" * 32}
    save_with_metadata(Image.new("RGB", (64, 32), "teal"), path, fields)
    return path


def test_the_command_signs_copies_and_verifies_them(toy: Path, typed: Typed) -> None:
    folder = toy / "data" / "generate" / "images"
    folder.mkdir(parents=True)
    source = picture(folder / "prompt00.png")
    before = source.read_bytes()
    done = typed(toy, "sign", str(folder))
    assert done.returncode == 0, done.stderr
    assert "development key" in done.stdout
    assert "(untrusted)" in done.stdout
    assert source.read_bytes() == before
    done = typed(toy, "verify", "signed/prompt00.png", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["valid"]) == (0, True)
    assert found["facts"]["weights of transformer"] == f"sha256 {'ab' * 32}"
    assert found["facts"]["prompt"] == "a frozen lake"
    root = toy / "runs" / "services" / "signing" / "development-chain.pem"
    assert typed(toy, "verify", "signed/prompt00.png", "--key", str(root)).returncode == 0
    stranger = toy / "stranger.pem"
    stranger.write_text(certificate_chain(signing_key(toy / "other"), toy / "other"))
    done = typed(toy, "verify", "signed/prompt00.png", "--key", str(stranger))
    assert done.returncode == 1
    assert "vouches for" in done.stdout


def test_a_photograph_is_not_signed_as_a_generated_picture(toy: Path, typed: Typed) -> None:
    Image.new("RGB", (8, 8)).save(toy / "photo.png")
    done = typed(toy, "sign", "photo.png")
    assert done.returncode == 2
    assert "not made by this project" in done.stderr


def test_foreign_pictures_of_a_folder_are_left_out_and_named(toy: Path, typed: Typed) -> None:
    folder = toy / "mixed"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a_photo.png")
    (folder / "b_cut.png").write_bytes(b"\x89PNG")
    done = typed(toy, "sign", "mixed")
    assert done.returncode == 2
    assert "none of 2 pictures was made by this project" in done.stderr
    assert not (toy / "signed").exists()
    picture(folder / "c.png")
    done = typed(toy, "sign", "mixed")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (toy / "signed").iterdir()] == ["c.png"]
    assert "left out a_photo.png: not made by this project" in done.stderr
    assert "left out b_cut.png: not a readable picture" in done.stderr
    done = typed(toy, "sign", "mixed/c.png", "mixed/b_cut.png", "--out", "named")
    assert done.returncode == 2
    assert not (toy / "named").exists()


def test_what_cannot_be_signed_is_said_before_anything_is(toy: Path, typed: Typed) -> None:
    (toy / "empty").mkdir()
    (toy / "more").mkdir()
    picture(toy / "a.png")
    picture(toy / "more" / "a.png")
    os.mkfifo(toy / "pipe.png")
    (toy / "link.png").symlink_to("nowhere.png")
    for names, said in (
        (["a.png", "empty"], "empty: no picture in it (.jpeg, .jpg, .png, .webp)"),
        (["a.png", "more"], "a.png and more/a.png would both be a.png in --out"),
        (["a.png", "pipe.png"], "pipe.png: not a regular file"),
        (["a.png", "link.png"], "link.png: a link that leads nowhere"),
    ):
        done = typed(toy, "sign", *names)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert not (toy / "signed").exists()


def test_a_copy_never_replaces_its_picture(toy: Path, typed: Typed) -> None:
    folder = toy / "data" / "generate" / "images"
    folder.mkdir(parents=True)
    before = picture(folder / "prompt00.png").read_bytes()
    (toy / "link").symlink_to(folder)
    for out in ("data/generate/images", "link"):
        done = typed(toy, "sign", "data/generate/images/prompt00.png", "--out", out)
        assert done.returncode == 2
        assert f"--out {out}: data/generate/images/prompt00.png lies there itself" in done.stderr
    assert (folder / "prompt00.png").read_bytes() == before
