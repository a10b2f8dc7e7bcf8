"""The stage `caption` with models behind a local server: one-line failures, resume, no key."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from components.corpus.manifest import read_table, write_table
from components.files.parquet_files import write_parquet
from components.settings.schema import Settings, SettingsError, load_settings, parse_settings
from components.signals.candidate import DERIVATIVES_SCHEMA
from components.telemetry.metric_log import MetricLog
from flows.stages import caption, ingest, source
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[3]
KEY = "sk-another-secret-987654"
ENGLISH, CHINESE = "a calm lake below red hills", "红色山丘下平静的湖"


RUN_STAGE = """\
import sys
from pathlib import Path
from components.settings.schema import load_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import caption, ingest
from flows.stages.contract import StageContext
root = Path(sys.argv[1])
state = root / "runs" / "caption" / "key"
settings = load_settings(root / "params.yaml")
caption.run(StageContext("caption", settings, root, state, MetricLog(state / "m")))
"""


class Handler(BaseHTTPRequestHandler):
    """Photographs at any address; an answer to any question."""

    asked = 0
    delay_s = 0.0

    def do_GET(self) -> None:
        data = photograph(int(self.path.strip("/")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked += 1
        time.sleep(Handler.delay_s)
        is_picture = isinstance(body["messages"][0]["content"], list)
        text = ENGLISH if is_picture else CHINESE
        message = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        usage = {"usage": {"prompt_tokens": 1000, "completion_tokens": 100}}
        is_known = self.headers["Authorization"] == f"Bearer {KEY}"
        data = json.dumps(message | usage if is_known else {"error": {"message": KEY}}).encode()
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("STAGE_TEST_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Handler.asked, Handler.delay_s = 0, 0.0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def photograph(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Five selected pictures and a rejected one."""
    names = [f"{n:064x}" for n in range(6)]
    rejected = [None] * 5 + ["entropy"]
    table = pd.DataFrame(
        {
            "image_id": names,
            "uri": [f"photos/{n}.jpg" for n in range(6)],
            "kept": [reason is None for reason in rejected],
            "reject_reason": rejected,
        }
    )
    as_selected(tmp_path, table)
    return tmp_path


def as_selected(root: Path, table: pd.DataFrame) -> None:
    """Outputs of the stages `signals` and `select`."""
    write_table(table, root / "data" / "select" / "manifest.parquet")
    rows = [{"image_id": n, "height": 1, "width": 1, "jpeg": n.encode()} for n in table["image_id"]]
    derivatives = pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA)
    write_parquet(derivatives, root / "data" / "signals" / "derivatives.parquet")


def with_endpoint(url: str, cap: float = 1.0, **changes: object) -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    endpoint = {
        "base_url": url,
        "model": "some/vlm",
        "api_key_env": "STAGE_TEST_KEY",
        "temperature": 0.0,
        "max_tokens": 100,
        "seed": 0,
        "reasoning_effort": None,
        "requests_per_minute": 60000.0,
        "concurrency": 2,
        "timeout_s": 5.0,
        "retries": 0,
        "input_usd_per_million": 1.0,
        "output_usd_per_million": 10.0,
    } | changes
    values["caption"] |= {"provider": "endpoint", "endpoint": endpoint, "min_words": 2}
    values["caption"]["max_cost_usd"] = cap
    values["caption"]["translate"] |= {"provider": "endpoint", "endpoint": endpoint}
    return parse_settings(values)


def run(project: Path, settings: Settings) -> StageResult:
    state = project / "runs" / "caption" / "key"
    return caption.run(
        StageContext("caption", settings, project, state, MetricLog(state / "metrics.jsonl"))
    )


def test_models_write_both_languages_into_the_manifest(project: Path, url: str) -> None:
    result = run(project, with_endpoint(url))
    path = project / "data" / "caption" / "manifest.parquet"
    first = path.read_bytes()
    table = read_table(path)
    assert table["caption_status"].tolist()[:5] == ["ok"] * 5
    assert table["caption_zh"].tolist()[:5] == [CHINESE] * 5
    assert table["caption_model"][0] == "some/vlm, prompt detailed-1"
    assert table["translation_model"][0] == "some/vlm, prompt simplified-chinese-1"
    assert table.loc[5, ["caption_en", "caption_status"]].isna().all()
    assert (table["reject_reason"][5], Handler.asked) == ("entropy", 10)
    assert result.metrics["cost_usd"] == pytest.approx(10 * 0.002)
    run(project, with_endpoint(url))
    assert (Handler.asked, path.read_bytes() == first) == (10, True)


