from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_layers_model import slow_reference, squashed, tiny_model

from components.corpus.derivatives import Derivative
from components.corpus.people.evidence import LookPlan, look_at
from components.corpus.people.nsfwjs import NsfwClasses, load_network, network_input
from components.files.weight_folders import WeightsMissing
from components.images.decoding import decode_rgb
from components.signals.candidate import derivative_jpeg

# Of the tiny network for `picture()`, from the slow reference.
KNOWN = (0.5136527744, 0.1678935194, 0.1080661307, 0.1064283102, 0.1039592653)


def picture() -> np.ndarray:
    """Ramps in three directions, wider than high."""
    rows, columns = np.mgrid[0:60, 0:90]
    return np.stack([rows * 4, columns * 2, 255 - rows - columns], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, weights, _ = tiny_model()
    (tmp_path / "model.json").write_text(json.dumps(model))
    (tmp_path / "weights.bin").write_bytes(weights)
    return tmp_path


@pytest.mark.parametrize("shape", [(60, 90), (300, 224), (224, 224)])
def test_the_input_is_squashed_bilinearly_with_aligned_corners(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = network_input(pixels)
    assert found.shape == (1, 3, 224, 224)
    np.testing.assert_allclose(found[0].permute(1, 2, 0).numpy(), squashed(pixels), atol=2e-5)
    # The corners of the picture are the corners of the input.
    np.testing.assert_allclose(found[0, :, 0, 0] * 255, pixels[0, 0], atol=1e-4)
    np.testing.assert_allclose(found[0, :, -1, -1] * 255, pixels[-1, -1], atol=1e-4)


def test_classes_of_a_picture_are_the_known_answers(folder: Path) -> None:
    found = load_network(folder).classify(picture())
    np.testing.assert_allclose(found.probabilities, KNOWN, atol=2e-6)
    reference = slow_reference(squashed(picture()), tiny_model()[2])
    np.testing.assert_allclose(reference, KNOWN, atol=1e-8)


def test_porn_and_hentai_are_unsafe_and_drawings_and_hentai_are_drawn() -> None:
    classes = NsfwClasses((0.4, 0.2, 0.1, 0.25, 0.05))
    assert classes.nsfw_score == pytest.approx(0.45)
    assert classes.drawing_score == pytest.approx(0.6)
    assert NsfwClasses((0.0, 0.6, 0.0, 0.5, 0.0)).nsfw_score == 1.0


def test_rows_have_both_scores_and_name_scorer_and_weights(folder: Path) -> None:
    plan = LookPlan("none", "nsfwjs", nsfw_weights=folder, nsfw_digest="d" * 64)
    jpeg = derivative_jpeg(picture(), 90)
    row = look_at(Derivative("a" * 64, 600, 900, jpeg), plan)
    classes = load_network(folder).classify(decode_rgb(jpeg).pixels)
    assert row == {
        "nsfw_score": classes.nsfw_score,
        "drawing_score": classes.drawing_score,
        "nsfw_scorer": "nsfwjs-mobilenet_v2",
        "nsfw_weights": "d" * 64,
    }
    assert plan.runs_networks


def test_missing_files_name_the_command_that_gets_them(folder: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"nowhere; get it with: ultraflux weights get nsfwjs"):
        load_network(folder / "nowhere")
    (folder / "weights.bin").unlink()
    with pytest.raises(WeightsMissing, match=r"\(no weights\.bin\); get it with"):
        load_network(folder)


def test_another_network_is_refused_before_any_photograph(folder: Path) -> None:
    model = tiny_model()[0]
    last = model["modelTopology"]["model_config"]["config"]
    last["output_layers"] = [["dense_1", 0, 0]]
    (folder / "model.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=r"8 classes, expected 5: Drawing, Hentai"):
        load_network(folder)
    last["output_layers"] = [["dense_2", 0, 0]]
    model["weightsManifest"][1]["weights"][-1]["shape"] = [4, 1]
    (folder / "model.json").write_text(json.dumps(model))
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        load_network(folder)
