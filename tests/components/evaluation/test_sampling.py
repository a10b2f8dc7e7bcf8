"""Sampling with tiny models in the real classes: seeds, resume, provenance."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from components.evaluation import sampling
from components.models.pipeline import UltraFluxPipeline
from components.models.text_encoders import build_tiny_text_encoders
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


def test_every_image_has_its_own_seed() -> None:
    seeds = {request.seed for request in REQUESTS}
    assert len(seeds) == len(REQUESTS)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling.image_seed(7, 0, 64, 96) != sampling.image_seed(8, 0, 64, 96)


def test_requests_with_one_name_are_refused(pipeline: UltraFluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct"):
        generate(pipeline, tmp_path, [REQUESTS[0], REQUESTS[0]])


def test_contact_sheet_places_pictures_on_a_bounded_grid() -> None:
    pictures = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")]
    sheet = sampling.contact_sheet(pictures, columns=2, cell_px=50)
    assert sheet.size == (2 * 62 + 12, 62 + 12)
    assert sheet.getpixel((12 + 25, 12 + 25)) == (255, 0, 0)
    assert sheet.getpixel((12 + 62 + 25, 12 + 25)) == (0, 0, 255)
    large = sampling.contact_sheet(pictures, columns=1, cell_px=900, max_px=512)
    assert max(large.size) == 512
