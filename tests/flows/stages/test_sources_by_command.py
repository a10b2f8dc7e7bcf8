"""Every kind of source through the commands, in fresh clones: killed, continued, the same bytes.

The listing and what becomes of odd entries run in the fast suite; whole corpus runs are slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import small_project
import yaml

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "data" / "sample"
GOOD = small_project.PHOTOS[:5]
CAPTIONS = {
    record["file"]: record
    for record in map(json.loads, (SAMPLE / "captions.jsonl").read_text().splitlines())
}
TABLES = ("ingest/manifest", "ingest/losses", "select/manifest", "slices/manifest")
FASTER = {
    "signals.glcm": False,
    "slices.eval_min_images": 1,
    "slices.min_images": 2,
    "ingest.attribution": None,
}


def environment(project: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(project), "COLUMNS": "200"}


def command(project: Path, *words: str, timeout_s: float = 900) -> str:
    """Both streams of a command that must work."""
    done = subprocess.run(
        words, cwd=project, env=environment(project), capture_output=True, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def table(project: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(project / "data" / f"{name}.parquet")


def end_all(process: psutil.Process) -> None:
    """SIGKILL for a command and all that it started, at once."""
    family = [*process.children(recursive=True), process]
    for one in family:
        one.suspend()
    for one in family:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def odd(clone: Callable[..., Path]) -> Path:
    """A folder of three photographs and of what is none, ingested by command."""
    settings = {"ingest.source": "odd", "ingest.attribution": None}
    project = clone("odd", settings, [])
    folder = project / "odd"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(GOOD[:2]):
        shutil.copy(SAMPLE / name, folder / f"{number}.jpg")
    shutil.copy(SAMPLE / GOOD[0], folder / "deep" / "copy.jpg")
    (folder / "dangling.jpg").symlink_to("missing.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "linked").symlink_to("..")
    (folder / "beside.txt").symlink_to("missing.txt")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "beside.fifo")
    here = os.open(folder, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        # Names of sockets are short; the entry stays when the socket is closed.
        server.bind(f"/proc/self/fd/{here}/socket.jpg")
    os.close(here)
    shutil.copy(SAMPLE / GOOD[1], os.fsencode(folder) + b"/caf\xe9.jpg")
    # None of the stages may wait for a pipe.
    command(project, "dvc", "repro", "-q", "ingest", timeout_s=300)
    return project


def test_what_is_no_regular_file_is_a_row_with_a_reason(odd: Path) -> None:
    rows = table(odd, "ingest/manifest").set_index("uri")["integrity"].to_dict()
    assert rows == {
        "odd/0.jpg": "ok",
        "odd/1.jpg": "ok",
        "odd/deep/copy.jpg": "ok",
        "odd/dangling.jpg": "cannot read: No such file or directory",
        "odd/loop.jpg": "symbolic links in a loop",
        "odd/linked": "symbolic link that leaves the source folder; not followed",
        "odd/pipe.jpg": "not a regular file",
        "odd/socket.jpg": "not a regular file",
        "odd/caf\\xe9.jpg": "file name is not UTF-8; rename the file",
    }
    duplicates = table(odd, "ingest/manifest").set_index("uri")["duplicate_of"].dropna()
    assert list(duplicates.index) == ["odd/deep/copy.jpg"]


def test_nothing_new_is_no_work_no_record_and_not_a_byte_of_the_lock(odd: Path) -> None:
    lock = (odd / "dvc.lock").read_bytes()
    records = sorted((odd / "runs" / "records").iterdir())
    said = command(odd, "dvc", "repro", "ingest")
    assert "source: unchanged" in said
    assert (odd / "dvc.lock").read_bytes() == lock
    assert sorted((odd / "runs" / "records").iterdir()) == records


@pytest.mark.slow
def test_one_more_photograph_is_read_alone_and_one_that_goes_is_noticed(odd: Path) -> None:
    listed = command(odd, "ultraflux", "stage", "list")
    assert listed.count("up to date") == 3
    added = odd / "odd" / "a new one.jpg"
    shutil.copy(SAMPLE / GOOD[2], added)
    (odd / "odd" / "1.jpg").rename(odd / "odd" / "2.jpg")
    listed = command(odd, "ultraflux", "stage", "list")
    assert "files in odd" in listed
    command(odd, "dvc", "repro", "-q", "ingest")
    uris = table(odd, "ingest/manifest")["uri"].tolist()
    assert "odd/a new one.jpg" in uris
    assert "odd/1.jpg" not in uris
    assert uris == sorted(uris)


@contextlib.contextmanager
def restless(*steps: Callable[[], None]) -> Iterator[None]:
    """Take the steps in turn, again and again, beside what the block does."""
    over = threading.Event()

    def step() -> None:
        while not over.wait(0.001):
            for one in steps:
                one()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(step)
        yield
        over.set()
        done.result()


def states(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of every entry what a write to it would change."""
    found = {}
    for entry in os.scandir(folder):
        state = entry.stat(follow_symlinks=False)
        found[entry.name] = (state.st_ino, state.st_mode, state.st_size, state.st_ctime_ns)
    return found


