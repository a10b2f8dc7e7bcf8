"""The npm package nsfwjs: fetch its archive, check it, and take the one network out of it.

The archive (25 MB) holds three networks as JavaScript: a graph as an object literal and weights as
base64. Nothing of it is run. Its sha512 is the registry's own ("integrity"); what is taken out of
it is checked again by sha256, so that a folder copied from elsewhere can be checked too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tarfile import TarError
from typing import Any

import httpx

from components.files.whole_files import whole_folder
from components.settings.bad_input import BadInput

PUBLIC_REGISTRY = "https://registry.npmjs.org"
COMMAND = "ultraflux weights get nsfwjs"
MODEL_FILE, WEIGHTS_FILE, LICENCE_FILE = "model.json", "weights.bin", "LICENSE"

_MAX_ARCHIVE_BYTES = 64 * 2**20
_MAX_MEMBER_BYTES = 32 * 2**20
_TIMEOUT_S = 60.0
_BLOCK_BYTES = 2**18


class PackageRefused(BadInput):
    """No archive, another one than expected, or none that holds the network; one line."""


@dataclass(frozen=True)
class NpmPackage:
    """An archive of the registry and the network in it."""

    name: str
    version: str
    integrity: str
    """sha512 of the archive, base64, as the registry and lock files write it."""
    network: str
    """Folder of the network inside the archive."""
    digest: str
    """sha256 of what is taken out (`weight_folders.folder_digest`)."""

    @property
    def archive(self) -> str:
        """The file's name."""
        return f"{self.name}-{self.version}.tgz"

    def address(self, registry: str) -> str:
        """Where a registry serves it."""
        return f"{registry.rstrip('/')}/{self.name}/-/{self.archive}"


NSFWJS = NpmPackage(
    "nsfwjs",
    "4.4.0",
    "krC1fgeTLXtZwgdpKJ0jm7hqv0gTSRQQRL+FhOaxaJ9Wj92t42BO3csO2odwgTAgZgf2RvkwPtp0R8Aa7dc+MA==",
    "package/dist/models/mobilenet_v2",
    "0ff751ec5bbf2dc23e499491ad23dfca87e092d7a96d6da93e1370807734f8c1",
)

# Of an archive that is cut or damaged, and of members that are something else.
_NOT_THE_NETWORK = (ValueError, LookupError, TypeError, OSError, EOFError, TarError, zlib.error)

_LITERAL = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*")|!(?P<flag>[01])|(?P<name>[A-Za-z_$][\w$]*)'
    r"|(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<mark>[{}\[\],:])"
)
_EXPORTED = "exports="


def _as_json(text: str, start: int) -> Iterator[str]:
    """Tokens of a minified JavaScript literal, each as JSON has it, up to its closing bracket."""
    depth = 0
    while True:
        found = _LITERAL.match(text, start)
        if found is None:
            raise ValueError(f"no literal at {text[start : start + 20]!r}")
        start = found.end()
        kind, word = str(found.lastgroup), found.group(found.lastgroup or 0)
        if kind == "flag":
            # Minified: !0 is true, !1 is false.
            word = "true" if word == "0" else "false"
        elif kind == "name" and word not in ("null", "true", "false"):
            word = json.dumps(word)
        elif kind == "number":
            word = json.dumps(float(word) if re.search(r"[.eE]", word) else int(word))
        yield word
        depth += (word in ("{", "[")) - (word in ("}", "]"))
        if depth == 0:
            return


def read_exported(text: str) -> Any:
    """What a minified module exports: an object literal, an array or a string.

    Args:
        text: JavaScript with `exports=LITERAL`.

    Raises:
        ValueError: there is no such literal; expressions are not evaluated.
    """
    place = text.find(_EXPORTED + "{")
    for opening in ("[", '"'):
        place = place if place >= 0 else text.find(_EXPORTED + opening)
    if place < 0:
        raise ValueError("exports no literal")
    return json.loads("".join(_as_json(text, place + len(_EXPORTED))))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        entry = archive.getmember(name)
    except KeyError:
        raise ValueError(f"has no {name}") from None
    file = archive.extractfile(entry) if entry.isreg() else None
    if file is None or entry.size > _MAX_MEMBER_BYTES:
        raise ValueError(f"{name} is no file of at most {_MAX_MEMBER_BYTES} bytes")
    return file.read()


