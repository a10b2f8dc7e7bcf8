"""Arms of the ablations, and the stages they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from components.evaluation.statistics.scores import Score, scores_table
from components.evaluation.suites.ablation import (
    DESIGNS,
    Design,
    expand,
    planned_stages,
    with_overrides,
)
from components.evaluation.suites.ablation_table import PUBLISHED, ArmScores, ablation_table
from flows.cli import app
from flows.versioning.graph import stage_graph


@pytest.fixture(scope="module")
def params(root: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("design", list(DESIGNS))
def test_every_arm_is_valid_and_the_last_is_params_yaml(
    design: Design, params: dict[str, Any]
) -> None:
    arms = expand(design, params)
    assert len(arms) == 4
    assert arms[-1].overrides == {}
    assert with_overrides(params, {}) == params


def test_each_rung_of_the_ladder_adds_one_component(params: dict[str, Any]) -> None:
    left = [set(arm.overrides) for arm in expand("ladder", params)]
    assert left[0] > left[1] > left[2] > left[3] == set()
    assert left[0] - left[1] == {"objective.kind"}
    assert left[1] - left[2] == {"slices.stage2_top_fraction", "dit_stage2.sigma_range"}
    assert left[2] == {"models.transformer.rope_variant"}


def test_the_two_by_two_crosses_data_and_model(params: dict[str, Any]) -> None:
    a, b, c, d = (set(arm.overrides) for arm in expand("data-model", params))
    assert a == b | c
    assert not b & c
    assert d == set()
    assert all(key.startswith("select.") for key in c)


def test_settings_without_a_component_are_refused(params: dict[str, Any]) -> None:
    lacking = with_overrides(params, {"objective.kind": "flow_matching"})
    with pytest.raises(ValueError, match=r"arms 'base' and 'snr-hw' are the same run"):
        expand("ladder", lacking)


def test_shared_stages_run_once(root: Path, params: dict[str, Any]) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    upstream = {name: node.upstream for name, node in stage_graph(root).items()}
    plan = planned_stages(expand("ladder", params), params, stages, upstream)
    assert set(plan["base"].values()) == {"base"}
    for arm in ("snr-hw", "sacl", "rope"):
        assert {plan[arm][stage] for stage in ("ingest", "signals", "select")} == {"base"}
        assert plan[arm]["dit_stage1"] == arm


def test_a_dry_run_prints_sets_and_stages(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["ablate", "ladder", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert '-S objective.kind="flow_matching"' in done.output
    assert "params.yaml as it stands" in done.output
    assert CliRunner().invoke(app, ["ablate", "stairs"]).exit_code == 2


def arm_scores(params: dict[str, Any]) -> list[ArmScores]:
    """Four arms, each half a point better than the one before."""
    return [
        ArmScores(
            arm,
            scores_table(
                Score(f"{i}.png", "generated", 64, 64, "glcm_score", "g/v1", i + 0.5 * step)
                for i in range(8)
            ),
        )
        for step, arm in enumerate(expand("ladder", params))
    ]


def test_the_table_has_the_papers_columns_with_ours_beside_and_paired_differences(
    params: dict[str, Any],
) -> None:
    scores = arm_scores(params)
    scores[0] = ArmScores(scores[0].arm, scores[0].table, {"fid_fitted": 12.3456})
    text = ablation_table("ladder", scores, resamples=999, seed=0)
    head, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert head == (
        "| Additive ablation | FID ↓, ours | FID ↓, paper | HPSv3 ↑, ours | HPSv3 ↑, paper | "
        "ArtiMuse ↑, ours | ArtiMuse ↑, paper | GLCM score ↑ |"
    )
    assert rule.count("|") == head.count("|")
    assert rows[0] == "| Flux + F16 VAE | 12.35 | 151.40 | – | 9.22 | – | 66.39 | 3.5 |"
    assert rows[2] == "| + SNR-HW + SACL | – | 147.32 | – | 10.30 | – | 67.31 | 4.5 |"
    assert "- + SNR-HW, glcm_score: +0.5 [+0.5, +0.5], p = 0.00781, n = 8" in text


def test_an_arm_that_did_not_finish_costs_its_own_row(params: dict[str, Any]) -> None:
    scores = arm_scores(params)[:3]
    scores[0] = ArmScores(scores[0].arm, problem="its pipeline did not finish")
    text = ablation_table("ladder", scores, resamples=999, seed=0)
    assert "| Flux + F16 VAE | – | 151.40 | – | 9.22 | – | 66.39 | – |" in text
    assert "base: no numbers: its pipeline did not finish" in text
    assert "Paired differences to '+ SNR-HW'" in text
    lonely = ablation_table("ladder", scores[:1], resamples=999, seed=0)
    assert "Paired" not in lonely


@pytest.mark.parametrize("design", list(DESIGNS))
def test_every_arm_has_its_published_row(design: Design) -> None:
    published = PUBLISHED[design]
    assert len(published.rows) == len(DESIGNS[design])
    assert len(published.metrics) == len(published.columns)
    for arm, row in zip(DESIGNS[design], published.rows, strict=True):
        assert (arm.name, arm.label[:2]) == (row.system, row.label[:2])
        assert len(row.values) == len(published.columns)
