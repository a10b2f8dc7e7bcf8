"""Pictures with a signed C2PA manifest: what made them, and whether they were changed since.

C2PA 2 (c2pa.org/specifications), written and read by the reference library; IPTC's term for
pictures of a trained model is `trainedAlgorithmicMedia`. A manifest has random parts, so a signed
picture is never the same bytes twice: what has to repeat bit by bit is signed in a copy.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from components.files.manifest_boxes import is_as_signed
from components.files.signatures import KEY_SETTING, KeyUnusable, SigningKey
from components.files.whole_files import regular_bytes, whole_file, write_bytes

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CHAIN_SETTING = "ULTRAFLUX_SIGNING_CHAIN"
"""Environment variable: a PEM file with the certificates of one's own key, the key's first."""
DEVELOPMENT_CHAIN = "development-chain.pem"
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
LINEAGE = "org.ultraflux.lineage"
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_PNG = b"\x89PNG\r\n\x1a\n"
_YEARS = timedelta(days=3650)
_OWNER = "UltraFlux development key (untrusted)"
# Offline: no manifest, status or time is fetched. No thumbnail: the picture is there.
_SETTINGS: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "verify_after_sign": False, "verify_trust": True},
    "builder": {"thumbnail": {"enabled": False}},
}


class NotSignable(ValueError):
    """A file that takes no manifest here; one line."""


@dataclass(frozen=True)
class Credentials:
    """What the manifest of a picture says, and whether it still holds."""

    problems: tuple[str, ...]
    """What was changed, one line each; empty: nothing."""
    is_trusted: bool
    """Whether the signer's certificate descends from one that the reader trusts."""
    signer: str
    lineage: Mapping[str, Any]


def certificate_chain(key: SigningKey, folder: Path) -> str:
    """PEM of the certificates that go into a manifest.

    Args:
        key: of `signing_key`.
        folder: of the development key; its certificates are made beside it at first use.

    Raises:
        KeyUnusable: a key of one's own without certificates for it.
    """
    if not key.is_development:
        chosen = os.environ.get(CHAIN_SETTING, "")
        try:
            text = Path(chosen).expanduser().read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            raise KeyUnusable(
                f"{CHAIN_SETTING}={chosen}: pictures need the PEM certificates of the key in "
                f"{KEY_SETTING}, the key's own first"
            ) from None
        if _public(text) != key.public:
            raise KeyUnusable(f"{CHAIN_SETTING}={chosen}: certificates of another key")
        return text
    path = folder / DEVELOPMENT_CHAIN
    if path.is_file():
        text = path.read_text(encoding="ascii")
        if _public(text) == key.public:
            return text
    text = _development_chain(key.private)
    write_bytes(path, text.encode("ascii"))
    return text


def _public(chain: str) -> bytes:
    """Raw public key of the first certificate; empty where it is none of Ed25519."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = x509.load_pem_x509_certificates(chain.encode())[0].public_key()
    except ValueError:
        return b""
    return key.public_bytes_raw() if isinstance(key, Ed25519PublicKey) else b""


def _development_chain(private: Ed25519PrivateKey) -> str:
    """A certificate for the key under a root whose own key is thrown away."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding

    root = Ed25519PrivateKey.generate()
    own = _certificate("pictures", private, root, is_root=False)
    above = _certificate("root", root, root, is_root=True)
    return (own.public_bytes(Encoding.PEM) + above.public_bytes(Encoding.PEM)).decode("ascii")


def _certificate(
    title: str, key: Ed25519PrivateKey, root: Ed25519PrivateKey, *, is_root: bool
) -> x509.Certificate:
    """As C2PA's certificate profile asks: no end-entity certificate signs itself."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(common: str) -> x509.Name:
        pairs = ((NameOID.ORGANIZATION_NAME, _OWNER), (NameOID.COMMON_NAME, common))
        return x509.Name([x509.NameAttribute(oid, text) for oid, text in pairs])

    public, now = key.public_key(), datetime.now(UTC)
    usage = x509.KeyUsage(True, False, False, False, False, is_root, is_root, False, False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(title))
        .issuer_name(name("root"))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # Clocks of machines that read it differ.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _YEARS)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(usage, critical=True)
    )
    if not is_root:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(root, None)


def media_type(path: Path) -> str:
    """Such as image/png.

    Raises:
        NotSignable: no picture, or of a format that is not signed here.
    """
    try:
        with Image.open(path) as image:
            found = _TYPES.get(image.format or "")
    except (OSError, Image.DecompressionBombError):
        raise NotSignable(f"{path}: not a readable picture") from None
    if found is None:
        raise NotSignable(f"{path}: signed are {', '.join(_TYPES)}")
    return found


def pixel_digest(data: bytes) -> str:
    """sha256 of size and RGB values: equal for pictures that look alike to the last bit."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.convert("RGB")
        return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()


