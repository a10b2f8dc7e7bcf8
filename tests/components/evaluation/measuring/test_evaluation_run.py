"""Metrics over pictures through the ledger: resumed, isolated, never computed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.evaluation.measuring import evaluation_run
from components.evaluation.measuring.evaluation_run import (
    EvaluationRun,
    RunOptions,
    find_picture,
    open_metrics,
    value_key,
)
from components.evaluation.measuring.ledger import FeatureKey, Ledger
from components.metrics.metric import Picture
from components.metrics.native.fidelity import psnr_db
from components.signals.compression import jpeg95_ratio

METRICS = ("compression_ratio", "psnr_db")


def paint(path: Path, seed: int, size: tuple[int, int] = (96, 80)) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    found = find_picture(path)
    return Picture(path, found.sha256)


def pair(picture: Picture, reference: Picture) -> Picture:
    return Picture(picture.path, picture.sha256, "a prompt", reference.path, reference.sha256)


def run(tmp_path: Path, metrics: tuple[str, ...] = METRICS) -> EvaluationRun:
    opened = open_metrics(metrics, tmp_path / "weights", "cpu")
    assert opened.unavailable == {}
    return EvaluationRun(opened, Ledger(tmp_path / "ledger"), RunOptions(tmp_path / "weights"))


def test_values_equal_the_functions_and_one_more_picture_is_one_more_computation(
    tmp_path: Path,
) -> None:
    pictures = [
        pair(paint(tmp_path / f"{n}.png", n), paint(tmp_path / "references" / f"{n}.png", 100 + n))
        for n in range(3)
    ]
    first = run(tmp_path)
    measured = first.measure(pictures, name="test")
    assert first.statistics.decoded == 3
    for picture, numbers in zip(pictures, measured, strict=True):
        rgb = np.asarray(Image.open(picture.path))
        assert picture.reference is not None
        reference = np.asarray(Image.open(picture.reference))
        assert numbers.errors == {}
        assert numbers.values["compression_ratio"] == jpeg95_ratio([rgb])
        assert numbers.values["psnr_db"] == psnr_db(reference, rgb)

    # A broken file, and a new picture: every other value comes from the ledger.
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].path.read_bytes()[:-4000])
    bad = pair(Picture(broken, find_picture(broken).sha256), pictures[1])
    new = pair(paint(tmp_path / "new.png", 9), pictures[1])
    (tmp_path / "moved").mkdir()
    moved_path = pictures[0].path.rename(tmp_path / "moved" / "other.png")
    reference, sha256 = pictures[0].reference, pictures[0].reference_content
    moved = Picture(moved_path, pictures[0].sha256, "a prompt", reference, sha256)
    second = run(tmp_path)
    again = second.measure([moved, *pictures[1:], new, bad], name="test")
    assert second.statistics.decoded == 2
    assert [m.values for m in again[:3]] == [m.values for m in measured]
    assert again[3].errors == {}
    assert set(again[4].errors) >= set(METRICS)
    assert "broken.png" in again[4].errors["psnr_db"]
    # The new one was measured; the broken one is tried again.
    third = run(tmp_path)
    third.measure([moved, *pictures[1:], new], name="test")
    assert third.statistics.decoded == 0


def test_a_metric_that_fails_leaves_the_others(tmp_path: Path) -> None:
    alone = paint(tmp_path / "alone.png", 1)
    (numbers,) = run(tmp_path).measure([alone], name="test")
    assert "reference" in numbers.errors["psnr_db"]
    assert numbers.values["compression_ratio"] is not None


def test_a_broken_reference_costs_its_own_pair_alone(tmp_path: Path) -> None:
    gray = paint(tmp_path / "gray.png", 1)
    references = [paint(tmp_path / f"{n}.png", 100 + n) for n in range(3)]
    broken = tmp_path / "1.png"
    broken.write_bytes(broken.read_bytes()[:-4000])
    references[1] = Picture(broken, find_picture(broken).sha256)
    measured = run(tmp_path).measure([pair(gray, one) for one in references], name="test")
    assert [sorted(one.errors) for one in measured] == [[], ["psnr_db"], []]
    assert measured[0].values["psnr_db"] != measured[2].values["psnr_db"]


def test_missing_weights_and_unknown_ids(tmp_path: Path) -> None:
    opened = open_metrics(["entropy_bits", "hpsv3"], tmp_path, "cpu")
    assert set(opened.unavailable) == {"hpsv3"}
    assert "entropy_bits" in opened.ids
    with pytest.raises(ValueError, match="unknown metric 'sharpness'"):
        open_metrics(["sharpness"], tmp_path, "cpu")


def test_keys_hold_what_a_metric_looks_at_and_no_more(tmp_path: Path) -> None:
    picture = Picture(tmp_path / "a", "i" * 64, "prompt", tmp_path / "b", "r" * 64)
    entropy, psnr = (value_key(name, picture, None) for name in ("entropy_bits", "psnr_db"))
    clip = value_key("clip_score", picture, "w" * 64)
    assert (entropy.reference_sha256, entropy.prompt_sha256, entropy.weights) == ("", "", "")
    assert psnr.reference_sha256 == "r" * 64
    assert len(clip.prompt_sha256) == 64
    assert clip.weights == "w" * 64


def test_another_reading_of_the_same_file_is_measured_anew_and_a_plain_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    pixels = np.random.default_rng(3).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(pixels).save(tmp_path / "plain.png")

    def keys() -> list[str]:
        found = [find_picture(tmp_path / name) for name in ("plain.png", "turned.png")]
        pictures = [Picture(one.path, one.sha256, reading=one.reading) for one in found]
        return [value_key("entropy_bits", one, None).image_sha256 for one in pictures]

    plain, unusual = keys()
    assert plain == find_picture(tmp_path / "plain.png").sha256
    assert unusual != find_picture(tmp_path / "turned.png").sha256
    monkeypatch.setattr(evaluation_run, "SEEN", "another")
    assert keys()[0] == plain
    assert keys()[1] != unusual


def test_a_file_that_is_no_picture_is_found_with_its_reason(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "not an image" in str(find_picture(text).error)
    assert "No such file" in str(find_picture(tmp_path / "none.png").error)


class MeanColour:
    """A set metric for the test: distance of mean colours."""

    ids = ("fid",)
    feature_id = "mean-colour/v1"
    weights_digest = None

    def features(self, rgb: np.ndarray, picture: Picture) -> np.ndarray:
        return rgb.reshape(-1, 3).mean(axis=0, dtype=np.float32)[None]

    def combine(self, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
        return {"fid": float(np.linalg.norm(ours.mean(axis=0) - theirs.mean(axis=0)))}


def test_set_metrics_combine_stored_features(tmp_path: Path) -> None:
    from components.evaluation.measuring.evaluation_run import OpenedMetrics

    ledger = Ledger(tmp_path / "ledger")
    opened = OpenedMetrics((MeanColour(),), {})
    ours = [paint(tmp_path / f"{n}.png", n) for n in range(2)]
    theirs = [paint(tmp_path / f"r{n}.png", 10 + n) for n in range(2)]
    blocks = {p.sha256: np.full((1, 3), v, np.float32) for p, v in zip(ours, (1, 3), strict=True)}
    blocks |= {p.sha256: np.full((1, 3), 5, np.float32) for p in theirs}
    ledger.append_features({FeatureKey(s, "mean-colour/v1", ""): b for s, b in blocks.items()})
    evaluation = EvaluationRun(opened, ledger, RunOptions(tmp_path))
    evaluation.measure(ours, sets_only=theirs, name="test")
    assert evaluation.statistics.decoded == 0
    assert evaluation.combine(ours, theirs) == ({"fid": pytest.approx(27**0.5)}, {})
    values, reasons = evaluation.combine([], theirs)
    assert (values, reasons) == ({}, {"fid": "no system picture has features"})


SCRIPT = """
import json, sys
from pathlib import Path
from components.evaluation.measuring.evaluation_run import EvaluationRun, RunOptions, find_picture
from components.evaluation.measuring.evaluation_run import open_metrics
from components.evaluation.measuring.ledger import Ledger
from components.metrics.metric import Picture

