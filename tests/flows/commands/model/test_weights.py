"""`ultraflux weights get nsfwjs`, and what `list` and `verify` say of it."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_layers_model import tiny_package_archive
from typer.testing import CliRunner

from components.corpus.people import nsfwjs_package
from components.files.weight_folders import folder_digest
from flows.cli import app

ROOT = Path(__file__).parents[4]


class _Registry(BaseHTTPRequestHandler):
    archive: bytes
    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.archive)))
        self.end_headers()
        self.wfile.write(self.archive)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry() -> Iterator[str]:
    _Registry.archive, _Registry.asked = tiny_package_archive("package/tiny"), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "params.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_refuses_another_archive_in_one_line(registry: str, project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "weights", "get", "nsfwjs"],
        cwd=project,
        env=os.environ | {"NPM_CONFIG_REGISTRY": registry, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert _Registry.asked == ["/nsfwjs/-/nsfwjs-4.4.0.tgz"]
    assert done.stdout.splitlines() == [f"fetching {registry}/nsfwjs/-/nsfwjs-4.4.0.tgz"]
    (line,) = done.stderr.splitlines()
    assert "not nsfwjs 4.4.0: sha512 " in line
    assert nsfwjs_package.NSFWJS.integrity in line
    assert not (project / "weights").exists()


def test_get_list_and_verify_the_network(
    registry: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha512 = base64.b64encode(hashlib.sha512(_Registry.archive).digest()).decode()
    tiny = replace(nsfwjs_package.NSFWJS, integrity=sha512, network="package/tiny")
    # The true package is 25 MB and is not in the repository: its place takes the tiny one.
    path = project / "tiny.tgz"
    path.write_bytes(_Registry.archive)
    digest = nsfwjs_package.contents_digest(nsfwjs_package.read_network(path, tiny))
    monkeypatch.setattr(nsfwjs_package, "NSFWJS", replace(tiny, digest=digest))
    runner = CliRunner()

    def said(*arguments: str, code: int = 0) -> str:
        done = runner.invoke(app, ["weights", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    assert nsfwjs_package.COMMAND in said("list", "nsfwjs")
    assert "missing   weights/nsfwjs" in said("verify", "nsfwjs", code=1)
    assert "set people.nsfw.scorer: nsfwjs" in said("get", "nsfwjs", "--registry", registry)
    folder = project / "weights" / "nsfwjs"
    assert folder_digest(folder) == digest
    assert "is there already" in said("get", "nsfwjs", "--registry", "http://127.0.0.1:9")
    assert f"ok        weights/nsfwjs: {digest}" in said("verify", "nsfwjs")
    assert "missing" not in said("list", "nsfwjs")
    # Weights of metrics are listed as before, and beside it.
    both = said("list", "nsfwjs", "fid")
    assert "weights/nsfwjs" in both
    assert "fid" in both

    (folder / "weights.bin").write_bytes(b"other")
    assert f"expected {digest}" in said("verify", "nsfwjs", code=1)
    said("get", "nsfwjs", "--archive", str(path))
    assert folder_digest(folder) == digest


def test_other_names_are_not_fetched(project: Path) -> None:
    done = CliRunner().invoke(app, ["weights", "get", "fid"])
    assert done.exit_code == 2
    assert "ultraflux weights list fid" in done.output


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("export", "--date", "yesterday"),
        ("export", "--date", "2026-02-30"),
        ("adapter", "--date", "20261129"),
        ("adapter", "--date", ""),
        ("export", "--resolution", "large"),
        ("export", "--resolution", "0x4096"),
        ("export", "--resolution", "4096x4096 "),
    ],
)
def test_metadata_that_no_program_reads_is_refused(
    project: Path, command: str, option: str, value: str
) -> None:
    source = project / "source"
    source.mkdir()
    words = ["weights", command, str(source), "--out", str(project / "out"), option, value]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {option} {value}: expected ")