def sign_picture(
    source: Path,
    target: Path,
    lineage: Mapping[str, Any],
    software: str,
    key: SigningKey,
    chain: str,
) -> None:
    """Write a picture with a manifest; `target` may be `source`.

    Args:
        source: PNG, JPEG or WebP; a manifest that it has is replaced.
        target: appears at once when complete.
        lineage: plain values, kept as the assertion `LINEAGE` with the digest of the pixels.
        software: name and version, for the claim.
        key: of `signing_key`.
        chain: of `certificate_chain`.

    Raises:
        NotSignable: see `media_type`.
    """
    import c2pa

    kind = media_type(source)
    data = regular_bytes(source)
    name, _, version = software.partition(" ")
    manifest = {
        "claim_generator_info": [{"name": name, "version": version or "unknown"}],
        "title": target.name,
        "assertions": [
            {
                "label": "c2pa.actions.v2",
                "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}]},
            },
            {"label": LINEAGE, "data": dict(lineage) | {"pixels_sha256": pixel_digest(data)}},
        ],
    }
    info = c2pa.C2paSignerInfo("ed25519", chain.encode(), _pem(key), None)
    with (
        c2pa.Signer.from_info(info) as signer,
        c2pa.Builder(manifest, context=_context("")) as builder,
        whole_file(target) as aside,
        aside.open("w+b") as written,
    ):
        builder.sign(signer, kind, io.BytesIO(data), written)


def _pem(key: SigningKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@cache
def _context(anchors: str) -> Any:
    import c2pa

    trust = {"trust": {"trust_anchors": anchors}} if anchors else {}
    return c2pa.Context.from_dict(_SETTINGS | trust)


def read_credentials(path: Path, anchors: str = "") -> Credentials | None:
    """Check a picture's manifest offline; None where it has none.

    Args:
        path: picture.
        anchors: PEM of certificates that the reader trusts.
    """
    import c2pa

    data = regular_bytes(path)
    kind = _kind(data)
    try:
        with c2pa.Reader(kind, io.BytesIO(data), context=_context(anchors)) as reader:
            document = json.loads(reader.json())
            state = reader.get_validation_state()
    except c2pa.C2paError.ManifestNotFound:
        return None
    except (c2pa.C2paError, UnicodeDecodeError, ValueError) as problem:
        # A manifest store that cannot be parsed: its own bytes are what was changed.
        said = " ".join(str(problem).split())[:120]
        return Credentials((f"the manifest itself is damaged ({said})",), False, "unknown", {})
    active = document.get("manifests", {}).get(document.get("active_manifest"))
    if active is None:
        return Credentials(("the manifest itself is damaged (no claim)",), False, "unknown", {})
    assertions = {one["label"]: one["data"] for one in active.get("assertions", [])}
    lineage: Any = assertions.get(LINEAGE)
    if not isinstance(lineage, dict):
        # Another program may have put anything under that name.
        lineage = {}
    failures = document.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    problems = tuple(dict.fromkeys(_said(one, data, lineage) for one in failures if _counts(one)))
    if LINEAGE in assertions and not problems and not _is_as_written(data, kind):
        problems = ("bytes of the manifest that no signature covers were changed",)
    if state == "Invalid" and not problems:
        problems = ("the manifest is invalid",)
    signature = active.get("signature_info", {})
    signer = f"{signature.get('issuer', 'unknown')} ({signature.get('common_name', '')})"
    return Credentials(problems, state == "Trusted" and not problems, signer, lineage)


def _is_as_written(data: bytes, kind: str) -> bool:
    """Whether bytes of the manifest that no signature covers are as our signing left them."""
    return is_as_signed(data) and (kind != "image/png" or _checksums_hold(data))


def _checksums_hold(data: bytes) -> bool:
    """Whether a PNG is chunks with right checksums from its first byte to its last."""
    place = len(_PNG)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        checksum = zlib.crc32(data[place + 4 : end - 4])
        if end > len(data) or data[end - 4 : end] != checksum.to_bytes(4, "big"):
            return False
        place = end
    return data.startswith(_PNG)


def _kind(data: bytes) -> str:
    """By the first bytes; what is damaged there is for the library to refuse."""
    if data[:2] == b"\xff\xd8":
        return "image/jpeg"
    return "image/webp" if data[8:12] == b"WEBP" else "image/png"


def _counts(failure: Mapping[str, str]) -> bool:
    """Not whose key it is: that is no change."""
    return failure["code"] != "signingCredential.untrusted"


def _said(failure: Mapping[str, str], data: bytes, lineage: Mapping[str, Any]) -> str:
    code, url = failure["code"], failure.get("url", "")
    if code == "assertion.dataHash.mismatch":
        return _picture_said(data, str(lineage.get("pixels_sha256", "")))
    if code.startswith("assertion."):
        return f"the statement {url.rpartition('/')[2]} in the manifest was changed"
    if code.startswith("claimSignature."):
        return "the claim or its signature was changed"
    if code.startswith("signingCredential."):
        return f"the signer's certificate does not hold ({code})"
    return f"{code}: {failure.get('explanation', '')}"


def _picture_said(data: bytes, expected: str) -> str:
    try:
        same = pixel_digest(data) == expected
    except (OSError, SyntaxError, ValueError):
        return "the picture was changed so that it can no longer be decoded"
    if same:
        return "metadata or container bytes beside the manifest were changed, the pixels were not"
    return "the pixels were changed"