def read_network(path: Path, package: NpmPackage) -> dict[str, bytes]:
    """What `unpack` writes, unchecked: graph, weights and licence by file name.

    Raises:
        ValueError: the archive has no such network; also tarfile's and zlib's errors.
    """
    with tarfile.open(path, "r:gz") as archive:

        def exported(name: str) -> Any:
            return read_exported(_member(archive, f"{package.network}/{name}.min.js").decode())

        model = exported("model")
        shards = [name for group in model["weightsManifest"] for name in group["paths"]]
        weights = b"".join(base64.b64decode(exported(name), validate=True) for name in shards)
        licence = _member(archive, "package/LICENSE")
    graph = json.dumps(model, sort_keys=True, separators=(",", ":")) + "\n"
    return {MODEL_FILE: graph.encode(), WEIGHTS_FILE: weights, LICENCE_FILE: licence}


def contents_digest(files: Mapping[str, bytes]) -> str:
    """`weight_folders.folder_digest` of a folder that holds these files."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _check_archive(path: Path, package: NpmPackage, where: str) -> None:
    with path.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    # Before anything in it is opened: what is parsed below is what the registry published.
    if digest != package.integrity:
        raise PackageRefused(
            f"{where}: not {package.name} {package.version}: sha512 {digest}, "
            f"expected {package.integrity}"
        )


def unpack(path: Path, package: NpmPackage, folder: Path, where: str = "") -> None:
    """Check an archive and make `folder` the network in it: model.json, weights.bin, LICENSE.

    Args:
        path: the archive.
        package: what it must be.
        folder: made or replaced as a whole.
        where: the archive's name for messages; its path without one.

    Raises:
        PackageRefused: another archive, or one without the network; `folder` stays as it was.
    """
    where = where or str(path)
    if not path.is_file():
        raise PackageRefused(f"{where}: no such file; `npm pack {package.name}@{package.version}`")
    _check_archive(path, package, where)
    try:
        files = read_network(path, package)
    except _NOT_THE_NETWORK as problem:
        raise PackageRefused(f"{where}: {problem or type(problem).__name__}") from None
    if (digest := contents_digest(files)) != package.digest:
        raise PackageRefused(f"{where}: its network is {digest}, expected {package.digest}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as made:
        for name, content in files.items():
            (made / name).write_bytes(content)


def _download(address: str, path: Path) -> None:
    with (
        httpx.stream("GET", address, follow_redirects=True, timeout=_TIMEOUT_S) as answer,
        path.open("wb") as file,
    ):
        answer.raise_for_status()
        for block in answer.iter_bytes(_BLOCK_BYTES):
            file.write(block)
            # Counted, because a mirror's Content-Length is only what it says.
            if file.tell() > _MAX_ARCHIVE_BYTES:
                raise ValueError(f"more than {_MAX_ARCHIVE_BYTES} bytes")


def fetch(package: NpmPackage, folder: Path, registry: str = PUBLIC_REGISTRY) -> None:
    """Download an archive and make `folder` the network in it.

    Args:
        package: what to get.
        folder: made or replaced as a whole.
        registry: address of an npm registry.

    Raises:
        PackageRefused: no answer, another archive, or one without the network.
    """
    address = package.address(registry)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / package.archive
        try:
            _download(address, path)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as problem:
            raise PackageRefused(
                f"{address}: {type(problem).__name__}: {str(problem).splitlines()[0]}; behind a "
                f"mirror set NPM_CONFIG_REGISTRY, without a network bring the file that `npm pack "
                f"{package.name}@{package.version}` makes and name it with --archive"
            ) from None
        unpack(path, package, folder, address)