def test_what_goes_grows_and_changes_under_the_command_is_a_row_that_is_true(odd: Path) -> None:
    """Also the last word on a source that nobody may write to: no entry of it is touched."""
    folder, table = odd / "odd", odd / "data" / "source" / "listing.parquet"
    known = odd / "runs" / "listing" / "files.sqlite"
    known.unlink()
    before = states(folder)
    growing, replaced, gone = (folder / f"{name}.jpg" for name in ("growing", "replaced", "gone"))
    # So long that nobody reads it between two steps.
    growing.write_bytes((SAMPLE / GOOD[0]).read_bytes() + bytes(64 * 2**20))
    versions = [(SAMPLE / name).read_bytes() for name in GOOD[:2]]
    for path in (replaced, gone):
        path.write_bytes(versions[0])
    turn = itertools.cycle(versions)

    def grow() -> None:
        with growing.open("ab") as file:
            file.write(b"more")

    def replace() -> None:
        new = folder / ".new"
        new.write_bytes(next(turn))
        new.replace(replaced)

    def go() -> None:
        # It is made when everything is listed, before the workers start that read.
        if known.exists():
            gone.unlink(missing_ok=True)

    with restless(grow, replace, go):
        command(odd, "ultraflux", "stage", "run", "source", timeout_s=300)
    rows = pd.read_parquet(table).set_index("name")
    assert rows["integrity"]["growing.jpg"] == "changed while it was read"
    assert rows["integrity"]["gone.jpg"] == "cannot read: No such file or directory"
    whole = {hashlib.sha256(data).hexdigest(): len(data) for data in versions}
    found = rows.loc["replaced.jpg"]
    if found["integrity"] == "ok":
        assert whole[found["sha256"]] == found["size_bytes"]
    else:
        assert found["integrity"] == "changed while it was read"
    for path in (growing, replaced):
        path.unlink()
    assert states(folder) == before


