"""Sampling with tiny models in the real classes: seeds, resume, provenance."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.generation import sampling
from components.generation.image_metadata import read_metadata, save_with_metadata
from components.models.pipeline import UltraFluxPipeline
from components.models.text_encoders import TextEncoders, build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer

SAMPLER = sampling.SamplerSettings(2, 4.0, 3.0, 16)
DIGESTS = {"transformer": "1", "autoencoder": "2"}
PROMPTS = [("id0", "a lake under clouds, 山间湖泊"), ("id1", "a red leaf")]
REQUESTS = sampling.make_requests(PROMPTS, [(64, 96), (96, 64)], seed=7)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> UltraFluxPipeline:
    folder = tmp_path_factory.mktemp("encoders")
    built = UltraFluxPipeline.from_components(
        build_tiny_autoencoder(),
        build_tiny_transformer(num_layers=1, num_single_layers=1),
        build_tiny_text_encoders(folder, [prompt for _, prompt in PROMPTS]),
    )
    built.set_progress_bar_config(disable=True)
    return built


def generate(
    pipeline: UltraFluxPipeline, folder: Path, requests: list[sampling.GenerationRequest]
) -> list[sampling.Generation]:
    return sampling.generate_images(
        lambda: pipeline, requests, folder, sampler=SAMPLER, digests=DIGESTS, description="test"
    )


def test_interrupted_generation_continues_to_the_same_files(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    whole = generate(pipeline, tmp_path / "whole", REQUESTS)
    generate(pipeline, tmp_path / "parts", REQUESTS[:2])
    # What a kill in the middle of a write leaves behind, and a torn file.
    (tmp_path / "parts" / f".{REQUESTS[2].name}.png.123").write_bytes(b"half")
    (tmp_path / "parts" / f"{REQUESTS[3].name}.png").write_bytes(b"\x89PNG torn")
    stamps = [(tmp_path / "parts" / g.file).stat().st_mtime_ns for g in whole[:2]]
    resumed = generate(pipeline, tmp_path / "parts", REQUESTS)
    assert resumed == whole
    assert stamps == [(tmp_path / "parts" / g.file).stat().st_mtime_ns for g in whole[:2]]
    for record in whole:
        first = (tmp_path / "whole" / record.file).read_bytes()
        assert first == (tmp_path / "parts" / record.file).read_bytes()


def test_finished_images_do_not_load_the_pipeline_and_other_weights_do(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    generate(pipeline, tmp_path, REQUESTS[:1])
    loads: list[int] = []

    def load() -> UltraFluxPipeline:
        loads.append(1)
        return pipeline

    for digests in (DIGESTS, DIGESTS | {"transformer": "new"}):
        sampling.generate_images(load, REQUESTS[:1], tmp_path, sampler=SAMPLER, digests=digests)
    assert loads == [1]


def test_files_carry_their_provenance_and_their_size(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    record = generate(pipeline, tmp_path, REQUESTS[:1])[0]
    with Image.open(tmp_path / record.file) as image:
        assert image.size == (96, 64)
        assert image.info["prompt"] == PROMPTS[0][1]
        assert image.info["seed"] == str(record.seed)
        assert image.info["sha256_transformer"] == "1"
    assert record.source_image_id == "id0"


def test_an_image_does_not_depend_on_its_neighbours(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    alone = generate(pipeline, tmp_path / "alone", REQUESTS[3:])[0]
    together = generate(pipeline, tmp_path / "together", REQUESTS)[3]
    assert alone.image_sha256 == together.image_sha256


def test_text_encoders_first_gives_the_same_files_and_a_pipeline_without_them(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    whole = generate(pipeline, tmp_path / "whole", REQUESTS)
    order: list[str] = []

    def load_encoders() -> TextEncoders:
        order.append("encoders")
        return TextEncoders(
            pipeline.tokenizer,
            pipeline.tokenizer_2,
            pipeline.text_encoder,
            pipeline.text_encoder_2,
        )

    def load() -> UltraFluxPipeline:
        order.append("pipeline")
        bare = UltraFluxPipeline.from_components(pipeline.vae, pipeline.transformer)
        bare.set_progress_bar_config(disable=True)
        return bare

    first = sampling.generate_images(
        load,
        REQUESTS,
        tmp_path / "first",
        sampler=SAMPLER,
        digests=DIGESTS,
        load_encoders=load_encoders,
    )
    assert order == ["encoders", "pipeline"]
    assert first == whole


def test_a_batch_changes_an_image_by_rounding_only(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    requests = [
        sampling.GenerationRequest(PROMPTS[0][1], seed, 64, 96, f"seed{seed}") for seed in range(3)
    ]
    alone = generate(pipeline, tmp_path / "alone", requests)
    together = sampling.generate_images(
        lambda: pipeline,
        requests,
        tmp_path / "together",
        sampler=SAMPLER,
        digests=DIGESTS,
        batch_size=2,
    )
    assert [record.key for record in alone] == [record.key for record in together]
    for record in alone:
        pixels = [
            np.asarray(Image.open(tmp_path / folder / record.file)).astype(int)
            for folder in ("alone", "together")
        ]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_a_picture_with_a_number_that_is_none_is_an_error_and_not_black(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    broken = UltraFluxPipeline(**{**pipeline.components, "vae": build_tiny_autoencoder()})  # type: ignore[arg-type]
    broken.set_progress_bar_config(disable=True)
    with torch.no_grad():
        # Of one colour alone: the other two are as they should be.
        broken.vae.decoder.conv_out.bias[1] = float("nan")
    with pytest.raises(ValueError, match=f"^seed {REQUESTS[0].seed} at 96x64: no picture but NaN"):
        generate(broken, tmp_path, REQUESTS[:1])
    assert not list(tmp_path.iterdir())


def test_a_batch_mixes_neither_strengths_nor_text_with_pictures(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(photo)
    text = sampling.GenerationRequest(PROMPTS[0][1], 0, 64, 96, "text")
    requests = [text] + [
        replace(text, seed=seed, name=f"seed{seed}", image=photo, strength=strength)
        for seed, strength in enumerate((1.0, 0.5, 0.5, 0.0), start=1)
    ]
    alone, together = (
        [
            np.asarray(image).astype(int)
            for _, image in sampling.paint_requests(lambda: pipeline, None, requests, SAMPLER, size)
        ]
        for size in (1, 5)
    )
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1
    assert np.abs(alone[2] - alone[4]).max() > 1


def test_positions_and_stride_are_in_the_key_where_they_are_not_the_weights_own() -> None:
    others = ({}, {"rope_variant": "paper"}, {"vae_stride": 1})
    samplers = [replace(SAMPLER, **other) for other in others]  # type: ignore[arg-type]
    assert not {"rope_variant", "vae_stride"} & set(samplers[0].deciding())
    assert len({sampling.request_key(REQUESTS[0], one, DIGESTS) for one in samplers}) == 3


def test_image_to_image_is_keyed_by_the_picture_and_the_strength(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    # Turned by its EXIF orientation: 90 x 60 shown as 60 x 90.
    photo = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.radial_gradient("L").resize((90, 60)).convert("RGB").save(photo, exif=exif)
    assert sampling.starting_image(photo, 96, 64).size == (64, 96)
    first = replace(REQUESTS[1], image=photo, strength=0.5)
    keys = {
        sampling.request_key(request, SAMPLER, DIGESTS)
        for request in (REQUESTS[1], first, replace(first, strength=0.75))
    }
    assert len(keys) == 3
    record = generate(pipeline, tmp_path / "out", [first])[0]
    found = read_metadata(tmp_path / "out" / record.file)
    assert found["strength"] == "0.5"
    assert len(found["image_sha256"]) == 64
    photo.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"photo\.jpg: not a readable picture"):
        generate(pipeline, tmp_path / "other", [first])


@pytest.mark.parametrize("file_format", ["png", "jpg"])
def test_metadata_of_any_characters_survives_in_both_formats(
    tmp_path: Path, file_format: str
) -> None:
    fields = {"prompt": 'a "lake" <&> 山间湖泊\n\t 🏔', "seed": "7", "software": "x 1"}
    path = tmp_path / f"picture.{file_format}"
    image = Image.radial_gradient("L").convert("RGB")
    save_with_metadata(image, path, fields, file_format)  # type: ignore[arg-type]
    first = path.read_bytes()
    assert read_metadata(path) == fields
    save_with_metadata(image, path, fields, file_format)  # type: ignore[arg-type]
    assert path.read_bytes() == first
    with Image.open(path) as saved:
        assert saved.format == {"png": "PNG", "jpg": "JPEG"}[file_format]
        if file_format == "jpg":
            assert saved.getexif()[0x0131] == "x 1"


def test_other_pictures_have_no_metadata_and_other_files_are_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg")
    assert read_metadata(tmp_path / "plain.jpg") == {}
    (tmp_path / "text.png").write_text("no picture")
    # Nobody writes: who opened it as a picture would wait for ever.
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("text.png", "not a readable picture"),
        ("none.png", "no such file"),
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_metadata(tmp_path / name)
    with pytest.raises(ValueError, match="do not fit into a JPEG"):
        save_with_metadata(
            Image.new("RGB", (8, 8)), tmp_path / "x.jpg", {"prompt": "x" * 70_000}, "jpg"
        )


def test_a_jpeg_is_resumed_and_a_foreign_file_is_never_overwritten(
    pipeline: UltraFluxPipeline, tmp_path: Path
) -> None:
    def make() -> list[sampling.Generation]:
        return sampling.generate_images(
            lambda: pipeline,
            REQUESTS[:1],
            tmp_path,
            sampler=SAMPLER,
            digests=DIGESTS,
            file_format="jpg",
            replace=False,
        )

    path = tmp_path / f"{REQUESTS[0].name}.jpg"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there already and is another picture"):
        make()
    assert path.read_bytes() == b"mine"
    path.unlink()
    first = make()
    stamp = path.stat().st_mtime_ns
    assert make() == first
    assert path.stat().st_mtime_ns == stamp


def test_every_image_has_its_own_seed() -> None:
    seeds = {request.seed for request in REQUESTS}
    assert len(seeds) == len(REQUESTS)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling.image_seed(7, 0, 64, 96) != sampling.image_seed(8, 0, 64, 96)


def test_requests_with_one_name_are_refused(pipeline: UltraFluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        generate(pipeline, tmp_path, [REQUESTS[0], REQUESTS[0]])
