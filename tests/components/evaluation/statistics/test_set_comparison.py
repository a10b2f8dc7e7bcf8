"""Two systems by their distances to one reference: calibrated, paired, with or without a pool."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components.evaluation.statistics import set_comparison
from components.evaluation.statistics.permutation import PermutationResult
from components.evaluation.statistics.set_comparison import (
    SetsTooLarge,
    compare_sets,
    paired_set_test,
)
from components.metrics.metric import Features, Picture
from components.metrics.networks.frechet import (
    GramFrechet,
    GramKernel,
    frechet_distance,
    kernel_distance,
)


def outcome(
    before: np.ndarray, after: np.ndarray, reference: np.ndarray, seed: int
) -> PermutationResult:
    n, m = len(before), len(reference)
    rows = np.arange(2 * n + m)[:, None]
    return paired_set_test(
        GramFrechet(np.concatenate([before, after, reference])),
        list(rows[:n]),
        list(rows[n : 2 * n]),
        rows[2 * n :, 0],
        permutations=100,
        seed=seed,
    )


class Plain:
    """A Fréchet and a kernel distance without a pool, and a number that is no distance."""

    ids = ("fid", "kid", "kid_spread")
    feature_id = "plain/v1"
    weights_digest = None

    def features(self, rgb: np.ndarray, picture: Picture) -> Features:
        raise AssertionError("never called")

    def combine(self, ours: Features, theirs: Features) -> dict[str, float]:
        kid = kernel_distance(ours, theirs)
        return {"fid": frechet_distance(ours, theirs), "kid": kid, "kid_spread": 0.0}


class Pooled(Plain):
    def pooled(self, pool: Features) -> dict[str, object]:
        return {"fid": GramFrechet(pool), "kid": GramKernel(pool)}


def test_p_values_are_uniform_enough_without_and_small_with_a_difference() -> None:
    generator = np.random.default_rng(5)
    same = [outcome(*generator.standard_normal((3, 12, 6)), seed=s).p_value for s in range(40)]
    # P(p <= 0.25) is 0.25: of 40 trials between 2 and 20 with overwhelming probability.
    assert 2 <= sum(p <= 0.25 for p in same) <= 20
    x, y, reference = generator.standard_normal((3, 30, 6))
    assert outcome(x, y + 2.0, reference, seed=1).p_value == pytest.approx(1 / 101)


def test_the_test_sees_which_system_is_nearer_and_is_antisymmetric() -> None:
    generator = np.random.default_rng(6)
    reference = generator.standard_normal((40, 8))
    near = generator.standard_normal((30, 8))
    far = near + 1.5
    there, back = outcome(near, far, reference, seed=2), outcome(far, near, reference, seed=2)
    assert back.statistic < 0 < there.statistic
    assert there.statistic == pytest.approx(-back.statistic)
    assert there.p_value <= 0.05
    assert outcome(near, near, reference, seed=2).p_value == 1.0


def test_patches_of_a_picture_and_pictures_of_a_prompt_change_sides_together() -> None:
    generator = np.random.default_rng(7)
    before = list(generator.standard_normal((6, 3, 4)).astype(np.float32))
    after = [block + np.float32(1) for block in before]
    reference = generator.standard_normal((20, 4)).astype(np.float32)
    clusters = ["a", "a", "b", "b", "c", "c"]
    options = {"permutations": 100, "seed": 0, "clusters": clusters}
    pooled = compare_sets(Pooled(), before, after, reference, **options)
    plain = compare_sets(Plain(), before, after, reference, **options)
    assert pooled.keys() == plain.keys() == {"fid", "kid"}
    for name, (near, far, test) in pooled.items():
        assert (test.n, test.clusters, test.exact, test.permutations) == (6, 3, True, 8)
        # All or none of the three prompts exchanged: 2 of 8 are as extreme.
        assert test.p_value == 0.25
        assert plain[name][:2] == (pytest.approx(near), pytest.approx(far))
        assert plain[name][2].p_value == test.p_value
    assert pooled["fid"][1] == pytest.approx(
        frechet_distance(np.concatenate(after), reference), rel=1e-6
    )


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [np.zeros((1, 3), np.float32)] * 3
    with pytest.raises(ValueError, match="equal numbers, got 2 and 3 pictures"):
        paired_set_test(
            lambda a, b: 0.0,
            [np.array([0])] * 2,
            [np.array([1])] * 3,
            np.array([2]),
            permutations=100,
            seed=0,
        )
    monkeypatch.setattr(set_comparison, "MOST_ROWS", 8)
    with pytest.raises(SetsTooLarge, match="9 rows of features are more than the 8"):
        compare_sets(Plain(), rows, rows, np.ones((3, 3)), permutations=100, seed=0, clusters="abc")


def test_a_baseline_is_compared_in_numbers_page_and_corrected_together(tmp_path: Path) -> None:
    from components.evaluation.measuring.evaluation_run import (
        OpenedMetrics,
        RunOptions,
        open_metrics,
    )
    from components.evaluation.measuring.ledger import FeatureKey, Ledger
    from components.evaluation.pages.suite_report import ReportOptions, build_suite_report
    from components.evaluation.suites.against_baseline import against_baseline
    from components.evaluation.suites.result_folder import write_result
    from components.evaluation.suites.suite_scores import evaluate_suite
    from components.evaluation.suites.suites import load_suite
    from components.evaluation.suites.systems import FolderSystem
    from components.statistics.multiple_tests import holm

    generator = np.random.default_rng(8)
    ledger = Ledger(tmp_path / "ledger")
    for name, shift in (("real", 0), ("old", 60), ("new", 5)):
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = np.clip(generator.integers(40, 160, (96, 96, 3)) + shift, 0, 255)
            path = tmp_path / name / f"{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            # Stands for a network: tiny features, kept as a run of it would have kept them.
            block = generator.standard_normal((1, 4)).astype(np.float32) + np.float32(shift)
            key = FeatureKey(hashlib.sha256(path.read_bytes()).hexdigest(), Plain.feature_id, "")
            ledger.append_features({key: block})
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"prompt {n}"}) for n in range(6)]
    (tmp_path / "real" / "metadata.jsonl").write_text("\n".join(lines))
    suite = load_suite(str(tmp_path / "real"), tmp_path)
    weight_free = open_metrics(["colourfulness", "compression_ratio"], tmp_path, "cpu")
    opened = OpenedMetrics((*weight_free.metrics, Pooled()), {})
    ids = ("colourfulness", "compression_ratio", "fid", "kid")
    systems = [FolderSystem(name, tmp_path / name) for name in ("old", "new")]

    def evaluate(baseline: str | None) -> tuple[object, dict[str, object]]:
        out = tmp_path / f"out-{baseline}"
        result = evaluate_suite(
            suite,
            systems,
            opened,
            ids,
            ledger=ledger,
            options=RunOptions(tmp_path),
            out_dir=out,
            baseline=baseline,
            resamples=100,
        )
        write_result(result, suite, out)
        return result, json.loads((out / "metrics.json").read_text())

    _, without = evaluate(None)
    result, written = evaluate("old")
    assert "set_comparisons" not in without
    found = {one["metric"]: one for one in written.pop("set_comparisons")}
    assert written == without
    assert found.keys() == {"fid", "kid"}
    assert found["fid"]["baseline"] == "old"
    assert found["fid"]["after"] < found["fid"]["before"]
    assert found["fid"]["before"] == pytest.approx(written["metrics"]["old.fid"])
    # Six prompts: all or none exchanged are the extremes of 64.
    assert found["fid"]["p_value"] == pytest.approx(2 / 64)
    (one,) = against_baseline(
        result.table, ["old", "new"], "old", result.set_comparisons, resamples=100, seed=0
    )
    p_values = {c.metric: c.p_value for c in one.comparisons}
    p_values |= {s.metric: s.p_value for s, _ in one.sets}
    assert len(p_values) == 4
    adjusted = {c.metric: c.adjusted_p for c in one.comparisons}
    assert adjusted | {s.metric: p for s, p in one.sets} == holm(p_values)

    page = build_suite_report(tmp_path / "out-old", tmp_path, ReportOptions(resamples=100)).html
    assert page.count("6 prompts exchanged") == 2
    other = ReportOptions(resamples=100, baseline="new")
    assert "prompts exchanged" not in build_suite_report(tmp_path / "out-old", tmp_path, other).html
    with pytest.raises(ValueError, match="--baseline gone: the systems are old, new"):
        evaluate("gone")


class Mean:
    """A network stood in for by the mean colour of the pixels that it is given."""

    ids = ("fid_fitted",)
    feature_id = "mean-colour/v1"
    weights_digest = None

    def features(self, rgb: np.ndarray, picture: object) -> np.ndarray:
        return rgb.reshape(-1, 3).mean(axis=0, dtype=np.float64)[None].astype(np.float32)

    def combine(self, ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
        return {"fid_fitted": frechet_distance(ours, theirs)}

    def pooled(self, pool: np.ndarray) -> dict[str, GramFrechet]:
        return {"fid_fitted": GramFrechet(pool)}


def test_sets_are_measured_and_tested_by_stratum_against_references_cut_to_its_shape(
    tmp_path: Path,
) -> None:
    from components.evaluation.measuring.evaluation_run import OpenedMetrics, RunOptions
    from components.evaluation.measuring.ledger import FeatureKey, Ledger
    from components.evaluation.suites.suite_scores import evaluate_suite
    from components.evaluation.suites.suites import Suite, SuiteItem
    from components.evaluation.suites.systems import FolderSystem
    from components.metrics.metric import Picture

    rng = np.random.default_rng(0)
    items = []
    ledger = Ledger(tmp_path / "ledger")
    metric = Mean()
    for number in range(12):
        # The middle square is the subject; what stands at its sides is cut off at 1:1.
        scene = np.full((32, 64, 3), 255, np.uint8)
        scene[:, 16:48] = rng.integers(20, 90, (1, 1, 3))
        (tmp_path / "real").mkdir(exist_ok=True)
        reference = tmp_path / "real" / f"{number}.png"
        Image.fromarray(scene).save(reference)
        size = (32, 32) if number < 6 else (32, 64)
        name = f"i{number}"
        items.append(SuiteItem(name, f"p{number}", *size, 0, reference, f"{size[1]}x{size[0]}"))
        for system, added in (("same", 0), ("shifted", 60)):
            (tmp_path / system).mkdir(exist_ok=True)
            pixels = scene[:, 16:48] if number < 6 else scene
            Image.fromarray((pixels.astype(int) + added).clip(0, 255).astype(np.uint8)).save(
                tmp_path / system / f"{name}.png"
            )
    # Features as a run of the network would have kept them, of pictures cut as the metric asks.
    for item in items:
        whole = np.asarray(Image.open(item.reference))
        digest = hashlib.sha256(item.reference.read_bytes()).hexdigest()
        fitted = None if item.width == 64 else (item.height, item.width)
        key = Picture(item.reference, digest, fitted=fitted).content
        block = metric.features(whole[:, 16:48] if fitted else whole, None)
        ledger.append_features({FeatureKey(key, metric.feature_id, ""): block})
        for system in ("same", "shifted"):
            path = tmp_path / system / f"{item.id}.png"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            block = metric.features(np.asarray(Image.open(path)), None)
            ledger.append_features({FeatureKey(digest, metric.feature_id, ""): block})
    result = evaluate_suite(
        Suite("s", "S", "s/v1", metric.ids, tuple(items)),
        [FolderSystem(name, tmp_path / name) for name in ("same", "shifted")],
        OpenedMetrics((metric,), {}),
        metric.ids,
        ledger=ledger,
        options=RunOptions(tmp_path),
        out_dir=tmp_path / "out",
        baseline="same",
        resamples=100,
    )
    for stratum, count in (("", 12), (".32x32", 6), (".64x32", 6)):
        # Squashed references would differ by what stands at their sides.
        assert result.metrics[f"same{stratum}.fid_fitted"] == pytest.approx(0.0, abs=1e-2)
        assert result.metrics[f"same{stratum}.fid_fitted_n"] == count
        assert result.metrics[f"shifted{stratum}.fid_fitted"] > 100
    assert [one.stratum for one in result.set_comparisons] == ["", "32x32", "64x32"]
    assert result.set_comparisons[1].p_value == pytest.approx(2 / 64)
    assert any("moves most" in note and "without" in note for note in result.notes)
    assert any("have no interval" in note for note in result.notes)


def test_the_worker_cuts_a_fitted_picture_before_its_features(tmp_path: Path) -> None:
    from components.evaluation.measuring.evaluation_run import _fitted

    scene = np.full((32, 64, 3), 255, np.uint8)
    scene[:, 16:48] = 40
    cut = _fitted(scene, (16, 16))
    assert cut.shape == (16, 16, 3)
    assert int(cut[:, 2:-2].max()) <= 45
