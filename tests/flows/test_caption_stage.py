"""The stage `caption` with models behind a local server: one-line failures, resume, no key."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from components.corpus.manifest import read_table, write_table
from components.corpus.parquet_files import write_parquet
from components.corpus.signals import DERIVATIVES_SCHEMA
from components.settings import Settings, SettingsError, load_settings, parse_settings
from components.training.metric_log import MetricLog
from flows.stages import caption
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[2]
KEY = "sk-another-secret-987654"


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked += 1
        is_picture = isinstance(body["messages"][0]["content"], list)
        text = "a calm lake below red hills" if is_picture else "红色山丘下平静的湖"
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
    Handler.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Five selected pictures and a rejected one."""
    (tmp_path / "data" / "select").mkdir(parents=True)
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
    write_table(table, tmp_path / "data" / "select" / "manifest.parquet")
    rows = [{"image_id": n, "height": 1, "width": 1, "jpeg": n.encode()} for n in names]
    derivatives = pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA)
    write_parquet(derivatives, tmp_path / "data" / "signals" / "derivatives.parquet")
    return tmp_path


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
    assert table["caption_zh"].tolist()[:5] == ["红色山丘下平静的湖"] * 5
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
    with pytest.raises(SettingsError, match="not one of a generated caption"):
        parse_settings(values)
