"""Metric cards are complete and their status never waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.metrics.cards import CARDS, card, status


def test_every_metric_of_the_papers_has_a_card_with_a_protocol() -> None:
    wanted = {"fid", "hpsv3", "pickscore", "artimuse", "clip_score", "qalign", "musiq"}
    wanted |= {"rfid", "nmse", "psnr_db", "ssim", "lpips", "glcm_score", "compression_ratio"}
    wanted |= {"laion_aesthetics"}
    assert wanted <= {metric.id for metric in CARDS}
    assert len({metric.id for metric in CARDS}) == len(CARDS)
    assert all(metric.protocol and metric.sees for metric in CARDS)


def test_missing_weights_name_the_command_and_present_ones_do_not(tmp_path: Path) -> None:
    metric = card("clip_score")
    assert metric.weights is not None
    message = status(metric, (), tmp_path)
    assert message.startswith("weights missing: ")
    assert metric.weights.command in message
    folder = tmp_path / metric.weights.path
    folder.mkdir()
    # As for `ultraflux weights list`, a folder without its files is not there.
    assert status(metric, (), tmp_path) == message
    for name in metric.weights.files:
        (folder / name).touch()
    assert status(metric, (), tmp_path) == "weights found, not measured"


def test_weights_in_a_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    metric = card("fid")
    assert metric.weights is not None
    assert status(metric, (), tmp_path / "weights").startswith("weights missing")
    cached = tmp_path / "torch" / "hub" / "checkpoints" / Path(metric.weights.path).name
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert status(metric, (), tmp_path / "weights") == "weights found, not measured"


def test_measured_wins_over_everything(tmp_path: Path) -> None:
    assert status(card("fid"), {"fid"}, tmp_path) == "measured"
    assert status(card("psnr_db"), (), tmp_path) == "no input"


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown metric 'bleu'; known: psnr_db"):
        card("bleu")


def test_a_published_column_compares_only_under_an_equal_protocol_id() -> None:
    from components.evaluation.pages.suite_tables import comparisons
    from components.metrics.paper_tables import paper_table, table_of_suite

    table = paper_table("diffusion4k-2048")
    place = table.metrics.index("clip_score_b16")
    assert table.comparison(place, card("clip_score_b16").protocol) == ""
    other = table.comparison(place, card("clip_score").protocol)
    assert other == "measured under clip/vit-b-16/v1, ours under clip/vit-l-14/v1"
    assert "do not state the protocol" in paper_table("main").comparison(0, card("fid").protocol)
    detail = table_of_suite("detail")
    assert detail is not None
    assert comparisons(detail, "detail/v1").startswith("Equal protocol ids: GLCM score")
    assert "a part of the suite (detail/v1+first8)" in comparisons(detail, "detail/v1+first8")
    assert "Equal" not in comparisons(detail, "detail/v1+first8")


def test_every_card_says_what_it_is_after_and_the_papers_what_deviates() -> None:
    from components.metrics.paper_tables import TABLES

    assert [c.id for c in CARDS if not c.follows] == []
    unstated = {
        field.measure
        for table in TABLES
        for field in table.fields
        if table.filling == "evaluation" and not field.protocol
    }
    assert [name for name in unstated if not card(name).deviates] == []
    # A column with our protocol id is one whose script our card follows.
    for table in TABLES:
        for field in table.fields:
            if field.protocol:
                assert card(field.measure).protocol == field.protocol
                assert "Diffusion-4K" in card(field.measure).follows