def test_the_cap_is_one_line_and_a_raised_cap_goes_on(project: Path, url: str) -> None:
    with pytest.raises(StageFailed, match=r"^caption: spent \$.* of 5 images are left") as caught:
        run(project, with_endpoint(url, cap=0.008))
    assert "\n" not in str(caught.value)
    assert not (project / "data" / "caption" / "manifest.parquet").exists()
    assert 0 < Handler.asked <= 4
    run(project, with_endpoint(url))
    assert Handler.asked == 10


def test_a_refused_or_missing_key_is_one_line_without_it(
    project: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGE_TEST_KEY", "sk-wrong-key")
    with pytest.raises(StageFailed, match="401: the API key is refused; check STAGE_TEST") as one:
        run(project, with_endpoint(url))
    monkeypatch.delenv("STAGE_TEST_KEY")
    with pytest.raises(StageFailed, match="STAGE_TEST_KEY is not set") as two:
        run(project, with_endpoint(url))
    for caught in (one, two):
        assert "sk-" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_file_of_a_project_holds_the_key(project: Path, url: str) -> None:
    run(project, with_endpoint(url))
    for path in project.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "changes", [{"api_key_env": KEY}, {"base_url": f"http://user:{KEY}@127.0.0.1/v1"}]
)
def test_a_key_where_it_does_not_belong_is_refused_and_not_repeated(
    url: str, changes: dict[str, object]
) -> None:
    with pytest.raises(SettingsError, match="value not shown") as caught:
        with_endpoint(url, **changes)
    assert KEY not in str(caught.value)


def test_a_shipped_translation_of_a_generated_caption_is_refused(url: str) -> None:
    values = with_endpoint(url).model_dump(mode="json")
    values["caption"]["translate"] |= {"provider": "shipped", "endpoint": None}
    with pytest.raises(SettingsError, match="not one of a caption that was made here"):
        parse_settings(values)