class _Misbehaving(BaseHTTPRequestHandler):
    """/NAME: a bundled photograph; /gone: 404; /busy-NAME: 429 once; /cut-NAME; /page: HTML."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, name = self.path.strip("/").rpartition("!")
        with self.server.lock:
            self.server.count[self.path] += 1
            first = self.server.count[self.path] == 1
        time.sleep(self.server.delay_s)
        status, headers = 200, {}
        body = (SAMPLE / name).read_bytes() if name in CAPTIONS else b""
        if kind == "gone":
            status, body = 404, b""
        elif kind == "page":
            body = b"<html>" + bytes(9000)
        elif kind == "busy" and first:
            status, body, headers = 429, b"", {"Retry-After": "0"}
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        # A killed client.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind == "cut"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Misbehaving)
    server.count, server.lock, server.delay_s = Counter(), threading.Lock(), 0.05
    server.base = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def addresses(base: str) -> list[dict[str, Any]]:
    """Five photographs with captions, one of them from a busy host, and three losses."""
    kinds = ["!", "!", "busy!", "!", "!"]
    records = [
        {
            "image_url": f"{base}/{kind}{name}",
            "en_caption": CAPTIONS[name]["caption_en"],
            "caption_zh": CAPTIONS[name]["caption_zh"],
            "photographer": "Ada",
            "license": "CC0",
        }
        for kind, name in zip(kinds, GOOD, strict=True)
    ]
    lost = [{"image_url": f"{base}/{path}"} for path in ("gone!1", f"cut!{GOOD[0]}", "page!1")]
    return [*records[:2], *lost, *records[2:]]


def make_folder(project: Path, base: str) -> dict[str, Any]:
    folder = project / "in"
    for name in GOOD:
        shutil.copy(SAMPLE / name, folder)
    lines = [json.dumps(CAPTIONS[name]) for name in GOOD]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    return {"ingest.kind": "folder"}


def make_urls(project: Path, base: str) -> dict[str, Any]:
    records = [{**record, "url": record["image_url"]} for record in addresses(base)]
    for record in records:
        del record["image_url"]
    (project / "in" / "list.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return {"ingest.kind": "urls"}


def make_archives(project: Path, base: str) -> dict[str, Any]:
    for number, names in enumerate((GOOD[:3], GOOD[3:])):
        with tarfile.open(project / "in" / f"{number:03}.tar", "w") as archive:
            for name in names:
                caption = CAPTIONS[name]
                fields = {"caption": caption["caption_en"], "caption_zh": caption["caption_zh"]}
                parts = {".jpg": (SAMPLE / name).read_bytes(), ".json": json.dumps(fields).encode()}
                for ending, data in parts.items():
                    member = tarfile.TarInfo(Path(name).stem + ending)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return {"ingest.kind": "webdataset"}


def make_released(project: Path, base: str) -> dict[str, Any]:
    records = addresses(base)
    for number in range(2):
        (project / "in" / f"{number:04}.json").write_text(json.dumps(records[number::2]))
    return {"ingest.kind": "multiaspect"}


MAKERS = {
    "folder": make_folder,
    "urls": make_urls,
    "webdataset": make_archives,
    "multiaspect": make_released,
}
LOSSES = {"not_found": 1, "truncated": 1, "wrong_content": 1}


def project_with(clone: Callable[..., Path], kind: str, name: str, base: str) -> Path:
    project = clone(name, {}, [])
    (project / "in").mkdir()
    settings = MAKERS[kind](project, base) | FASTER | {"ingest.source": "in"}
    settings |= {
        "ingest.download.private_hosts": ["127.0.0.1"],
        "ingest.download.retries": 1,
        "ingest.download.backoff_s": 0.1,
        "ingest.download.requests_per_second": 1000.0,
    }
    small_project.change_settings(project, settings)
    return project


def kill_in_stage(project: Path, stage: str, words: tuple[str, ...]) -> bool:
    """Start a command, kill all of it while a stage runs; whether the stage was met."""
    started = subprocess.Popen(
        words, cwd=project, env=environment(project),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    process = psutil.Process(started.pid)
    deadline = time.monotonic() + 300
    while started.poll() is None and time.monotonic() < deadline:
        for child in process.children(recursive=True):
            try:
                line = child.cmdline()
            except psutil.Error:
                continue
            state = project / "runs" / ("listing" if stage == "source" else stage)
            if line[-3:] == ["stage", "run", stage] and state.exists():
                end_all(process)
                started.wait(30)
                return True
        time.sleep(0.02)
    end_all(process)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_a_source_reaches_slices_by_both_commands_killed_once_with_the_same_bytes(
    clone: Callable[..., Path], web: Any, kind: str
) -> None:
    calm = project_with(clone, kind, f"{kind}-calm", web.base)
    command(calm, "ultraflux", "run", "--until", "slices")
    killed = project_with(clone, kind, f"{kind}-killed", web.base)
    repro = ("dvc", "repro", "slices")
    assert kill_in_stage(killed, "source" if kind == "folder" else "ingest", repro)
    command(killed, *repro)
    for name in TABLES:
        file = f"data/{name}.parquet"
        assert (killed / file).read_bytes() == (calm / file).read_bytes(), name
    kept = table(calm, "ingest/manifest")
    assert (kept["integrity"] == "ok").sum() == len(GOOD)
    losses = Counter(table(calm, "ingest/losses")["cause"])
    assert losses == (Counter(LOSSES) if kind in ("urls", "multiaspect") else Counter())
    # Clones agree on the whole lock, the table of the source included.
    locks = [yaml.safe_load((one / "dvc.lock").read_text()) for one in (calm, killed)]
    assert locks[0] == locks[1]
    # The other command finds nothing to do.
    lock = (calm / "dvc.lock").read_bytes()
    assert "done" not in command(calm, "ultraflux", "run", "--until", "slices").split()
    command(calm, *repro)
    assert (calm / "dvc.lock").read_bytes() == lock


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["urls", "webdataset", "multiaspect"])
def test_a_rehearsal_of_records_passes_every_stage_and_leaves_the_clone_alone(
    clone: Callable[..., Path], web: Any, kind: str
) -> None:
    project = project_with(clone, kind, f"{kind}-rehearsed", web.base)
    web.count.clear()
    said = command(project, "ultraflux", "corpus", "rehearse", "-n", "4")
    # Archives are counted by their members, two for each photograph.
    assert f"4 of {10 if kind == 'webdataset' else 8} items" in said
    outcome = json.loads((project / "runs" / "rehearsal.json").read_text())
    assert {stage["status"] for stage in outcome["stages"]} == {"ok"}
    stages = {stage["stage"]: stage for stage in outcome["stages"]}
    assert stages["slices"]["rows_out"] >= 2
    # Nobody was asked for the records behind the sample.
    assert len(web.count) == (0 if kind == "webdataset" else 4)
    assert not (project / "data" / "ingest").exists()
    assert not (project / "dvc.lock").exists()
