"""The quality and people stages with models behind them; the human channel from list to verdict."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from skimage import data
from tiny_layers_model import tiny_model

from components.corpus.manifest import read_table, write_table
from components.corpus.people.faces import FACE_SCORER
from components.corpus.people.looking import look_for_people
from components.corpus.people.nsfwjs import load_network
from components.corpus.quality.artimuse import LinearTestScorer
from components.corpus.quality.artimuse_server import ScorerServer
from components.corpus.quality.scorer_protocol import ScorerIdentity
from components.files.parquet_files import write_parquet
from components.files.weight_folders import folder_digest
from components.images.decoding import decode_rgb
from components.settings.schema import load_settings, parse_settings
from components.signals.candidate import DERIVATIVES_SCHEMA, derivative_jpeg
from components.telemetry.metric_log import MetricLog
from flows.stages.contract import StageContext, StageFailed, StageResult

ROOT = Path(__file__).parents[3]
IMAGES = 20
RUN_QUALITY = """\
import sys
from pathlib import Path
from components.settings.schema import load_settings
from components.telemetry.metric_log import MetricLog
from flows.stages import quality
from flows.stages.contract import StageContext
root = Path(sys.argv[1])
state = root / "runs" / "quality"
settings = load_settings(root / "params.yaml")
quality.run(StageContext("quality", settings, root, state, MetricLog(state / "metrics.jsonl")))
"""


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    found = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    found["runtime"]["workers"] = 1
    found["people"]["boxes"] = None
    contracts = ROOT / "data" / "contracts"
    found["validation"] = {name: str(contracts / f"{name}.yaml") for name in found["validation"]}
    for name, changes in sections.items():
        found[name] |= changes
    return found


def run(stage: str, root: Path, found: dict[str, Any]) -> StageResult:
    state = root / "runs" / stage
    metrics = MetricLog(state / "metrics.jsonl")
    context = StageContext(stage, parse_settings(found), root, state, metrics)
    return importlib.import_module(f"flows.stages.{stage}").run(context)


def jpeg(n: int) -> bytes:
    return derivative_jpeg(np.roll(data.astronaut()[::4, ::4], n * 5, axis=1), 128)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project whose signals stage left 20 derivatives."""
    rows = [
        {"image_id": f"{n:064x}", "height": 512, "width": 512, "jpeg": jpeg(n)}
        for n in range(IMAGES)
    ]
    table = pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA)
    write_parquet(table, tmp_path / "data" / "signals" / "derivatives.parquet")
    return tmp_path


class CountingScorer:
    """The test scorer; counts what it is paid for, and can be slow."""

    def __init__(self) -> None:
        self.linear = LinearTestScorer(1)
        self.asked: Counter[bytes] = Counter()
        self.delay_s = 0.0

    def __call__(self, pixels: np.ndarray) -> float:
        time.sleep(self.delay_s)
        self.asked[pixels.tobytes()] += 1
        return self.linear(pixels)


@pytest.fixture
def scorer() -> Iterator[tuple[CountingScorer, str]]:
    server = ScorerServer(("127.0.0.1", 0))
    counting = CountingScorer()
    digest = hashlib.sha256(counting.linear.weights_bytes).hexdigest()
    server.put(counting, ScorerIdentity("test-linear", digest))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield counting, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_quality_by_qalign_and_aesthetics_by_a_scorer_server(
    root: Path, scorer: tuple[CountingScorer, str]
) -> None:
    pytest.importorskip("pyiqa", reason="needs the extra iqa")
    from components.corpus.quality.qalign import QAlign
    from components.corpus.tiny_one_align import write_tiny_one_align

    write_tiny_one_align(root / "one-align", seed=0)
    counting, url = scorer
    found = values(
        quality={
            "scorer": "qalign",
            "qalign_weights": "one-align",
            "aesthetic_scorer": "artimuse",
            "artimuse_url": url,
        }
    )
    result = run("quality", root, found)
    assert result.tags["scorers"] == "qalign-one-align, test-linear"
    path = root / "data" / "quality" / "quality.parquet"
    table = pq.read_table(path).to_pandas()
    assert set(table["quality_weights"]) == {folder_digest(root / "one-align")}
    weights = hashlib.sha256(counting.linear.weights_bytes).hexdigest()
    assert set(table["aesthetic_weights"]) == {weights}
    assert table["error"].isna().all()
    assert table["quality_score"].between(1, 5).all()
    here = QAlign(root / "one-align", "cpu")
    for n in (0, 7):
        pixels = decode_rgb(jpeg(n)).pixels
        assert table["quality_score"][n] == pytest.approx(here(pixels), abs=1e-6)
        assert table["aesthetic"][n] == pytest.approx(counting.linear(pixels), abs=1e-9)

    (root / "one-align" / "model.safetensors").unlink()
    with pytest.raises(StageFailed, match=r"^quality: Q-Align weights .*get it with: hf download"):
        run("quality", root, found)


