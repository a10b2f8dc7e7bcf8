"""Pipeline end to end on tiny models: sizes, reproducibility, batching, saving and loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from components.models.pipeline import UltraFluxPipeline, build_scheduler
from components.models.text_encoders import build_tiny_text_encoders, encode_prompts
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer

PROMPT = "A frozen lake under pale morning light."


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> UltraFluxPipeline:
    encoders = build_tiny_text_encoders(
        tmp_path_factory.mktemp("text"), [PROMPT, "Red leaves."], t5_dim=32, clip_dim=32
    )
    transformer = build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=32,
        rope_window=4,
    )
    with torch.no_grad():
        transformer.proj_out.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    built = UltraFluxPipeline.from_components(build_tiny_autoencoder(), transformer, encoders)
    built.set_progress_bar_config(disable=True)
    return built


def _sample(
    pipeline: UltraFluxPipeline, size: tuple[int, int], seeds: list[int], **kwargs: object
) -> np.ndarray:
    arguments: dict[str, object] = {"prompt": [PROMPT] * len(seeds), **kwargs}
    return pipeline(
        **arguments,
        height=size[0],
        width=size[1],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3,
        max_sequence_length=16,
        output_type="np",
    ).images


@pytest.mark.parametrize("size", [(96, 192), (256, 32), (160, 160)])
def test_images_have_the_asked_size_and_reproducible_bytes(
    pipeline: UltraFluxPipeline, size: tuple[int, int]
) -> None:
    first = _sample(pipeline, size, [7])
    assert first.shape == (1, *size, 3)
    assert np.isfinite(first).all()
    assert first.tobytes() == _sample(pipeline, size, [7]).tobytes()
    assert first.tobytes() != _sample(pipeline, size, [8]).tobytes()


def test_an_image_does_not_depend_on_its_batch(pipeline: UltraFluxPipeline) -> None:
    alone, batch = _sample(pipeline, (64, 96), [2]), _sample(pipeline, (64, 96), [1, 2])
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)


def test_precomputed_embeddings_give_the_same_image_without_text_encoders(
    pipeline: UltraFluxPipeline,
) -> None:
    t5, pooled = encode_prompts(pipeline, [PROMPT], 16)  # type: ignore[arg-type]
    bare = UltraFluxPipeline.from_components(pipeline.vae, pipeline.transformer)
    bare.set_progress_bar_config(disable=True)
    image = _sample(bare, (64, 96), [3], prompt=None, prompt_embeds=t5, pooled_prompt_embeds=pooled)
    assert image.tobytes() == _sample(pipeline, (64, 96), [3]).tobytes()


def test_whole_pipeline_survives_saving_and_loading(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = UltraFluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.shift == 3.0
    assert loaded.vae_scale_factor == 16
    assert loaded.transformer.config.rope_window == 4
    # Loaded weights are aligned differently in memory, which may change the last bits of sums.
    expected = _sample(pipeline, (96, 64), [5])
    np.testing.assert_allclose(_sample(loaded, (96, 64), [5]), expected, atol=1e-5)


def test_a_pipeline_without_text_encoders_survives_saving_and_loading(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    UltraFluxPipeline.from_components(pipeline.vae, pipeline.transformer).save_pretrained(tmp_path)
    loaded = UltraFluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.text_encoder is None
    assert loaded.tokenizer_2 is None


def test_latents_are_unpacked_row_by_row(pipeline: UltraFluxPipeline) -> None:
    latents = torch.randn(1, 16, 6, 12)
    packed = FluxPipeline._pack_latents(latents, 1, 16, 6, 12)
    assert torch.equal(
        UltraFluxPipeline._unpack_latents(packed, 96, 192, pipeline.vae_scale_factor), latents
    )


def test_schedule_is_the_statically_shifted_linear_one() -> None:
    scheduler = build_scheduler()
    linear = np.linspace(1.0, 1 / 50, 50)
    scheduler.set_timesteps(sigmas=linear, mu=1.0)
    expected = 3 * linear / (1 + 2 * linear)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=1e-6)
    assert scheduler.sigmas[-1] == 0


def test_sizes_and_generators_that_do_not_fit_are_refused(pipeline: UltraFluxPipeline) -> None:
    with pytest.raises(ValueError, match=r"^height: .* 32, got 100"):
        _sample(pipeline, (100, 64), [1])
    with pytest.raises(ValueError, match=r"^generator: expected one per image, 2"):
        _sample(pipeline, (64, 64), [1], prompt=[PROMPT, PROMPT])
    with pytest.raises(ValueError, match="in_channels"):
        UltraFluxPipeline.from_components(
            build_tiny_autoencoder(), build_tiny_transformer(in_channels=32)
        )
