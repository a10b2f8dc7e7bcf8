"""SD3 text encoders and pipeline on tiny models: equal to diffusers', sizes, seeds, guidance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from components.files.weight_folders import WeightsMissing, folder_digest
from components.models.backbones import BACKBONES, family_in, family_of
from components.models.loading.released import ModelSources, load_pipeline, source_digests
from components.models.sd3.pipeline import StableDiffusion3F16Pipeline
from components.models.sd3.text_encoders import (
    SD3_FOLDERS,
    build_tiny_sd3_text_encoders,
    encode_sd3_prompts,
    load_sd3_text_encoders,
)
from components.models.sd3.transformer import build_tiny_sd3_transformer
from components.models.text_encoders import build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer

PROMPT = "A frozen lake under pale morning light."
CAPTIONS = [PROMPT, "Red leaves."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model: text encoders, `transformer` and `vae`."""
    root = tmp_path_factory.mktemp("sd3")
    build_tiny_sd3_text_encoders(root, CAPTIONS, t5_dim=32, clip_dim=24)
    transformer = build_tiny_sd3_transformer(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=12,
    )
    torch.nn.init.normal_(
        transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    transformer.save_pretrained(root / "transformer")
    build_tiny_autoencoder().save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3F16Pipeline:
    sources = ModelSources(folder / "transformer", folder / "vae", folder)
    loaded = load_pipeline(sources, dtype=torch.float32)
    assert isinstance(loaded, StableDiffusion3F16Pipeline)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sample(
    pipeline: StableDiffusion3F16Pipeline, size: tuple[int, int], seeds: list[int], **kwargs: object
) -> np.ndarray:
    arguments: dict[str, object] = {
        "prompt": [PROMPT] * len(seeds),
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        **kwargs,
    }
    return pipeline(
        **arguments,
        height=size[0],
        width=size[1],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=2,
        output_type="np",
    ).images


@torch.no_grad()
def test_embeddings_equal_those_of_the_stock_pipeline(
    pipeline: StableDiffusion3F16Pipeline,
) -> None:
    prompts = [PROMPT, "", "Red leaves. " * 20]
    states, pooled = encode_sd3_prompts(pipeline, prompts, 20)  # type: ignore[arg-type]
    expected, _, expected_pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=20
    )
    assert states.shape == (3, 77 + 20, 32)
    assert pooled.shape == (3, 24)
    assert torch.equal(states, expected)
    assert torch.equal(pooled, expected_pooled)
    assert not states[:, :77, 24:].any()


def test_building_twice_gives_the_same_bytes_and_loading_the_same_encoders(
    folder: Path, tmp_path: Path
) -> None:
    built = build_tiny_sd3_text_encoders(tmp_path, CAPTIONS, t5_dim=32, clip_dim=24)
    for name in SD3_FOLDERS:
        assert folder_digest(tmp_path / name) == folder_digest(folder / name)
    loaded = load_sd3_text_encoders(tmp_path)
    for ours, theirs in zip(
        encode_sd3_prompts(built, [PROMPT], 8), encode_sd3_prompts(loaded, [PROMPT], 8), strict=True
    ):
        assert torch.equal(ours, theirs)
    sd3 = BACKBONES["sd3"].text_family()
    assert family_in(tmp_path) is family_of(loaded) is sd3
    assert len(sd3.models(loaded)) == 3


def test_missing_parts_and_widths_that_do_not_fit_are_named(tmp_path: Path) -> None:
    build_tiny_text_encoders(tmp_path, CAPTIONS, t5_dim=16, clip_dim=16, num_layers=1)
    with pytest.raises(WeightsMissing, match=r"SD3 tokenizer_3 not found .*stable-diffusion-3"):
        load_sd3_text_encoders(tmp_path)
    with pytest.raises(WeightsMissing, match="no folder set"):
        load_sd3_text_encoders(None)
    for t5_dim, clip_dim in ((16, 32), (16, 15)):
        with pytest.raises(ValueError, match="clip_dim"):
            build_tiny_sd3_text_encoders(tmp_path, CAPTIONS, t5_dim=t5_dim, clip_dim=clip_dim)