@pytest.mark.slow
def test_a_killed_run_asks_the_scorer_for_no_image_twice(
    root: Path, scorer: tuple[CountingScorer, str]
) -> None:
    counting, url = scorer
    found = values(quality={"aesthetic_scorer": "artimuse", "artimuse_url": url})
    (root / "params.yaml").write_text(yaml.safe_dump(found, sort_keys=False))
    counting.delay_s = 0.2
    process = subprocess.Popen([sys.executable, "-c", RUN_QUALITY, str(root)], cwd=ROOT)
    while len(counting.asked) < 7:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The worker ends with its parent; what it had asked for arrives at most.
    time.sleep(1.0)
    counting.delay_s = 0.0
    run("quality", root, found)
    assert len(counting.asked) == IMAGES
    # Only what was on its way at the kill: one picture, and one that the worker had in its hand.
    assert counting.asked.total() <= IMAGES + 2
    resumed = (root / "data" / "quality" / "quality.parquet").read_bytes()
    for folder in ("runs", "data/quality"):
        shutil.rmtree(root / folder)
    run("quality", root, found)
    assert (root / "data" / "quality" / "quality.parquet").read_bytes() == resumed


def test_the_summary_counts_the_scored_and_says_why_others_are_not(tmp_path: Path) -> None:
    pictures = [jpeg(0), jpeg(1), *(derivative_jpeg(np.zeros((1, 1, 3), np.uint8), 128),) * 3]
    edges = [512, 512, 2, 1, 1]
    rows = [
        {"image_id": f"{n:064x}", "height": edge, "width": edge, "jpeg": picture}
        for n, (edge, picture) in enumerate(zip(edges, pictures, strict=True))
    ]
    table = pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA)
    write_parquet(table, tmp_path / "data" / "signals" / "derivatives.parquet")
    found = values(quality={"scorer": "classical", "aesthetic_scorer": "classical"})
    result = run("quality", tmp_path, found)
    assert result.summary == (
        "2 scored by classical-aesthetic-v1, classical-quality-v1; 3 without both scores, "
        "most often: 1x1: too small to be scored"
    )
    assert result.metrics["scored"] == 2.0


def test_a_scorer_that_is_not_there_is_one_line_with_its_address(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = values(
        quality={"aesthetic_scorer": "artimuse", "artimuse_url": "http://127.0.0.1:9"},
    )
    monkeypatch.setattr("components.corpus.quality.scorer_protocol._BACKOFF_S", 0.001)
    with pytest.raises(StageFailed, match=r"^quality: http://127\.0\.0\.1:9/identity") as caught:
        run("quality", root, found)
    assert "\n" not in str(caught.value)


def test_weights_of_scores_made_elsewhere_stay_beside_them(root: Path) -> None:
    ids = [f"{n:064x}" for n in range(IMAGES)]
    scores = pd.DataFrame({"image_id": ids, "quality": 4.5, "quality_scorer": "q-align"})
    digests = ["ab" * 32, *[None] * (IMAGES - 1)]
    scores.assign(quality_weights=digests).to_csv(root / "scores.csv", index=False)
    run("quality", root, values(quality={"scorer": "table", "scores": "scores.csv"}))
    table = pq.read_table(root / "data" / "quality" / "quality.parquet").to_pandas()
    assert table["quality_weights"][0] == "ab" * 32
    assert table["quality_weights"][1:].isna().all()
    scores.to_csv(root / "scores.csv", index=False)
    run("quality", root, values(quality={"scorer": "table", "scores": "scores.csv"}))
    table = pq.read_table(root / "data" / "quality" / "quality.parquet").to_pandas()
    assert table["quality_weights"].isna().all()


def test_the_detector_looks_at_what_the_table_of_boxes_does_not_have(root: Path) -> None:
    ids = [f"{n:064x}" for n in range(IMAGES)]
    box = {"label": "person", "box": [0, 0, 100, 50]}
    pd.DataFrame(
        {
            # Not in the order of the corpus, and with an image that is not in it.
            "image_id": [ids[7], ids[2], "f" * 64],
            "person_count": [1, 0, 0],
            "person_boxes": [json.dumps([box]), "[]", "[]"],
            "person_scorer": "hand",
        }
    ).to_csv(root / "boxes.csv", index=False)
    manifest = pd.DataFrame({"image_id": ids, "query": None, "source": "x"})
    manifest.to_parquet(root / "manifest.parquet")
    people = {"detector": "classical", "boxes": "boxes.csv", "nsfw": {"scorer": "nudenet"}}
    people["nsfw"]["weights"] = None
    settings = parse_settings(values(people=people))
    derivatives = root / "data" / "signals" / "derivatives.parquet"

    def looked() -> pd.DataFrame:
        path = root / "people.parquet"
        look_for_people(derivatives, manifest, path, settings, state_dir=root / "state", root=root)
        return pq.read_table(path).to_pandas()

    table = looked()
    assert table["image_id"].tolist() == ids
    by_hand = table["person_scorer"] == "hand"
    assert table.index[by_hand].tolist() == [2, 7]
    assert table.loc[by_hand, "person_count"].tolist() == [0, 1]
    assert (table.loc[~by_hand, "person_scorer"] == FACE_SCORER).all()
    assert (table["is_character"] == (table["person_count"] > 0)).all()
    # Boxes say nothing of NSFW: every image has that score.
    assert table["nsfw_score"].notna().all()
    pd.testing.assert_frame_equal(looked(), table)


def test_nsfwjs_scores_every_photograph_or_says_how_to_get_its_weights(root: Path) -> None:
    found = values(people={"nsfw": {"scorer": "nsfwjs", "weights": None}})
    manifest = pd.DataFrame(
        {"image_id": [f"{n:064x}" for n in range(IMAGES)], "uri": "x", "source": "x"}
    )
    write_table(manifest, root / "data" / "ingest" / "manifest.parquet")
    missing = r"^people: .*weights/nsfwjs; get it with: ultraflux weights get nsfwjs$"
    with pytest.raises(StageFailed, match=missing):
        run("people", root, found)
    folder = root / "weights" / "nsfwjs"
    folder.mkdir(parents=True)
    model, weights, _ = tiny_model()
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "weights.bin").write_bytes(weights)
    result = run("people", root, found)
    assert result.tags["nsfw_scorer"] == "nsfwjs-mobilenet_v2"
    table = pq.read_table(root / "data" / "people" / "people.parquet").to_pandas()
    assert table["error"].isna().all()
    assert set(table["nsfw_weights"]) == {folder_digest(folder)}
    network = load_network(folder)
    for n in (0, 7):
        classes = network.classify(decode_rgb(jpeg(n)).pixels)
        assert table["nsfw_score"][n] == pytest.approx(classes.nsfw_score, abs=1e-6)
        assert table["drawing_score"][n] == pytest.approx(classes.drawing_score, abs=1e-6)
    assert table["drawing_score"].nunique() > 10


