from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from components.files.signatures import (
    KEY_SETTING,
    KeyUnusable,
    StatementInvalid,
    checked,
    public_key,
    signed,
    signing_key,
)

STATEMENT = {"format": "test", "names": ["Ann Lée", "波"], "n": 1, "share": 0.25}


def pem(key: object) -> bytes:
    return key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_SETTING, raising=False)


def test_a_signed_statement_comes_back_with_the_key_that_signed_it(tmp_path: Path) -> None:
    key = signing_key(tmp_path)
    statement, public = checked(signed(STATEMENT, key))
    assert statement == STATEMENT
    assert public == key.public


def test_the_signature_is_ed25519_over_sorted_compact_json(tmp_path: Path) -> None:
    """Known answer: anybody can check it without this code."""
    import base64

    document = json.loads(signed(STATEMENT, signing_key(tmp_path)))
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(document["signature"]["public_key"]))
    said = '{"format":"test","n":1,"names":["Ann Lée","波"],"share":0.25}'.encode()
    key.verify(base64.b64decode(document["signature"]["value"]), said)


def test_a_change_of_any_byte_is_found(tmp_path: Path) -> None:
    data = signed(STATEMENT, signing_key(tmp_path)).encode()
    for place in range(len(data)):
        for changed in (data[place] ^ 1, data[place] ^ 32):
            other = data[:place] + bytes([changed]) + data[place + 1 :]
            with pytest.raises((StatementInvalid, UnicodeDecodeError)):
                checked(other.decode())


def framed(statement: str, folder: Path) -> str:
    document = json.loads(signed({}, signing_key(folder)))
    return json.dumps(document).replace("{}", statement, 1)


@pytest.mark.parametrize(
    "statement", ["[]", '{"n": NaN}', '{"n": 1e999}', '{"n": "\\ud800"}', "[" * 100_000, "null"]
)
def test_what_no_signing_writes_is_no_statement(tmp_path: Path, statement: str) -> None:
    with pytest.raises(StatementInvalid):
        checked(framed(statement, tmp_path))


def test_blanks_are_a_change_too(tmp_path: Path) -> None:
    text = signed(STATEMENT, signing_key(tmp_path))
    with pytest.raises(StatementInvalid, match="written anew"):
        checked(text + "\n")


def test_the_development_key_is_made_once_for_its_owner_alone_and_says_what_it_is(
    tmp_path: Path,
) -> None:
    key, again = signing_key(tmp_path / "keys"), signing_key(tmp_path / "keys")
    assert key.public == again.public
    assert "untrusted" in key.title
    file = next((tmp_path / "keys").iterdir())
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in (tmp_path / "keys").iterdir()] == ["development.pem"]


def test_a_key_of_ones_own_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Ed25519PrivateKey.generate()
    path = tmp_path / "own.pem"
    path.write_bytes(pem(own))
    monkeypatch.setenv(KEY_SETTING, str(path))
    key = signing_key(tmp_path / "keys")
    assert key.public == own.public_key().public_bytes_raw() == public_key(path)
    assert "untrusted" not in key.title
    assert not (tmp_path / "keys").exists()
    half = tmp_path / "public.pem"
    half.write_bytes(
        own.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    assert public_key(half) == key.public


@pytest.mark.parametrize("kind", ["missing", "text", "ec"])
def test_a_key_that_cannot_sign_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "key.pem"
    if kind == "text":
        path.write_text("no key")
    elif kind == "ec":
        path.write_bytes(pem(generate_private_key(SECP256R1())))
    monkeypatch.setenv(KEY_SETTING, str(path))
    with pytest.raises(KeyUnusable, match=KEY_SETTING) as refusal:
        signing_key(tmp_path)
    assert "openssl genpkey" in str(refusal.value)
    assert "\n" not in str(refusal.value)