@pytest.mark.parametrize("size", [(96, 192), (224, 32)])
def test_images_have_the_asked_size_and_reproducible_bytes(
    pipeline: StableDiffusion3F16Pipeline, size: tuple[int, int]
) -> None:
    first = sample(pipeline, size, [7])
    assert first.shape == (1, *size, 3)
    assert np.isfinite(first).all()
    assert first.tobytes() == sample(pipeline, size, [7]).tobytes()
    assert first.tobytes() != sample(pipeline, size, [8]).tobytes()


def test_an_image_does_not_depend_on_its_batch(pipeline: StableDiffusion3F16Pipeline) -> None:
    alone, batch = sample(pipeline, (64, 96), [2]), sample(pipeline, (64, 96), [1, 2])
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)


def test_each_picture_of_one_prompt_has_a_generator_of_its_own(
    pipeline: StableDiffusion3F16Pipeline,
) -> None:
    one_prompt = {"prompt": PROMPT, "num_images_per_prompt": 2}
    both = sample(pipeline, (64, 96), [1, 2], **one_prompt)
    for seed, picture in zip((1, 2), both, strict=True):
        np.testing.assert_allclose(picture, sample(pipeline, (64, 96), [seed])[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"^generator: expected one per image, 2, got 1"):
        sample(pipeline, (64, 96), [1], **one_prompt)


def test_embeddings_from_outside_give_the_same_image_as_the_prompt(
    pipeline: StableDiffusion3F16Pipeline,
) -> None:
    expected = sample(pipeline, (64, 96), [3])
    states, pooled = encode_sd3_prompts(pipeline, [PROMPT], 16)  # type: ignore[arg-type]
    given = {"prompt": None, "prompt_embeds": states, "pooled_prompt_embeds": pooled}
    # The negative prompt takes the length of the embeddings, not the argument's.
    inside = sample(pipeline, (64, 96), [3], **given, max_sequence_length=99)
    assert inside.tobytes() == expected.tobytes()
    bare = StableDiffusion3F16Pipeline.from_components(pipeline.vae, pipeline.transformer)
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"guidance_scale: 4.0 needs negative_prompt_embeds"):
        sample(bare, (64, 96), [3], **given)
    states, pooled = encode_sd3_prompts(pipeline, [""], 16)  # type: ignore[arg-type]
    negative = {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
    assert sample(bare, (64, 96), [3], **given, **negative).tobytes() == expected.tobytes()
    alone = sample(bare, (64, 96), [3], **given, guidance_scale=1.0)
    assert alone.tobytes() != expected.tobytes()


def test_sizes_and_parts_that_do_not_fit_are_refused(
    pipeline: StableDiffusion3F16Pipeline, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^height: .* 32, got 100"):
        sample(pipeline, (100, 64), [1])
    with pytest.raises(ValueError, match="need 13 patches"):
        sample(pipeline, (64, 416), [1])
    with pytest.raises(ValueError, match=r"^generator: expected one per image, 2"):
        sample(pipeline, (64, 64), [1], prompt=[PROMPT, PROMPT])
    with pytest.raises(ValueError, match="in_channels"):
        StableDiffusion3F16Pipeline.from_components(
            build_tiny_autoencoder(), build_tiny_sd3_transformer(latent_channels=8)
        )
    build_tiny_transformer(num_layers=1, num_single_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold the text encoders .* Flux transformer"):
        load_pipeline(ModelSources(tmp_path, folder / "vae", folder), dtype=torch.float32)


def test_a_saved_pipeline_is_found_and_has_the_digests_of_its_six_text_parts(
    pipeline: StableDiffusion3F16Pipeline, folder: Path, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3F16Pipeline.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
    assert loaded.vae_scale_factor == 16
    assert loaded.transformer.config.pos_embed_max_size == 12
    sources = ModelSources(folder / "transformer", folder / "vae", folder)
    before = source_digests(sources)["text_encoders"]
    saved = ModelSources(folder / "transformer", folder / "vae", tmp_path)
    config = tmp_path / "text_encoder_3" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert source_digests(saved)["text_encoders"] != before