if __name__ == "__main__":
    folder, where = Path(sys.argv[1]), Path(sys.argv[2])
    pictures = [Picture(p, find_picture(p).sha256) for p in sorted(folder.glob("*.png"))]
    opened = open_metrics(["compression_ratio"], folder, "cpu")
    run = EvaluationRun(opened, Ledger(where), RunOptions(folder))
    run.measure(pictures, name="test")
    Ledger(where).compact()
    print(json.dumps(vars(run.statistics)))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, root: Path) -> None:
    folder = tmp_path / "pictures"
    for number in range(6):
        paint(folder / f"{number}.png", number, (500, 500))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def start(where: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(folder), str(tmp_path / where)],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            text=True,
        )

    whole = start("whole")
    killed = start("killed")
    values = tmp_path / "killed" / "values"
    deadline = time.monotonic() + 100
    while len(list(values.glob("part-*"))) < 2 and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {key.image_sha256 for key in Ledger(tmp_path / "killed")._merged(None)}
    assert kept
    resumed = start("killed")
    said = json.loads(resumed.communicate()[0])
    assert said["decoded"] == 6 - len(kept)
    assert json.loads(whole.communicate()[0])["decoded"] == 6
    parts = [
        [(p.name, p.read_bytes()) for p in sorted((tmp_path / name / "values").glob("part-*"))]
        for name in ("whole", "killed")
    ]
    assert len(parts[0]) == 1
    assert parts[0] == parts[1]
