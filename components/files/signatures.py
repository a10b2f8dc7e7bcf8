"""Statements signed with Ed25519, and the key of this project.

A signed statement is a JSON file {"statement", "signature"}. What is signed are the bytes of the
statement in one spelling (sorted keys, no blanks), and the file itself has one spelling too, so a
change of any byte is found. A signature says that a statement is unchanged and which key signed it;
who owns the key, the reader has to know.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.whole_files import regular_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "Ed25519"
KEY_SETTING = "ULTRAFLUX_SIGNING_KEY"
"""Environment variable: a PEM file with the Ed25519 key of one's own."""
DEVELOPMENT = "development.pem"


class KeyUnusable(ValueError):
    """There is no such key, or it is of another kind; one line."""


class StatementInvalid(ValueError):
    """No signed statement, or one that was changed; one line that says what."""


@dataclass(frozen=True)
class SigningKey:
    """A key, and whether somebody chose it."""

    private: Ed25519PrivateKey
    is_development: bool
    """Made here at first use: it proves that nothing was changed since, not who signed."""

    @property
    def public(self) -> bytes:
        """32 bytes."""
        return self.private.public_key().public_bytes_raw()

    @property
    def title(self) -> str:
        """Such as "development key 1a2b3c4d5e6f7a8b (untrusted)"."""
        return key_title(self.public, is_development=self.is_development)


def fingerprint(public: bytes) -> str:
    """The first 16 hexadecimal digits of a public key's sha256."""
    return hashlib.sha256(public).hexdigest()[:16]


def key_title(public: bytes, *, is_development: bool = False) -> str:
    """A key in words, by its fingerprint."""
    name = fingerprint(public)
    return f"development key {name} (untrusted)" if is_development else f"key {name}"


def signing_key(folder: Path) -> SigningKey:
    """The key that `KEY_SETTING` names, else the development key in `folder`, made at first use.

    Raises:
        KeyUnusable: see there.
    """
    chosen = os.environ.get(KEY_SETTING)
    if chosen:
        return SigningKey(_read_key(Path(chosen).expanduser(), KEY_SETTING), False)
    path = folder / DEVELOPMENT
    if not path.is_file():
        _make_key(path)
    return SigningKey(_read_key(path, "the development key"), True)


def _make_key(path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    # Readable by its owner alone from the first byte on; of two that make one, the first stays.
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink()


def _read_key(path: Path, what: str) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    make = f"`openssl genpkey -algorithm ed25519 -out {path}` makes one"
    try:
        key = load_pem_private_key(regular_bytes(path), None)
    except OSError as problem:
        raise KeyUnusable(f"{what}={path}: {problem.strerror}; {make}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyUnusable(f"{what}={path}: not an unencrypted PEM private key; {make}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable(f"{what}={path}: a key of another kind than Ed25519; {make}")
    return key


def _canonical(statement: Any) -> bytes:
    text = json.dumps(
        statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _document(document: Any) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def signed(statement: dict[str, Any], key: SigningKey) -> str:
    """The file of a signed statement.

    Args:
        statement: plain values, finite numbers.
        key: of `signing_key`.
    """
    signature = {
        "algorithm": ALGORITHM,
        "public_key": base64.b64encode(key.public).decode(),
        "value": base64.b64encode(key.private.sign(_canonical(statement))).decode(),
    }
    return _document({"statement": statement, "signature": signature})


def checked(text: str) -> tuple[dict[str, Any], bytes]:
    """(statement, public key that signed it) of a file of `signed`.

    Raises:
        StatementInvalid: see there.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        document = json.loads(text)
        statement, signature = document["statement"], document["signature"]
        algorithm = signature["algorithm"]
        public = base64.b64decode(signature["public_key"], validate=True)
        value = base64.b64decode(signature["value"], validate=True)
        key = Ed25519PublicKey.from_public_bytes(public)
    except (ValueError, LookupError, TypeError, RecursionError, binascii.Error):
        raise StatementInvalid("not a signed statement, or its frame was changed") from None
    if algorithm != ALGORITHM:
        raise StatementInvalid(f"signed with {algorithm!r}; {ALGORITHM} is known")
    if not isinstance(statement, dict):
        raise StatementInvalid("the statement is no JSON object")
    try:
        canonical = _canonical(statement)
    except (ValueError, RecursionError):
        # NaN, half a character, nesting without end: `signed` writes none of these.
        raise StatementInvalid("the statement has no spelling that could be signed") from None
    try:
        key.verify(value, canonical)
    except InvalidSignature:
        raise StatementInvalid("the statement was changed, or another key signed it") from None
    # Blanks and the order of keys mean nothing to JSON, nor do base64's last bits to its readers.
    signature["public_key"] = base64.b64encode(public).decode()
    signature["value"] = base64.b64encode(value).decode()
    if text != _document({"statement": statement, "signature": signature}):
        raise StatementInvalid("the file was written anew: its bytes are not those that were made")
    return statement, public


def public_key(path: Path) -> bytes:
    """32 bytes of an Ed25519 key in a PEM file, public or private.

    Raises:
        KeyUnusable: see there.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        data = regular_bytes(path)
    except OSError as problem:
        raise KeyUnusable(f"{path}: {problem.strerror}") from None
    if b"PRIVATE KEY" in data:
        return _read_key(path, "--key").public_key().public_bytes_raw()
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise KeyUnusable(f"{path}: not a PEM file with a public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnusable(f"{path}: a key of another kind than Ed25519")
    return key.public_bytes_raw()
