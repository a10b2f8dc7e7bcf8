"""The ingest stage on lists, metadata and archives; a real server; kill -9 and resume."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from components.corpus.manifest import read_table
from components.corpus.selection.rights import Exclusion, Exclusions
from components.corpus.selection.why import find
from components.settings.schema import Settings, load_settings, parse_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import ingest
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[3]
SIDE_FILES = ("manifest.parquet", "losses.parquet", "unknown_columns.parquet", "coverage.json")
RUN_STAGE = """\
import sys
from pathlib import Path
from components.settings.schema import load_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import ingest
from flows.stages.contract import StageContext
root = Path(sys.argv[1])
state = root / "runs" / "ingest" / "key"
ingest.run(
    StageContext("ingest", load_settings(root / "params.yaml"), root, state, MetricLog(state / "m"))
)
"""


def photograph(seed: int, height: int | None = None) -> bytes:
    shape = (height or 64 + seed, 80, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


class _Photos(BaseHTTPRequestHandler):
    """/photo/N: photograph N; /gone/N: 404; a query string does not change it. Counts requests.

    And misbehaviour: /cut/N ends early, /page/N is HTML, /busy/N answers 429 once, /down/N 503
    always, /inside/N leads to a private address, /tiny/N is too small, /optout/N has a robots tag.
    """

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind, _, number = self.path.partition("?")[0].strip("/").partition("/")
        with self.server.lock:
            self.server.count[self.path] += 1
        time.sleep(self.server.delay_s)
        places = {"photo": 0, "busy": 100, "cut": 200, "optout": 300}
        body = photograph(int(number) + places[kind]) if kind in places else b""
        status, headers = 200, {}
        if kind == "gone":
            status = 404
        elif kind == "page":
            body = b"<html>" + bytes(9000)
        elif kind == "tiny":
            body = photograph(0, height=8)
        elif kind == "down":
            status = 503
        elif kind == "inside":
            status, headers = 302, {"Location": f"http://10.0.0.1/{number}.jpg"}
        elif kind == "busy" and self.server.count[self.path] == 1:
            status, body, headers = 429, b"", {"Retry-After": "0"}
        elif kind == "optout":
            headers = {"X-Robots-Tag": "noimageai"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind == "cut"

    def log_message(self, *rest: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Photos)
    server.count, server.lock, server.delay_s = Counter(), threading.Lock(), 0.0
    server.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def values(kind: str, source: str, **download: object) -> dict[str, Any]:
    """The committed settings with another source."""
    found = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    found["ingest"] |= {"kind": kind, "source": source}
    contracts = ROOT / "data" / "contracts"
    found["validation"] = {n: str(contracts / f"{n}.yaml") for n in found["validation"]}
    found["ingest"]["download"] |= {
        "min_pixels": 64 * 80,
        "requests_per_second": 1000.0,
        "private_hosts": ["127.0.0.1"],
        "backoff_s": 0.01,
        **download,
    }
    return found


def run(root: Path, settings: Settings, first: int | None = None) -> StageResult:
    state = root / "runs" / "ingest" / "key"
    log = MetricLog(state / "m.jsonl")
    return ingest.run(StageContext("ingest", settings, root, state, log, first=first))


def accounted(root: Path, result: StageResult) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Manifest and losses; asserts that together they are all candidates."""
    folder = root / "data" / "ingest"
    manifest = read_table(folder / "manifest.parquet")
    losses = pd.read_parquet(folder / "losses.parquet")
    assert result.metrics["candidates"] == len(manifest) + len(losses)
    assert result.metrics["losses"] == len(losses)
    by_cause = {f"lost_{cause}": n for cause, n in losses["cause"].value_counts().items()}
    assert {k: v for k, v in result.metrics.items() if k.startswith("lost_")} == by_cause
    for row in manifest.itertuples():
        assert hashlib.sha256((root / row.uri).read_bytes()).hexdigest() == row.image_id
    files = [path for path in (folder / "originals").rglob("*") if path.is_file()]
    assert len(files) == len(manifest)
    return manifest, losses