def write_source(kind: str, root: Path, url: str) -> str:
    """Four photographs: captioned in both languages, in English, by too short a text, not at all.

    Returns:
        the source.
    """
    captions: list[dict[str, object]] = [
        {"en_caption": "a red boat on a lake", "zh_caption": "湖上有一艘红色的小船"},
        {"en_caption": "a blue boat on a lake"},
        {"en_caption": "boat"},
        {},
    ]
    base = url.removesuffix("/v1")
    records = [
        {"image_url": f"{base}/{n}", "id": f"r{n}", "mood": "calm", **texts}
        for n, texts in enumerate(captions)
    ]
    if kind == "multiaspect":
        (root / "shards").mkdir()
        (root / "shards" / "0000.json").write_text(json.dumps(records))
        return "shards"
    if kind == "urls":
        pd.DataFrame(records).to_csv(root / "list.csv", index=False)
        return "list.csv"
    if kind == "folder":
        (root / "photos").mkdir()
        lines = []
        for n, texts in enumerate(captions):
            (root / "photos" / f"{n}.jpg").write_bytes(photograph(n))
            english, chinese = texts.get("en_caption"), texts.get("zh_caption")
            if english:
                lines.append({"file": f"{n}.jpg", "caption_en": english, "caption_zh": chinese})
        text = "\n".join(json.dumps(line) for line in lines)
        (root / "photos" / "captions.jsonl").write_text(text)
        return "photos"
    with tarfile.open(root / "a.tar", "w") as archive:
        for n, texts in enumerate(captions):
            # One sidecar is text, the others JSON.
            english = texts.get("en_caption")
            members = {"jpg": photograph(n), "json": json.dumps(texts).encode()}
            if n == 1:
                members = {"jpg": photograph(n), "txt": str(english).encode()}
            for ending, data in members.items():
                member = tarfile.TarInfo(f"{n:04}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return "a.tar"


@pytest.mark.parametrize("kind", ["folder", "urls", "webdataset", "multiaspect"])
def test_captions_that_came_with_the_images_stay_and_only_gaps_are_paid_for(
    tmp_path: Path, url: str, kind: str
) -> None:
    values = with_endpoint(url).model_dump(mode="json")
    values["ingest"] |= {"kind": kind, "source": write_source(kind, tmp_path, url)}
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {n: str(contracts / f"{n}.yaml") for n in values["validation"]}
    values["ingest"]["attribution"] = None
    values["ingest"]["download"] |= {
        "min_pixels": 1,
        "private_hosts": ["127.0.0.1"],
        "requests_per_second": 1000.0,
    }
    settings = parse_settings(values)
    state = tmp_path / "runs" / "ingest"
    for stage, module in (("source", source), ("ingest", ingest)):
        module.run(StageContext(stage, settings, tmp_path, state, MetricLog(state / "m")))
    table = read_table(tmp_path / "data" / "ingest" / "manifest.parquet")
    as_selected(tmp_path, table.assign(kept=True))
    result = run(tmp_path, settings)
    path = tmp_path / "data" / "caption" / "manifest.parquet"
    rows = read_table(path).to_dict("records")
    assert [row["caption_status"] for row in rows] == ["ok", "ok", "too_short", "ok"]
    assert [row["caption_en"] for row in rows] == [
        "a red boat on a lake",
        "a blue boat on a lake",
        "boat",
        ENGLISH,
    ]
    assert [row["caption_zh"] for row in rows[:2]] == ["湖上有一艘红色的小船", CHINESE]
    assert rows[3]["caption_zh"] == CHINESE
    assert all(row["caption_model"].startswith("provided: ") for row in rows[:3])
    assert rows[0]["translation_model"] == rows[0]["caption_model"]
    assert rows[1]["translation_model"] == "some/vlm, prompt simplified-chinese-1"
    assert rows[3]["caption_model"] == "some/vlm, prompt detailed-1"
    assert (rows[2]["reject_reason"], rows[2]["reject_value"]) == ("caption", 1.0)
    if kind in ("urls", "multiaspect"):
        assert [row["record_id"] for row in rows] == ["r0", "r1", "r2", "r3"]
        assert {row["source_fields"] for row in rows} == {'{"mood": "calm"}'}
    # One caption and two translations.
    assert (Handler.asked, result.metrics["provided"]) == (3, 2.0)
    first = path.read_bytes()
    run(tmp_path, settings)
    assert (Handler.asked, path.read_bytes() == first) == (3, True)
    values["caption"]["provided"] = "replace_failed"
    assert run(tmp_path, parse_settings(values)).metrics["kept"] == 4.0
    assert Handler.asked == 5


@pytest.mark.parametrize("kind", ["folder", "urls", "webdataset", "multiaspect"])
def test_without_models_what_came_with_the_images_is_all_there_is(
    tmp_path: Path, url: str, kind: str
) -> None:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    values["ingest"] |= {"kind": kind, "source": write_source(kind, tmp_path, url)}
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {n: str(contracts / f"{n}.yaml") for n in values["validation"]}
    values["caption"] |= {"min_words": 2}
    names = [f"{n}.jpg" for n in range(4)]
    table = pd.DataFrame({"image_id": names, "uri": [f"photos/{name}" for name in names]})
    if kind != "folder":
        table["caption_en"] = ["a red boat on a lake", "a blue boat on a lake", "boat", None]
        table["caption_zh"] = ["湖上有一艘红色的小船", None, None, None]
    as_selected(tmp_path, table.assign(kept=True))
    result = run(tmp_path, parse_settings(values))
    assert (result.metrics["kept"], result.metrics["provided"]) == (2.0, 2.0)
    assert result.summary.startswith("2 captioned, 2 of them by what came with the images, 2 with")


def test_a_cap_without_prices_is_one_line_before_anything_is_asked(project: Path, url: str) -> None:
    settings = with_endpoint(url, input_usd_per_million=None)
    with pytest.raises(StageFailed, match=r"^caption: caption\.max_cost_usd \(1\) needs prices"):
        run(project, settings)
    assert Handler.asked == 0


def test_a_killed_stage_resumes_to_the_same_bytes_and_repeats_nothing_finished(
    project: Path, url: str
) -> None:
    settings = with_endpoint(url)
    (project / "params.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    Handler.delay_s = 0.3
    child = subprocess.Popen([sys.executable, "-c", RUN_STAGE, str(project)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while Handler.asked < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not (project / "data" / "caption" / "manifest.parquet").exists()
    Handler.delay_s = 0.0
    killed = Handler.asked
    run(project, settings)
    # Ten answers are needed; what was under way at the kill (two threads) may be asked again.
    assert Handler.asked <= 10 + 2
    assert killed >= 4
    path = project / "data" / "caption" / "manifest.parquet"
    resumed = path.read_bytes()
    for file in (project / "runs").glob("caption-requests.sqlite*"):
        file.unlink()
    run(project, settings)
    assert path.read_bytes() == resumed


def folder_project(root: Path, captions: str, **changes: object) -> Settings:
    """Two photographs in a folder, and what is written beside them."""
    photos = root / "photos"
    photos.mkdir()
    (photos / "captions.jsonl").write_text(captions)
    names = ["a.jpg", "b.jpg"]
    for name in names:
        (photos / name).touch()
    table = pd.DataFrame({"image_id": names, "uri": [f"photos/{name}" for name in names]})
    as_selected(root, table.assign(kept=True))
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    values["ingest"] |= {"source": "photos", "attribution": None}
    values["caption"] |= {"min_words": 2, "translate": values["caption"]["translate"]} | changes
    return parse_settings(values)


def caption_line(file: str, text: str) -> str:
    return json.dumps({"file": file, "caption_en": text}) + "\n"


def test_one_bad_line_is_counted_and_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = caption_line("a.jpg", ENGLISH) + "{\n" + caption_line("gone.jpg", ENGLISH)
    settings = folder_project(tmp_path, lines)
    (tmp_path / "photos" / "b.txt").write_text(ENGLISH)
    result = run(tmp_path, settings)
    assert (result.metrics["kept"], result.metrics["lines_lost"]) == (2.0, 2.0)
    assert "2 lines or files left out or mended" in result.summary
    losses = pd.read_parquet(tmp_path / "data" / "caption" / "losses.parquet")
    assert losses["record"].tolist() == ["captions.jsonl line 2", "captions.jsonl line 3"]
    assert "gone.jpg" in losses["detail"][1]


def test_the_message_advises_about_what_is_wrong(tmp_path: Path) -> None:
    sentence = " ".join(f"thing{n}" for n in range(33)) + " here. "
    lines = "".join(caption_line(f"{name}.jpg", sentence * 3) for name in "ab")
    with pytest.raises(StageFailed, match=r"repetitive \(2\): remove what is repeated") as caught:
        run(tmp_path, folder_project(tmp_path, lines, min_words=60, max_words=130))
    assert "min_words" not in str(caught.value)


def test_one_caption_for_all_fills_what_nothing_came_with(tmp_path: Path) -> None:
    none = load_settings(ROOT / "params.yaml").caption.translate.model_dump() | {"provider": "none"}
    fixed = {"provider": "fixed", "text": "a photo of sks dog", "translate": none}
    lines = caption_line("b.jpg", ENGLISH)
    settings = folder_project(tmp_path, lines, min_words=6, **fixed)
    result = run(tmp_path, settings)
    table = read_table(tmp_path / "data" / "caption" / "manifest.parquet")
    assert table["caption_en"].tolist() == ["a photo of sks dog", ENGLISH]
    assert table["caption_status"].tolist() == ["ok", "ok"]
    assert table["caption_model"].tolist() == ["fixed: caption.text", "provided: captions.jsonl"]
    assert result.metrics["captions_cut_t5"] == 0.0
    values = settings.model_dump(mode="json")
    values["caption"]["provided"] = "ignore"
    assert run(tmp_path, parse_settings(values)).metrics["shared_caption"] == 2.0
    values["caption"]["text"] = " "
    with pytest.raises(SettingsError, match=r"caption\.text must say something"):
        parse_settings(values)


def test_what_text_encoders_will_cut_is_said_with_the_captions(tmp_path: Path) -> None:
    long = " ".join(f"boat {n} on the lake" for n in range(40))
    lines = caption_line("a.jpg", ENGLISH) + caption_line("b.jpg", long)
    result = run(tmp_path, folder_project(tmp_path, lines, max_words=400))
    assert (result.metrics["captions_cut_t5"], result.metrics["captions_cut_clip"]) == (1.0, 1.0)
    assert "T5 cuts 1 of 2 captions at 64 tokens (the longest has " in result.summary
    found = json.loads((tmp_path / "data" / "caption" / "text_lengths.json").read_text())
    assert (found["T5"]["limit"], found["T5"]["cut"]) == (64, 1)


def test_a_local_model_that_is_missing_is_one_line_with_the_command(tmp_path: Path) -> None:
    local = {"folder": "weights/none", "batch_size": 2, "max_new_tokens": 8}
    none = load_settings(ROOT / "params.yaml").caption.translate.model_dump() | {"provider": "none"}
    settings = folder_project(tmp_path, "", provider="local", local=local, translate=none)
    with pytest.raises(StageFailed, match=r"^caption: .*weights/none.*hf download Qwen") as caught:
        run(tmp_path, settings)
    assert "\n" not in str(caught.value)
