"""The lock of an evaluation: what a second run must share, and what it need not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from components.evaluation.measuring.evaluation_lock import (
    MEASURING,
    LockDiffers,
    check_lock,
    code_fingerprint,
    lock_of,
    read_lock,
    write_lock,
)
from components.evaluation.measuring.evaluation_run import RunOptions, open_metrics
from components.evaluation.measuring.ledger import Ledger
from components.evaluation.suites.suite_scores import evaluate_suite
from components.evaluation.suites.suites import Suite, SuiteItem
from components.files.code_identity import CodeIdentity
from components.metrics.cards import card

ASKED = {"seed": 0, "steps": None, "refiner": ""}


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    path = tmp_path / "real.png"
    Image.fromarray(pixels).save(path)
    items = tuple(SuiteItem(name, f"a {name}", 48, 64, 1, path) for name in ("lake", "hill"))
    return Suite("mine", "Mine", "folder/v1", ("psnr_db",), items)


def test_a_lock_is_read_back_and_equal_runs_agree(suite: Suite, tmp_path: Path) -> None:
    lock = lock_of(suite, open_metrics(("psnr_db",), tmp_path, "cpu"), ASKED)
    assert read_lock(tmp_path) is None
    check_lock(lock, tmp_path)
    write_lock(lock, tmp_path)
    assert read_lock(tmp_path) == lock
    assert lock.metrics == {"psnr_db": {"protocol": card("psnr_db").protocol, "weights": ""}}
    assert len(lock.code) == 64
    check_lock(lock, tmp_path)
    # Other metrics are no other evaluation.
    check_lock(lock_of(suite, open_metrics(("ssim",), tmp_path, "cpu"), ASKED), tmp_path)
    (tmp_path / "evaluation.lock.json").write_text("{}")
    with pytest.raises(ValueError, match="not an evaluation's lock"):
        check_lock(lock, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"suite": "other"}, "suite mine, was other"),
        ({"protocol": "folder/v0"}, "protocol folder/v1, was folder/v0"),
        ({"items": "0" * 64}, "items "),
        ({"code": "0" * 64}, "code "),
        ({"asked": ASKED | {"steps": 9}}, "steps None, was 9"),
        ({"metrics": {"psnr_db": {"protocol": "psnr/v0", "weights": ""}}}, "protocol of psnr_db"),
        (
            {"metrics": {"psnr_db": {"protocol": card("psnr_db").protocol, "weights": "ab"}}},
            "weights of psnr_db , was ab",
        ),
    ],
)
def test_whatever_decides_a_number_is_held(
    suite: Suite, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    lock = lock_of(suite, open_metrics(("psnr_db",), tmp_path, "cpu"), ASKED)
    (tmp_path / "evaluation.lock.json").write_text(json.dumps(asdict(lock) | changed))
    with pytest.raises(LockDiffers) as refused:
        check_lock(lock, tmp_path)
    assert message in str(refused.value)
    assert "Give another --out, or --relock" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("field_name", ["id", "prompt", "height", "width", "seed", "stratum"])
def test_every_field_of_an_item_is_part_of_what_is_asked(
    suite: Suite, tmp_path: Path, field_name: str
) -> None:
    opened = open_metrics((), tmp_path, "cpu")
    first = suite.items[0]
    value = getattr(first, field_name)
    other = replace(first, **{field_name: value + 16 if isinstance(value, int) else f"{value}x"})
    changed = replace(suite, items=(other, *suite.items[1:]))
    assert lock_of(changed, opened, ASKED).items != lock_of(suite, opened, ASKED).items


@dataclass
class Painter:
    """Paints grey pictures and remembers what it was asked."""

    name: str = "grey"
    asked: list[str] = field(default_factory=list)

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        out_dir.mkdir(parents=True, exist_ok=True)
        paths = []
        for item in items:
            self.asked.append(item.prompt)
            path = out_dir / f"{item.id}.png"
            Image.new("RGB", (item.width, item.height), (9, 9, 9)).save(path)
            paths.append(path)
        return paths


def test_refined_prompts_reach_the_system_and_not_the_metrics(suite: Suite, tmp_path: Path) -> None:
    system = Painter()
    result = evaluate_suite(
        suite,
        [system],
        open_metrics(("colourfulness",), tmp_path, "cpu"),
        ("colourfulness",),
        ledger=Ledger(tmp_path / "ledger"),
        options=RunOptions(tmp_path),
        out_dir=tmp_path / "out",
        asked_as={"a lake": "a frozen lake at dawn, low sun"},
    )
    assert system.asked == ["a frozen lake at dawn, low sun", "a hill"]
    assert set(result.table["prompt"]) == {"a lake", "a hill"}
    assert {picture["prompt"] for picture in result.pictures} == {"a lake", "a hill"}
    assert any("refined texts for 1 prompts" in note for note in result.notes)


def test_a_kept_fingerprint_holds_until_a_byte_of_the_code_changes(
    root: Path, tmp_path: Path
) -> None:
    for package in ("components", "flows"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / package, tmp_path / package, ignore=without)
    kept_in = tmp_path / "kept"
    first = code_fingerprint(tmp_path, kept_in)
    assert first == CodeIdentity(tmp_path).fingerprint(MEASURING)
    (kept,) = kept_in.iterdir()
    kept.write_text("0" * 64)
    assert code_fingerprint(tmp_path, kept_in) == "0" * 64
    changed = tmp_path / "components" / "metrics" / "native" / "fidelity.py"
    changed.write_text(changed.read_text().replace("_PEAK = 255.0", "_PEAK = 254.0"))
    second = code_fingerprint(tmp_path, kept_in)
    assert second not in (first, "0" * 64)
    (again,) = kept_in.iterdir()
    assert again != kept
    shutil.rmtree(kept_in)
    kept_in.touch()
    assert code_fingerprint(tmp_path, kept_in) == second
