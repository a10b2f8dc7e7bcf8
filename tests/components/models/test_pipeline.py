"""Pipeline end to end on tiny models: sizes, reproducibility, batching, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline

from components.models.f16_pipeline import build_scheduler, check_image_size
from components.models.loading.memory_modes import parse_memory, place_pipeline
from components.models.pipeline import UltraFluxPipeline, remaining_steps
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


def test_each_picture_of_one_prompt_has_a_generator_of_its_own(
    pipeline: UltraFluxPipeline,
) -> None:
    one_prompt = {"prompt": PROMPT, "num_images_per_prompt": 2}
    both = _sample(pipeline, (64, 96), [1, 2], **one_prompt)
    for seed, picture in zip((1, 2), both, strict=True):
        np.testing.assert_allclose(picture, _sample(pipeline, (64, 96), [seed])[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"^generator: expected one per image, 2, got 1"):
        _sample(pipeline, (64, 96), [1], **one_prompt)


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


@pytest.mark.parametrize(("height", "width", "named"), [(0, 64, "height"), (64, -32, "width")])
def test_no_edge_is_zero_or_less(height: int, width: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: must be a positive multiple of 32, got "):
        check_image_size(height, width, 32)


def picture(size: tuple[int, int]) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))


def test_strength_zero_is_the_reconstruction_of_the_autoencoder(
    pipeline: UltraFluxPipeline,
) -> None:
    pixels = picture((96, 64))
    found = _sample(pipeline, (96, 64), [1], image=pixels, strength=0.0)
    with torch.no_grad():
        latents = pipeline.vae.encode(2 * pixels - 1).latent_dist.mode()
        expected = pipeline.vae.decode(latents).sample / 2 + 0.5
    np.testing.assert_allclose(
        found[0], expected[0].clamp(0, 1).permute(1, 2, 0).numpy(), atol=1e-5
    )


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_strength_one_is_text_to_image_with_the_same_noise(
    pipeline: UltraFluxPipeline, schedule: str
) -> None:
    other = UltraFluxPipeline(
        **{**pipeline.components, "scheduler": build_scheduler(schedule=schedule)}  # type: ignore[arg-type]
    )
    other.set_progress_bar_config(disable=True)
    from_image = _sample(other, (64, 96), [4], image=picture((64, 96)), strength=1.0)
    assert from_image.tobytes() == _sample(other, (64, 96), [4]).tobytes()


@pytest.mark.parametrize(
    "scheduler",
    [
        build_scheduler(),
        build_scheduler(schedule="dynamic"),
        # A steep line through the 6 tokens of the picture: mu is 0.98.
        FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=2,
            max_image_seq_len=7,
            base_shift=0.3,
            max_shift=1.15,
        ),
    ],
    ids=["static", "dynamic", "steep"],
)
def test_image_to_image_equals_the_library_from_the_same_latents(
    pipeline: UltraFluxPipeline, scheduler: FlowMatchEulerDiscreteScheduler
) -> None:
    size, strength = (64, 96), 2 / 3
    pixels = picture(size)
    pipeline = UltraFluxPipeline(**{**pipeline.components, "scheduler": scheduler})  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    reference = FluxImg2ImgPipeline(
        **{
            name: part
            for name, part in pipeline.components.items()
            if name not in ("image_encoder", "feature_extractor")
        }
    )
    reference.vae_scale_factor = pipeline.vae_scale_factor
    reference.set_progress_bar_config(disable=True)
    clean = pipeline._image_latents(pixels, *size, 1)
    expected = reference(
        prompt=PROMPT,
        # Latents instead of pixels: the library would draw from the posterior first.
        image=clean,
        height=size[0],
        width=size[1],
        strength=strength,
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    found = _sample(pipeline, size, [5], image=pixels, strength=strength)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_lower_strength_stays_closer_to_the_image(pipeline: UltraFluxPipeline) -> None:
    start = _sample(pipeline, (64, 64), [1], image=picture((64, 64)), strength=0.0)
    distances = [
        np.abs(
            _sample(pipeline, (64, 64), [1], image=picture((64, 64)), strength=strength) - start
        ).mean()
        for strength in (1 / 3, 2 / 3, 1.0)
    ]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(
    ("steps", "strength", "expected"), [(10, 0.7, 7), (50, 0.6, 30), (50, 0.01, 1), (4, 0.0, 0)]
)
def test_strength_is_the_rounded_up_share_of_the_steps(
    steps: int, strength: float, expected: int
) -> None:
    assert remaining_steps(steps, strength) == expected


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 100])
def test_no_rounding_of_the_product_adds_a_step(steps: int) -> None:
    # In whole numbers: 50 * 0.14 is 7.000000000000001 as floats.
    hundredths = range(101)
    found = [remaining_steps(steps, hundredth / 100) for hundredth in hundredths]
    assert found == [-(-steps * hundredth // 100) for hundredth in hundredths]


def test_bad_starting_images_and_strengths_are_refused(pipeline: UltraFluxPipeline) -> None:
    with pytest.raises(ValueError, match=r"image: is 64x64 .* must be 64x96"):
        _sample(pipeline, (64, 96), [1], image=picture((64, 64)), strength=0.5)
    with pytest.raises(ValueError, match="strength: must be from 0 to 1"):
        _sample(pipeline, (64, 64), [1], image=picture((64, 64)), strength=1.5)


def test_dynamic_schedule_is_flux_own() -> None:
    tokens, linear = 16384, np.linspace(1.0, 1 / 50, 50)
    scheduler = build_scheduler(schedule="dynamic")
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    scheduler.set_timesteps(sigmas=linear, mu=mu)
    expected = np.exp(mu) / (np.exp(mu) + 1 / linear - 1)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("modes", ["none", "model-offload", "vae-slicing", "vae-tiling"])
def test_every_memory_mode_gives_the_same_picture(pipeline: UltraFluxPipeline, modes: str) -> None:
    expected = _sample(pipeline, (64, 96), [6, 7])
    other = UltraFluxPipeline(**copy.deepcopy(pipeline.components))
    other.set_progress_bar_config(disable=True)
    place_pipeline(other, parse_memory(modes), "cpu")
    start = {"image": picture((64, 96)), "strength": 0.5}
    np.testing.assert_allclose(_sample(other, (64, 96), [6, 7]), expected, atol=1e-4)
    np.testing.assert_allclose(
        _sample(other, (64, 96), [6, 7], **start),
        _sample(pipeline, (64, 96), [6, 7], **start),
        atol=1e-4,
    )


def test_a_tiled_decode_of_a_large_image_is_close_to_the_whole_one(
    pipeline: UltraFluxPipeline,
) -> None:
    whole = _sample(pipeline, (320, 512), [8])
    other = UltraFluxPipeline(**copy.deepcopy(pipeline.components))
    other.set_progress_bar_config(disable=True)
    place_pipeline(other, parse_memory("vae-tiling"), "cpu")
    tiled = _sample(other, (320, 512), [8])
    assert tiled.shape == whole.shape
    mean_square = float(((tiled - whole) ** 2).mean())
    assert 0 < mean_square < 0.1 * float(whole.var())


def test_memory_modes_are_a_checked_list() -> None:
    modes = parse_memory("text-first, model-offload")
    assert (modes.text_first, modes.offload, modes.vae_tiling) == (True, "model", False)
    with pytest.raises(ValueError, match="unknown mode tiling; choose from none, text-first"):
        parse_memory("tiling")
