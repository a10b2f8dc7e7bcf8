"""What `ultraflux new` sets in place of tables, packages and weights that a clone does not have."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from components.corpus import missing_means
from components.corpus.folder_captions import FolderCaptions
from components.corpus.folder_survey import FolderSurvey, Proposal
from components.corpus.missing_means import propose_means
from components.settings.schema import Settings, parse_settings

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def paper() -> Settings:
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "base.yaml"))
    return parse_settings(values)


def found(photographs: int = 3, captioned: int = 3) -> FolderSurvey:
    return FolderSurvey(
        folder=Path("photos"),
        endings={".jpg": photographs},
        nested=False,
        pixels=(),
        unreadable=(),
        measured=(),
        captions=FolderCaptions(lines=captioned),
        has_attribution=False,
    )


def proposed(settings: Settings, root: Path, survey: FolderSurvey | None = None) -> Proposal:
    proposal = Proposal()
    propose_means(survey or found(), settings, proposal, root)
    return proposal


def without_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        missing_means, "find_spec", lambda name: None if name in names else real(name)
    )


def test_the_papers_profile_runs_on_photographs_of_ones_own_without_what_it_takes_from_elsewhere(
    paper: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_packages(monkeypatch, "nudenet", "lpips")
    made = proposed(paper, tmp_path).settings
    assert made == {
        "quality": {"scorer": "classical", "aesthetic_scorer": "classical"},
        "select": {
            "min_quality": None,
            "aesthetic_top_fraction": 1.0,
            "human": {"min_quality": None, "aesthetic_top_fraction": None},
            "max_nsfw": None,
        },
        "people": {"detector": "classical", "boxes": None, "nsfw": {"scorer": "none"}},
        "caption": {"provider": "shipped", "translate": {"provider": "shipped"}},
        "vae": {"loss": {"perceptual_kind": "gmsd", "lpips_backbone": None}},
    }
    values: Any = OmegaConf.merge(paper.model_dump(mode="json"), made)
    valid = parse_settings(OmegaConf.to_container(values))
    assert valid.unscored_rule() is None
    assert valid.caption.missing_prices() is None
    # The paper's other rules stay.
    assert valid.select.human.min_entropy_bits == 7.0


def test_what_is_there_is_used(
    paper: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_packages(monkeypatch, "nudenet")
    backbone = {"lpips_backbone": "weights/vgg.pth", "lpips_sha256": "0" * 64}
    vae = paper.vae.model_copy(update={"loss": paper.vae.loss.model_copy(update=backbone)})
    assert paper.quality.scores is not None
    assert paper.people.boxes is not None
    for file in (paper.quality.scores, paper.people.boxes, "weights/vgg.pth"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "weights" / "nsfwjs").mkdir()
    made = proposed(paper.model_copy(update={"vae": vae}), tmp_path).settings
    assert made == {
        "people": {"nsfw": {"scorer": "nsfwjs"}},
        "caption": {"provider": "shipped", "translate": {"provider": "shipped"}},
    }
    without_packages(monkeypatch)
    assert "people" not in proposed(paper, tmp_path).settings


def test_an_endpoint_without_prices_is_said_where_captions_are_missing(
    paper: Settings, tmp_path: Path
) -> None:
    proposal = proposed(paper, tmp_path, found(photographs=3, captioned=2))
    assert "caption" not in proposal.settings
    assert any(
        "before a run: caption.max_cost_usd (50) needs prices" in r for r in proposal.remarks
    )


def test_a_profile_that_asks_for_nothing_is_left_alone(root: Path, tmp_path: Path) -> None:
    params: Any = OmegaConf.to_container(OmegaConf.load(root / "params.yaml"))
    assert proposed(parse_settings(params), tmp_path).settings == {}
