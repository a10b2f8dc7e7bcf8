"""Signed pictures: what they say, and that any byte that changes is found and named."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import c2pa
import numpy as np
import pytest
from PIL import Image

from components.files.content_credentials import (
    CHAIN_SETTING,
    LINEAGE,
    SOURCE_TYPE,
    certificate_chain,
    read_credentials,
    sign_picture,
)
from components.files.signatures import KEY_SETTING, KeyUnusable, signing_key
from components.generation.image_metadata import FileFormat, read_metadata, save_with_metadata

Typed = Callable[..., subprocess.CompletedProcess[str]]
FIELDS = {
    "prompt": "a frozen lake",
    "seed": "7",
    "software": "ultraflux-mlops 0.1.0",
    "ultraflux_key": "k",
    "sha256_transformer": "ab" * 32,
}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_SETTING, raising=False)
    monkeypatch.delenv(CHAIN_SETTING, raising=False)


def picture(path: Path, file_format: FileFormat = "png") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    save_with_metadata(Image.fromarray(pixels), path, FIELDS, file_format)
    return path


def signed_picture(folder: Path, file_format: FileFormat = "png") -> tuple[Path, str]:
    """(a signed picture, certificates of its key)."""
    key = signing_key(folder / "key")
    chain = certificate_chain(key, folder / "key")
    source = picture(folder / f"plain.{file_format}", file_format)
    target = folder / f"signed.{file_format}"
    sign_picture(source, target, {"weights_sha256": {"t": "ab"}}, FIELDS["software"], key, chain)
    return target, chain


@pytest.mark.parametrize("file_format", ["png", "jpg"])
def test_a_signed_picture_is_the_same_picture_and_says_what_made_it(
    tmp_path: Path, file_format: FileFormat
) -> None:
    path, chain = signed_picture(tmp_path, file_format)
    plain = tmp_path / f"plain.{file_format}"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(plain)))
    assert read_metadata(path) == read_metadata(plain)
    found = read_credentials(path, chain)
    assert found is not None
    assert (found.problems, found.is_trusted) == ((), True)
    assert "untrusted" in found.signer
    assert found.lineage["weights_sha256"] == {"t": "ab"}
    assert read_credentials(plain) is None
    # Whoever does not know the key sees an unchanged picture of somebody unknown.
    stranger = read_credentials(path)
    assert stranger is not None
    assert (stranger.problems, stranger.is_trusted) == ((), False)


def test_the_manifest_names_the_source_type_of_iptc(tmp_path: Path) -> None:
    """Read by the reference library alone."""
    path, _ = signed_picture(tmp_path)
    with path.open("rb") as file, c2pa.Reader("image/png", file) as reader:
        document = json.loads(reader.json())
    active = document["manifests"][document["active_manifest"]]
    said = {one["label"]: one["data"] for one in active["assertions"]}
    action = said["c2pa.actions.v2"]["actions"][0]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", SOURCE_TYPE)
    assert SOURCE_TYPE.endswith("/trainedAlgorithmicMedia")
    assert LINEAGE in said


def unseen(path: Path, chain: str, changes: Iterable[tuple[int, int]]) -> list[int]:
    """Places at which a byte may be changed (exclusive or) and nothing is said."""
    data = path.read_bytes()
    missed = []
    for place, bits in changes:
        other = bytearray(data)
        other[place] ^= bits
        path.write_bytes(bytes(other))
        found = read_credentials(path, chain)
        if found is not None and not found.problems:
            missed.append(place)
    path.write_bytes(data)
    return missed


def signed_webp(folder: Path) -> tuple[Path, str]:
    """The library signs WebP, too, which nothing here paints."""
    key = signing_key(folder / "key")
    chain = certificate_chain(key, folder / "key")
    source, target = folder / "plain.webp", folder / "signed.webp"
    Image.radial_gradient("L").resize((48, 32)).convert("RGB").save(source, lossless=True)
    sign_picture(source, target, {"weights_sha256": {"t": "ab"}}, FIELDS["software"], key, chain)
    return target, chain


def signed(folder: Path, kind: str) -> tuple[Path, str]:
    if kind == "webp":
        return signed_webp(folder)
    return signed_picture(folder, "png" if kind == "png" else "jpg")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("seed", [2, 3])
def test_twenty_of_twenty_changes_of_a_single_byte_are_found(
    tmp_path: Path, kind: str, seed: int
) -> None:
    path, chain = signed(tmp_path, kind)
    rng = np.random.default_rng(seed)
    places = rng.choice(path.stat().st_size, 20, replace=False)
    assert unseen(path, chain, [(int(place), 1 << int(rng.integers(8))) for place in places]) == []


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_heads_of_the_manifest_are_watched(tmp_path: Path, kind: str) -> None:
    """Types, labels, packet numbers and the empty payload: no hash and no signature has them."""
    path, chain = signed(tmp_path, kind)
    data = path.read_bytes()
    found = read_credentials(path, chain)
    assert found is not None
    assert found.problems == ()
    begin = data.index(b"jumb") - 16
    places = {*range(begin, begin + 60), data.rindex(b"cpad") + 9}
    for label in (b"c2pa.assertions\0", b"c2pa.claim.v2\0", b"c2pa.signature\0"):
        place = data.index(label)
        places |= {*range(place - 30, place + len(label) + 8)}
    pad = data.rindex(b"cpad")
    places.add(pad + 7 + int.from_bytes(data[pad + 5 : pad + 7], "big"))
    changes = [(place, bits) for place in sorted(places) for bits in (1, 0xE0)]
    assert unseen(path, chain, changes) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_every_byte_of_the_file_is_watched(tmp_path: Path, kind: str) -> None:
    path, chain = signed(tmp_path, kind)
    rng = np.random.default_rng(0)
    changes = [(place, int(rng.integers(1, 256))) for place in range(path.stat().st_size)]
    assert unseen(path, chain, changes) == []


def test_what_was_changed_is_named(tmp_path: Path, typed: Typed) -> None:
    path, _ = signed_picture(tmp_path)
    data = path.read_bytes()

    def said(other: bytes) -> str:
        path.write_bytes(other)
        done = typed(tmp_path, "verify", str(path))
        assert done.returncode == 1
        return done.stdout

    changed = data.replace(b"weights_sha256", b"weights_sha255", 1)
    assert f"{LINEAGE} in the manifest was changed" in said(changed)
    path.write_bytes(data)
    assert typed(tmp_path, "verify", str(path)).returncode == 0
    # The same manifest in a picture of other metadata, and around other pixels.
    start = data.index(b"caBX") - 4
    manifest = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    image = Image.open(path).copy()

    def around(other: Image.Image, fields: dict[str, str]) -> bytes:
        save_with_metadata(other, tmp_path / "other.png", fields)
        written = (tmp_path / "other.png").read_bytes()
        return written[:33] + manifest + written[33:]

    renamed = around(image, FIELDS | {"prompt": "a frozen lane"})
    assert "beside the manifest were changed, the pixels were not" in said(renamed)
    turned = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert "the pixels were changed" in said(around(turned, FIELDS))
    bare = (tmp_path / "other.png").read_bytes()
    assert "no manifest: never signed, or it was removed" in said(bare)


def test_a_key_of_ones_own_needs_its_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = signing_key(tmp_path / "a")
    chain = tmp_path / "a" / "chain.pem"
    chain.write_text(certificate_chain(made, tmp_path / "a"))
    monkeypatch.setenv(KEY_SETTING, str(tmp_path / "a" / "development.pem"))
    own = signing_key(tmp_path / "b")
    with pytest.raises(KeyUnusable, match=CHAIN_SETTING):
        certificate_chain(own, tmp_path / "b")
    monkeypatch.setenv(CHAIN_SETTING, str(chain))
    assert certificate_chain(own, tmp_path / "b") == chain.read_text()
    monkeypatch.delenv(KEY_SETTING)
    other = signing_key(tmp_path / "c")
    chain.write_text(certificate_chain(other, tmp_path / "c"))
    with pytest.raises(KeyUnusable, match="another key"):
        certificate_chain(own, tmp_path / "b")