def test_a_list_becomes_a_manifest_with_provenance_and_exact_losses(
    tmp_path: Path, web: Any
) -> None:
    rows = [
        {"url": f"{web.base}/photo/1", "artist": "Ada", "license": "CC0", "mood": "calm"},
        {"url": f"{web.base}/gone/2", "artist": "Bob"},
        {"url": f"{web.base}/photo/3", "query": "lake", "photo_url": "http://w/3"},
        {"url": f"{web.base}/photo/../photo/1#again"},
        {"url": f"{web.base}/photo/1?same=bytes"},
        {"url": ""},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n{\n")
    result = run(tmp_path, parse_settings(values("urls", "list.jsonl")))
    manifest, losses = accounted(tmp_path, result)
    first, second = manifest.to_dict("records")
    assert (first["height"], first["width"], first["integrity"]) == (65, 80, "ok")
    assert (first["photographer"], first["license"], first["source"]) == ("Ada", "CC0", "list")
    assert (second["query"], second["work_url"]) == ("lake", "http://w/3")
    assert second["image_url"] == f"{web.base}/photo/3"
    assert losses[["record", "cause", "attempts"]].to_numpy().tolist() == [
        ["list.jsonl:2", "not_found", 1],
        ["list.jsonl:4", "duplicate_url", 0],
        ["list.jsonl:5", "duplicate_bytes", 1],
        ["list.jsonl:6", "missing_url", 0],
        ["list.jsonl:7", "broken_record", 0],
    ]
    unknown = pd.read_parquet(tmp_path / "data" / "ingest" / "unknown_columns.parquet")
    assert unknown["extra"].tolist() == ['{"mood": "calm"}']
    assert unknown["image_id"].tolist() == [first["image_id"]]


def test_dropped_records_leave_their_credit_and_caption_with_the_photograph(
    tmp_path: Path, web: Any
) -> None:
    jane = {"artist": "Jane Forget", "license": "CC-BY-NC-4.0"}
    rows = [
        {"url": f"{web.base}/photo/1", "artist": "A", "license": "CC0"},
        {"url": f"{web.base}/photo/1#again", **jane, "caption": "a lake"},
        {"url": f"{web.base}/photo/3"},
        {"url": f"{web.base}/photo/3?same=bytes", **jane},
        {"url": f"{web.base}/photo/40", "artist": "A", "caption": "own words"},
        {"url": f"{web.base}/photo/40", "artist": "A", "caption": "other words"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest, losses = accounted(
        tmp_path, run(tmp_path, parse_settings(values("urls", "list.jsonl")))
    )
    causes = ["duplicate_url", "duplicate_bytes", "duplicate_url"]
    assert losses["cause"].tolist() == causes
    assert manifest["photographer"].tolist() == ["A", "Jane Forget", "A"]
    assert manifest["caption_en"].fillna("").tolist() == ["a lake", "", "own words"]
    assert manifest["other_credits"].notna().tolist() == [True, True, False]
    path = tmp_path / "data" / "ingest" / "manifest.parquet"
    ids = manifest["image_id"].tolist()
    assert Exclusions([Exclusion("photographer", "jane forget")]).images(path) == set(ids[:2])
    # An address means its photograph also where another record brought the bytes.
    assert find(manifest, f"{web.base}/photo/3?same=bytes", tmp_path) == 1


def test_files_of_a_kind_that_is_not_read_are_counted_and_named(tmp_path: Path, web: Any) -> None:
    lists = tmp_path / "lists"
    (lists / "more").mkdir(parents=True)
    (lists / "a.csv").write_text(f"url\n{web.base}/photo/1\n")
    for name in ("b.feather", "c.csv.bz2", "more/d.bz2", "README", ".DS_Store"):
        (lists / name).touch()
    result = run(tmp_path, parse_settings(values("urls", "lists")))
    assert "1 kept; 4 files are not read, such as c.csv.bz2; " in result.summary
    coverage = json.loads((tmp_path / "data" / "ingest" / "coverage.json").read_text())
    assert coverage["remark"] == "4 files are not read, such as c.csv.bz2"
    assert coverage["ledger"]["totals"]["files"]["apart"] == {
        "not read, no ending": 1,
        "not read, .feather": 1,
        "not read, .bz2": 2,
    }


def test_other_bounds_judge_what_is_there_again_without_fetching(tmp_path: Path, web: Any) -> None:
    lines = ["url", *(f"{web.base}/photo/{n}" for n in (1, 40)), f"{web.base}/gone/1"]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    run(tmp_path, parse_settings(values("urls", "list.csv")))
    before = Counter(web.count)
    result = run(tmp_path, parse_settings(values("urls", "list.csv", min_pixels=80 * 80)))
    manifest, losses = accounted(tmp_path, result)
    assert manifest["height"].tolist() == [104]
    assert losses["cause"].tolist() == ["too_small", "not_found"]
    # A loss is asked for again under other settings, an original is not.
    assert Counter(web.count) - before == Counter({"/gone/1": 1})
    # What no row names is gone; lower bounds bring it back.
    result = run(tmp_path, parse_settings(values("urls", "list.csv")))
    assert len(accounted(tmp_path, result)[0]) == 2


def test_released_metadata_brings_captions_and_coverage(tmp_path: Path, web: Any) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        records = [
            {"image_url": f"{web.base}/photo/{number * 3 + n}", "en_caption": f"caption {n}"}
            for n in range(3)
        ]
        (shards / f"{number:04}.json").write_text(json.dumps([*records, 5]))
    result = run(tmp_path, parse_settings(values("multiaspect", "shards")))
    manifest, losses = accounted(tmp_path, result)
    assert manifest["caption_en"].tolist() == ["caption 0", "caption 1", "caption 2"] * 2
    assert losses["cause"].tolist() == ["broken_record"] * 2
    coverage = json.loads((tmp_path / "data" / "ingest" / "coverage.json").read_text())
    assert coverage["records"] == 8
    assert coverage["field_share"]["caption_en"] == 0.75


def test_metadata_over_a_misbehaving_host_is_accounted_for_to_the_last_record(
    tmp_path: Path, web: Any
) -> None:
    expected = {
        "photo": None,
        "busy": None,
        "gone": "not_found",
        "cut": "truncated",
        "page": "wrong_content",
        "down": "server_error",
        "inside": "refused_address",
        "tiny": "too_small",
        "optout": "robots",
    }
    records: list[Any] = [
        {
            "image_url": f"{web.base}/{kind}/{number}",
            "en_caption": f"{kind} number {number}",
            "id": f"{kind}-{number}",
            "photographer": "Ada",
            "aspect": "16:9",
            "exif": {"iso": 100 * number},
        }
        for number in range(1, 5)
        for kind in expected
    ]
    good = records[0]
    odd = [
        "text",
        None,
        {"en_caption": "no address"},
        {"image_url": float("nan")},
        {"image_url": ["a list"]},
        {"image_url": "../../etc/passwd"},
        {"image_url": "file:///etc/passwd"},
        {**good, "id": "again"},
        {**good, "image_url": f"{web.base}/photo/2#part"},
        {**good, "image_url": f"{web.base}/photo/9", "en_caption": 5, "id": good["id"]},
    ]
    causes = ["broken_record"] * 2 + ["missing_url"] * 2 + ["wrong_type"] + ["bad_url"] * 2
    causes += ["duplicate_url"] * 2
    shards = tmp_path / "shards"
    shards.mkdir()
    everything = [*records, *odd]
    for shard in range(3):
        part = everything[shard::3]
        (shards / f"{shard:04}.json").write_text(json.dumps(part))
    (shards / "0003.json").write_text(json.dumps(records)[:-20])
    settings = parse_settings(values("multiaspect", "shards", retries=1))
    result = run(tmp_path, settings)
    manifest, losses = accounted(tmp_path, result)
    # The shard that is cut counts as one record.
    assert result.metrics["candidates"] == len(everything) + 1
    wanted = Counter(cause for cause in expected.values() if cause for _ in range(4))
    wanted += Counter([*causes, "broken_record"])
    assert Counter(losses["cause"]) == wanted
    assert len(manifest) == 4 + 4 + 1
    by_id = {row["record_id"]: row for row in manifest.to_dict("records")}
    row = by_id["busy-3"]
    assert (row["caption_en"], row["photographer"]) == ("busy number 3", "Ada")
    assert json.loads(row["source_fields"]) == {"aspect": "16:9", "exif": {"iso": 300}}
    report = json.loads((tmp_path / "data" / "ingest" / "coverage.json").read_text())
    assert report["records"] == result.metrics["candidates"]
    assert report["unknown_keys"]["aspect"] == len(records) + 3
    assert report["problems"]["duplicate_id"] == 2
    assert report["wrong_type"] == {"caption_en": 1, "image_url": 1}
    again = run(tmp_path, settings)
    assert again.metrics == result.metrics


def test_archives_give_the_same_bytes_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (
            ("1.jpg", photograph(1)),
            ("1.json", b'{"author": "Ada", "odd": 1}'),
            ("2.jpg", b"no"),
            ("3.jpg", photograph(1)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    settings = parse_settings(values("webdataset", "a.tar"))
    manifest, losses = accounted(tmp_path, run(tmp_path, settings))
    folder = tmp_path / "data" / "ingest"
    first = [(folder / name).read_bytes() for name in SIDE_FILES]
    assert manifest["photographer"].tolist() == ["Ada"]
    assert losses["cause"].tolist() == ["wrong_content", "duplicate_bytes"]
    run(tmp_path, settings)
    assert [(folder / name).read_bytes() for name in SIDE_FILES] == first


def archive(path: Path, photographs: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in photographs.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def test_the_first_records_need_no_more_archives_than_hold_them(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        pair = {f"{number}{n}.jpg": photograph(2 * number + n) for n in range(2)}
        archive(folder / f"{number}.tar", pair)
    # Reading it would be one candidate more: "broken archive".
    (folder / "2.tar").write_bytes(b"no archive")
    settings = parse_settings(values("webdataset", "tars"))
    for first, archives in ((1, []), (2, []), (3, ["0.tar"]), (4, ["0.tar"])):
        manifest, losses = accounted(tmp_path, run(tmp_path, settings, first))
        assert (len(manifest), len(losses)) == (first, 0)
        coverage = json.loads((tmp_path / "data" / "ingest" / "coverage.json").read_text())
        # The counts of archives are no records, and those of one that is not finished are not kept.
        assert [file["file"] for file in coverage["ledger"]["files"]] == archives
    assert len(accounted(tmp_path, run(tmp_path, settings, 99))[1]) == 1


def test_nothing_to_be_had_is_one_line_with_the_causes(tmp_path: Path, web: Any) -> None:
    (tmp_path / "list.csv").write_text(f"url\n{web.base}/gone/1\n{web.base}/gone/2\n")
    with pytest.raises(StageFailed, match=r"^ingest: none of 2 .*not_found 2.*losses\.parquet"):
        run(tmp_path, parse_settings(values("urls", "list.csv")))
    with pytest.raises(StageFailed, match=r"^ingest: nowhere\.csv: no such file.*ingest\.source"):
        run(tmp_path, parse_settings(values("urls", "nowhere.csv")))


def finished(root: Path) -> set[str]:
    """Addresses with an outcome in the journal."""
    journal = root / "runs" / "downloads" / "journal.sqlite"
    if not journal.exists():
        return set()
    with sqlite3.connect(journal) as database:
        try:
            return {row[0] for row in database.execute("select key from outcomes")}
        except sqlite3.OperationalError:
            return set()


def test_a_killed_download_resumes_to_the_same_bytes_and_repeats_nothing(
    tmp_path: Path, web: Any
) -> None:
    paths = [f"/photo/{n}" if n % 4 else f"/gone/{n}" for n in range(48)]
    roots = [tmp_path / "calm", tmp_path / "killed"]
    for root in roots:
        root.mkdir()
        lines = [f"{web.base}{path},{n}" for n, path in enumerate(paths)]
        (root / "list.csv").write_text("\n".join(["url,rank", *lines]) + "\n")
        settings = values("urls", "list.csv", concurrency=3, host_connections=3)
        (root / "params.yaml").write_text(yaml.safe_dump(settings))
    calm, killed = roots
    run(calm, load_settings(calm / "params.yaml"))

    web.count.clear()
    web.delay_s = 0.03
    settled: dict[str, int] = {}
    for wanted in (5, 25):
        child = subprocess.Popen([sys.executable, "-c", RUN_STAGE, str(killed)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(finished(killed)) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        done = finished(killed)
        assert wanted <= len(done) < len(paths)
        # Requests of the dead process may still be on their way.
        time.sleep(0.1)
        for path in paths:
            if f"{web.base}{path}" in done:
                settled.setdefault(path, web.count[path])
        assert not (killed / "data" / "ingest" / "manifest.parquet").exists()
    web.delay_s = 0.0
    run(killed, load_settings(killed / "params.yaml"))
    assert {path: web.count[path] for path in settled} == settled
    for name in SIDE_FILES:
        left, right = (root / "data" / "ingest" / name for root in roots)
        assert left.read_bytes() == right.read_bytes(), name
    assert sorted(p.name for p in (calm / "data/ingest/originals").rglob("*")) == sorted(
        p.name for p in (killed / "data/ingest/originals").rglob("*")
    )
    assert len(read_table(killed / "data" / "ingest" / "manifest.parquet")) == 36