def portrait(seed: int) -> bytes:
    """A PNG of noise, whose seed 2 and 3 are half flat."""
    pixels = np.random.default_rng(seed).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    if seed in (2, 3):
        pixels[:, :264] = 128
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class _Photos(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = portrait(int(self.path.rsplit("/", 1)[1]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_two_channels_from_one_list_meet_their_own_rules_in_one_manifest(tmp_path: Path) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Photos)
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    base = f"http://127.0.0.1:{web.server_port}"
    queries = {0: "mountain lake", 1: "portrait photo", 2: "mountain lake", 3: "portrait photo"}
    rows = [{"url": f"{base}/photo/{n}", "query": query} for n, query in queries.items()]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "exclusions.csv").write_text("kind,value,why\n")
    found = values(
        people={"human_queries": ["Portrait photo"]},
        select={"min_pixels": 480 * 480, "max_flat_fraction": 0.4, "min_entropy_bits": 1.0},
    )
    found["ingest"] |= {"kind": "urls", "source": "list.jsonl", "attribution": None}
    found["ingest"]["download"] |= {"min_pixels": 480 * 480, "private_hosts": ["127.0.0.1"]}
    found["select"]["human"] |= {"min_entropy_bits": 1.0}
    found["signals"] |= {"timeout_s": 60.0}
    try:
        for stage in ("ingest", "signals", "quality", "people", "select"):
            run(stage, tmp_path, found)
    finally:
        web.shutdown()
        web.server_close()
    table = read_table(tmp_path / "data" / "select" / "manifest.parquet")
    table.index = [int(url.rsplit("/", 1)[1]) for url in table["image_url"]]
    table = table.sort_index()
    assert table["channel"].tolist() == ["general", "human", "general", "human"]
    # Half of 2 and 3 is flat: a reason in the general channel, none in the human one.
    assert table["kept"].tolist() == [True, True, False, True]
    assert table["reject_reason"][2] == "flat_fraction"
    assert table["is_character"].notna().all()
    # The other rules hold in both; the human channel has a threshold of its own.
    found["select"]["human"] |= {"min_entropy_bits": 6.0}
    run("select", tmp_path, found)
    table = read_table(tmp_path / "data" / "select" / "manifest.parquet")
    verdicts = table.groupby("channel")["reject_reason"].agg(lambda c: sorted(c.dropna()))
    assert verdicts.to_dict() == {"general": ["flat_fraction"], "human": ["entropy"]}
