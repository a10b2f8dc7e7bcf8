"""Q-Align over a tiny random checkpoint in the real architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage import data

from components.corpus.derivatives import Derivative
from components.corpus.quality import qalign
from components.files.weight_folders import WeightsMissing, folder_digest
from components.signals.candidate import derivative_jpeg

pytest.importorskip("pyiqa", reason="needs the extra iqa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from components.corpus.tiny_one_align import write_tiny_one_align

    path = tmp_path_factory.mktemp("one-align")
    write_tiny_one_align(path, seed=0)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> qalign.QAlign:
    return qalign.QAlign(folder, "cpu")


PICTURES = (data.astronaut(), np.ascontiguousarray(data.coffee()[:, :500]), data.astronaut()[::-2])


def test_the_prompt_has_the_ids_of_sentencepiece_after_one_start_token(
    folder: Path, scorer: qalign.QAlign
) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    before, after = (pieces.encode(text) for text in qalign.PROMPT)
    assert scorer.prompt_ids == [pieces.bos_id(), *before, -200, *after]
    assert [[one] for one in scorer.level_ids] == [pieces.encode(word) for word in qalign.LEVELS]


def test_the_prompt_is_that_of_the_library(scorer: qalign.QAlign) -> None:
    from pyiqa.archs.q_align.modeling_mplug_owl2 import tokenizer_image_token

    text = qalign.PROMPT[0] + "<|image|>" + qalign.PROMPT[1]
    expected = tokenizer_image_token(text, scorer._model.tokenizer)
    # Left out by tokenizers that do not add the start token themselves.
    start = scorer._model.tokenizer.bos_token_id
    assert scorer.prompt_ids == (expected if expected[0] == start else [start, *expected])


def test_a_score_is_the_expectation_of_the_networks_raw_logits_at_the_last_position(
    scorer: qalign.QAlign,
) -> None:
    import torch

    for pixels in PICTURES[:2]:
        with torch.no_grad():
            logits = scorer._model(
                input_ids=torch.tensor([scorer.prompt_ids]),
                images=torch.from_numpy(qalign.preprocess(pixels)),
                return_dict=True,
            ).logits
        vocabulary = scorer._model.tokenizer
        last = {
            word: float(logits[0, -1, vocabulary.convert_tokens_to_ids("▁" + word)])
            for word in ("excellent", "good", "fair", "poor", "bad")
        }
        total = sum(np.exp(value) for value in last.values())
        by_hand = (
            5 * np.exp(last["excellent"])
            + 4 * np.exp(last["good"])
            + 3 * np.exp(last["fair"])
            + 2 * np.exp(last["poor"])
            + 1 * np.exp(last["bad"])
        ) / total
        assert scorer(pixels) == pytest.approx(by_hand, abs=1e-6)
        assert 1.0 <= scorer(pixels) <= 5.0


def test_a_score_depends_on_the_picture_and_on_nothing_else(
    folder: Path, scorer: qalign.QAlign
) -> None:
    scores = [scorer(pixels) for pixels in PICTURES]
    assert len({round(score, 4) for score in scores}) == 3
    assert [scorer(pixels) for pixels in PICTURES] == scores
    assert [qalign.QAlign(folder, "cpu")(pixels) for pixels in PICTURES] == scores


def test_a_batch_has_the_logits_of_its_pictures_alone(scorer: qalign.QAlign) -> None:
    alone = np.concatenate([scorer.logits([pixels]) for pixels in PICTURES])
    np.testing.assert_allclose(scorer.logits(PICTURES), alone, rtol=0, atol=1e-5)


def test_a_loaded_network_is_the_one_that_was_saved(folder: Path, scorer: qalign.QAlign) -> None:
    """With rotary frequencies and position tables, which a checkpoint may not hold."""
    import json

    import torch

    config = json.loads((folder / "config.json").read_text())
    built = qalign.build_model(folder, config).eval()
    built.load_state_dict(scorer._model.state_dict())
    with torch.no_grad():
        expected = built(
            input_ids=torch.tensor([scorer.prompt_ids]),
            images=torch.from_numpy(qalign.preprocess(PICTURES[0])),
            return_dict=True,
        ).logits[0, -1, scorer.level_ids]
    np.testing.assert_array_equal(scorer.logits([PICTURES[0]])[0], expected.double().numpy())


def test_a_row_carries_score_scorer_and_digest(folder: Path, scorer: qalign.QAlign) -> None:
    jpeg = derivative_jpeg(PICTURES[0], 256)
    digest = folder_digest(folder)
    row = qalign.score_derivative(
        Derivative("a" * 64, 512, 512, jpeg), folder=folder, digest=digest, device="cpu"
    )
    assert set(row) == {"quality_score", "quality_scorer", "quality_weights"}
    assert (row["quality_scorer"], row["quality_weights"]) == ("qalign-one-align", digest)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_missing_file_is_one_line_that_names_it_and_the_command(
    folder: Path, tmp_path: Path, name: str
) -> None:
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    shown = "*.safetensors" if name.endswith("safetensors") else name
    with pytest.raises(WeightsMissing) as caught:
        qalign.QAlign(tmp_path, "cpu")
    assert f"{shown}; get it with: hf download q-future/one-align" in str(caught.value)


def test_weights_that_do_not_fill_the_network_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.visual_abstractor.visual_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMissing, match=r"1 parameters have no weights.*visual_fc\.weight"):
        qalign.QAlign(tmp_path, "cpu")


def test_the_same_seed_writes_the_same_checkpoint(folder: Path, tmp_path: Path) -> None:
    from components.corpus.tiny_one_align import write_tiny_one_align

    write_tiny_one_align(tmp_path, seed=0)
    assert folder_digest(tmp_path) == folder_digest(folder)
