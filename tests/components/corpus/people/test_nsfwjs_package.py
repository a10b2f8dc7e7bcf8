from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_layers_model import archive_bytes, module, tiny_members, tiny_model

from components.corpus.people.nsfwjs import load_network
from components.corpus.people.nsfwjs_package import (
    NSFWJS,
    NpmPackage,
    PackageRefused,
    contents_digest,
    fetch,
    read_exported,
    unpack,
)
from components.files.weight_folders import folder_digest


def package_of(archive: bytes, digest: str = "") -> NpmPackage:
    integrity = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    return NpmPackage("tiny", "1.0.0", integrity, "package/tiny", digest)


def tiny_package() -> tuple[bytes, NpmPackage]:
    archive = archive_bytes(tiny_members())
    model, weights, _ = tiny_model()
    graph = json.dumps(model, sort_keys=True, separators=(",", ":")) + "\n"
    files = {
        "LICENSE": b"MIT License\n",
        "model.json": graph.encode(),
        "weights.bin": weights,
    }
    return archive, package_of(archive, contents_digest(files))


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.from_regex(r"[a-z_]\w{0,6}", fullmatch=True), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=30)
@given(_VALUES.filter(lambda value: isinstance(value, dict | list | str)))
def test_what_a_minifier_wrote_is_read_back(value: Any) -> None:
    found = read_exported(module(value).decode())
    assert found == value
    assert json.dumps(found) == json.dumps(value)


def test_code_is_not_run_and_not_taken_for_a_literal() -> None:
    for text in (
        "a.exports=load()",
        "a.exports={a:b()}",
        "a.exports={a:1+1}",
        'a.exports={"a"',
        "",
    ):
        with pytest.raises(ValueError, match=r"."):
            read_exported(text)


def test_an_archive_becomes_a_folder_that_runs(tmp_path: Path) -> None:
    archive, package = tiny_package()
    path = tmp_path / "tiny.tgz"
    path.write_bytes(archive)
    folder = tmp_path / "weights" / "tiny"
    unpack(path, package, folder)
    assert sorted(file.name for file in folder.iterdir()) == [
        "LICENSE",
        "model.json",
        "weights.bin",
    ]
    assert folder_digest(folder) == package.digest
    load_network(folder)


def test_what_is_not_the_package_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    archive, package = tiny_package()
    path, folder = tmp_path / "a.tgz", tmp_path / "weights" / "tiny"
    without = tiny_members()
    del without["package/tiny/group2-shard1of1.min.js"]
    broken = tiny_members() | {"package/tiny/group1-shard1of2.min.js": module("not base64!")}
    code = tiny_members() | {"package/tiny/model.min.js": b"exports=f()"}
    cases = [
        (archive + b"\0", package, r"not tiny 1\.0\.0: sha512 .*, expected "),
        (archive, replace(package, digest="0" * 64), r"its network is [0-9a-f]{64}, expected 0000"),
        (archive_bytes(without), None, r"has no package/tiny/group2-shard1of1\.min\.js"),
        (archive_bytes(broken), None, r"a\.tgz: "),
        (archive_bytes(code), None, r"exports no literal"),
        (b"no archive", None, r"a\.tgz: "),
        (archive[: len(archive) // 2], None, r"a\.tgz: "),
    ]
    for content, wanted, line in cases:
        path.write_bytes(content)
        with pytest.raises(PackageRefused, match=rf"^[^\n]*{line}[^\n]*$"):
            unpack(path, wanted or package_of(content), folder)
        assert not folder.exists()
    with pytest.raises(PackageRefused, match=r"no such file; `npm pack tiny@1\.0\.0`"):
        unpack(tmp_path / "none.tgz", package, folder)


class _Registry(BaseHTTPRequestHandler):
    answers: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path == "/moved/tiny/-/tiny-1.0.0.tgz":
            self.send_response(302)
            self.send_header("Location", "/tiny/-/tiny-1.0.0.tgz")
            self.end_headers()
            return
        body = self.answers.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[str]:
    archive, _ = tiny_package()
    _Registry.answers = {
        "/tiny/-/tiny-1.0.0.tgz": archive,
        "/other/tiny/-/tiny-1.0.0.tgz": archive_bytes({"package/LICENSE": b""}),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_registry_is_asked_as_npm_asks_it(registry: str, tmp_path: Path) -> None:
    package = tiny_package()[1]
    for address in (registry, f"{registry}/", f"{registry}/moved"):
        folder = tmp_path / "weights" / "tiny"
        fetch(package, folder, address)
        assert folder_digest(folder) == package.digest
    assert NSFWJS.address("https://registry.npmjs.org") == (
        "https://registry.npmjs.org/nsfwjs/-/nsfwjs-4.4.0.tgz"
    )


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/none", r"404"),
        ("/other", r"/other/tiny/-/tiny-1\.0\.0\.tgz: not tiny 1\.0\.0: sha512"),
    ],
)
def test_a_registry_without_the_package_is_one_line(
    registry: str, tmp_path: Path, path: str, line: str
) -> None:
    with pytest.raises(PackageRefused, match=rf"^[^\n]*{line}[^\n]*$"):
        fetch(tiny_package()[1], tmp_path / "tiny", registry + path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_line_says_how_to_bring_the_file(tmp_path: Path) -> None:
    for address in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(
            PackageRefused, match=r"NPM_CONFIG_REGISTRY.*`npm pack tiny@1\.0\.0`.*--archive"
        ):
            fetch(tiny_package()[1], tmp_path / "tiny", address)
