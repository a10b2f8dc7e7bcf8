"""`ultraflux stage run ingest` on lists that are wrong: counted rows, or one line and no row."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from flows.running.recorded_stage import PARENT_RECORD

LIST = "lists/list.csv"


class _Photos(BaseHTTPRequestHandler):
    """A photograph of its own at every address."""

    def do_GET(self) -> None:
        seed = int("".join(filter(str.isdigit, self.path)))
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(file.getvalue())))
        self.end_headers()
        self.wfile.write(file.getvalue())

    def log_message(self, *rest: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Photos)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def project(clone: Callable[..., Path]) -> Path:
    settings = {
        "ingest.kind": "urls",
        "ingest.source": LIST,
        "ingest.download.min_pixels": 100,
        "ingest.download.requests_per_second": 1000.0,
        "ingest.download.private_hosts": ["127.0.0.1"],
    }
    folder = clone("lists", settings, photos=[])
    (folder / "lists").mkdir()
    assert command(folder, "code").exit_code == 0
    return folder


def command(project: Path, stage: str) -> Result:
    """`ultraflux stage run STAGE` as it is typed in a project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        # As a stage of a pipeline, whose parent uploads what it records.
        patch.setenv(PARENT_RECORD, "pipeline-x")
        return CliRunner().invoke(app, ["stage", "run", stage])


def ingest(project: Path, data: bytes) -> Result:
    """What the command says of a list."""
    (project / LIST).write_bytes(data)
    assert command(project, "source").exit_code == 0
    return command(project, "ingest")


def test_a_stray_quotation_mark_is_one_counted_row(project: Path, web: str) -> None:
    lines = [f"{web}/photo{n}.jpg,a plain caption number {n}" for n in range(20)]
    lines[4] = f'{web}/photo4.jpg,"the ""unclosed quote at 24\' f/8'
    done = ingest(project, "\n".join(["url,caption", *lines, ""]).encode())
    assert done.exit_code == 0, done.output
    assert "20 candidates, 19 kept, lost: broken_record 1" in done.output
    losses = pd.read_parquet(project / "data" / "ingest" / "losses.parquet")
    assert losses["record"].tolist() == ["list.csv:6"]
    assert "a quotation mark opens" in losses["detail"][0]
    coverage = json.loads((project / "data" / "ingest" / "coverage.json").read_text())
    (account,) = coverage["ledger"]["files"]
    assert (account["total"], account["apart"]) == (21, {"header": 1})
    assert (account["records"], account["losses"]) == (19, 1)
    assert (coverage["kept"], coverage["losses"]) == (19, {"broken_record": 1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"http://a/1.jpg\nhttp://a/2.jpg\n", "ingest.lists.columns"),
        (b"url;caption\nhttp://a/1.jpg;x\n", 'ingest.lists.separator to ";"'),
        ("url,caption\nhttp://a/1.jpg,Café\n".encode("latin-1"), "ingest.lists.encoding"),
        (b"\n<!DOCTYPE html><html></html>\n", "a web page or XML"),
        (b"# mine\nurl,caption\nhttp://a/1.jpg,x\n", "its heading stands below 1 other lines"),
    ],
)
def test_a_list_that_would_be_misread_is_one_line(project: Path, data: bytes, message: str) -> None:
    done = ingest(project, data)
    assert done.exit_code != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ingest: lists/list.csv: ")
    assert message in line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "lists/list.csv holds no record: its files are empty"),
        (b"url\nftp://a/1.jpg\n", "the first, list.csv:2: scheme is not http or https"),
    ],
)
def test_a_list_of_which_nothing_comes_is_one_line(
    project: Path, data: bytes, message: str
) -> None:
    done = ingest(project, data)
    assert done.exit_code != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ingest: ")
    assert message in line
