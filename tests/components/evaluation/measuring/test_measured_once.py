"""Measurements of a stage through the ledger: once per picture, whatever is asked for again."""

from __future__ import annotations

from pathlib import Path

from components.evaluation.measuring.ledger import Ledger
from components.evaluation.measuring.measured_once import MeasuredOnce, Values, recipe_digest

IDS = ("psnr_db", "entropy_bits")


def measure_all(folder: Path, pictures: list[str], calls: list[str]) -> list[Values]:
    def measure(name: str) -> Values:
        calls.append(name)
        return {"psnr_db": float(len(name)), "entropy_bits": None}

    pairs = [(recipe_digest("test/v1", name), "r") for name in pictures]
    once = MeasuredOnce(Ledger(folder), pairs, IDS)
    found = [
        once.values(image, IDS, lambda n=name: measure(n), reference=reference)  # type: ignore[misc]
        for name, (image, reference) in zip(pictures, pairs, strict=True)
    ]
    once.close()
    return found


def test_one_more_picture_is_one_more_measurement(tmp_path: Path) -> None:
    calls: list[str] = []
    first = measure_all(tmp_path, ["a", "bb"], calls)
    assert measure_all(tmp_path, ["a", "bb", "ccc"], calls)[:2] == first
    assert calls == ["a", "bb", "ccc"]
    assert list(first[0]) == list(IDS)
    assert first[0] == {"psnr_db": 1.0, "entropy_bits": None}


def test_a_run_that_ends_early_keeps_what_it_had(tmp_path: Path) -> None:
    image = recipe_digest("test/v1", 1)
    once = MeasuredOnce(Ledger(tmp_path), [(image, "")], ("entropy_bits",))
    once.values(image, ("entropy_bits",), lambda: {"entropy_bits": 3.0})
    again = MeasuredOnce(Ledger(tmp_path), [(image, "")], ("entropy_bits",))
    assert again.values(image, ("entropy_bits",), dict) == {"entropy_bits": 3.0}


def test_only_what_is_missing_is_kept_of_a_second_measurement(tmp_path: Path) -> None:
    image = recipe_digest("test/v1", 1)
    wanted = [(image, "")]
    first = MeasuredOnce(Ledger(tmp_path), wanted, IDS)
    first.values(image, ("entropy_bits",), lambda: {"entropy_bits": 3.0})
    second = MeasuredOnce(Ledger(tmp_path), wanted, IDS)
    values = second.values(image, IDS, lambda: {"psnr_db": 1.0, "entropy_bits": 3.5})
    # No second value under one key, which would be a conflict.
    assert values == {"psnr_db": 1.0, "entropy_bits": 3.0}
    assert Ledger(tmp_path).table().num_rows == 2


def test_the_reference_counts_for_pair_metrics_alone(tmp_path: Path) -> None:
    once = MeasuredOnce(Ledger(tmp_path), [("i", "r"), ("i", "s")], IDS)
    once.values("i", IDS, lambda: {"psnr_db": 1.0, "entropy_bits": 3.0}, reference="r")
    other = once.values("i", IDS, lambda: {"psnr_db": 2.0, "entropy_bits": 9.0}, reference="s")
    assert other == {"psnr_db": 2.0, "entropy_bits": 3.0}


def test_every_part_of_a_recipe_counts() -> None:
    digests = {
        recipe_digest("fitted/v1", "a", 32, 64),
        recipe_digest("fitted/v1", "a", 64, 32),
        recipe_digest("fitted/v1", "a", 3264),
        recipe_digest("fitted/v2", "a", 32, 64),
        recipe_digest("fitted/v1", "b", 32, 64),
    }
    assert len(digests) == 5
