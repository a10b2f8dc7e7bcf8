"""Pictures while training goes on: the same without them, the same from any number of ranks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from components.generation.contact_sheet import contact_sheet
from components.models.pipeline import UltraFluxPipeline
from components.models.sd3.transformer import build_tiny_sd3_transformer
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.models.transformer import UltraFluxTransformer2DModel
from components.settings.models import AutoencoderSettings
from components.settings.training import OwnPrompt, SampleSettings
from components.training.distributed.ranks import Ranks
from components.training.dit.assembly import TrainingData, check_pictures
from components.training.dit.curriculum import keyed_generator
from components.training.dit.job import DitJob, StartUnusable
from components.training.dit.sample_grids import SampleGrids, grids_of_run
from components.training.dit.worker import run_job
from components.training.encoding.own_prompts import prompt_id
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import EMPTY_PROMPT_ID, TextStore

pytestmark = pytest.mark.usefixtures("training_environment_restored")
SETTINGS = SampleSettings(every=2, prompts=2, num_inference_steps=2, guidance_scale=1.0)


@pytest.fixture
def autoencoder_settings() -> AutoencoderSettings:
    tiny = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    return AutoencoderSettings(pretrained=None, stride=2, decode_mode="aligned", tiny=tiny)


@pytest.fixture
def make_grids(dit_corpus: Path, tmp_path: Path) -> Callable[..., SampleGrids]:
    def make(
        ranks: Ranks,
        settings: SampleSettings = SETTINGS,
        name: str = "grids",
        own_prompts: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> SampleGrids:
        return SampleGrids(
            settings,
            build_tiny_autoencoder(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, seed=1),
            LatentStore(dit_corpus / "latents"),
            TextStore(dit_corpus / "texts"),
            ["image01", "image00"],
            tmp_path / name,
            last_step=5,
            seed=3,
            ranks=ranks,
            own_prompts=own_prompts,
        )

    return make


class OneOfTwo(Ranks):
    """One rank of two, beside the other in this process."""

    def gather(self, value):  # type: ignore[no-untyped-def]
        GATHERED.append(value)
        return list(GATHERED)


GATHERED: list[object] = []


def tiny_transformer(**changes: object) -> UltraFluxTransformer2DModel:
    return build_tiny_transformer(
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        **changes,
    ).eval()


def file_hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_exports_are_byte_for_byte_the_same_with_and_without_pictures(
    make_dit_job: Callable[..., DitJob], autoencoder_settings: AutoencoderSettings, tmp_path: Path
) -> None:
    plain = make_dit_job(tmp_path / "plain")
    run_job(plain)
    assert not (plain.state_dir / "samples").exists()
    pictured = make_dit_job(tmp_path / "pictured", steps=3, samples=SETTINGS.model_dump())
    pictured = pictured.model_copy(update={"autoencoder": autoencoder_settings})
    run_job(pictured)
    first = file_hashes(pictured.state_dir / "samples")
    assert list(first) == ["step-00000002.png", "step-00000003.png"]
    # Killed after the checkpoint of step 2: the same grid is drawn again, and one at the new end.
    job = make_dit_job(tmp_path / "pictured", samples=SETTINGS.model_dump())
    job = job.model_copy(update={"autoencoder": autoencoder_settings})
    run_job(job)
    assert file_hashes(job.export_dir) == file_hashes(plain.export_dir)
    again = file_hashes(job.state_dir / "samples")
    assert list(again) == [*first, "step-00000004.png"]
    assert {name: again[name] for name in first} == first


def test_a_cell_is_the_picture_that_the_pipeline_makes(
    make_grids: Callable[..., SampleGrids], dit_corpus: Path
) -> None:
    transformer = tiny_transformer(seed=5)
    own = OwnPrompt(prompt="a red kite", size=(96, 160))
    generator = torch.Generator().manual_seed(8)
    embedded = torch.randn(8, 16, generator=generator), torch.randn(16, generator=generator)
    grids = make_grids(
        Ranks(0, 1, torch.device("cpu")),
        SETTINGS.model_copy(update={"prompts": 1, "own_prompts": (own,)}),
        own_prompts={prompt_id("a red kite"): embedded},
    )
    grids.draw(transformer, 4)
    drawn = Image.open(grids.folder / "step-00000004.png")
    pipeline = UltraFluxPipeline.from_components(
        build_tiny_autoencoder(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, seed=1),
        transformer,
    )

    def expected(name: str, texts: tuple[torch.Tensor, torch.Tensor], size: tuple[int, int]):
        return pipeline(
            prompt_embeds=texts[0][None],
            pooled_prompt_embeds=texts[1][None],
            height=size[0],
            width=size[1],
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=keyed_generator(3, -9, name),
        ).images[0]

    texts = TextStore(dit_corpus / "texts").read("image00")
    held_out = expected("image00", texts, (128, 128))
    # Behind it, the prompt of one's own at its own size.
    mine = expected(prompt_id("a red kite"), embedded, (96, 160))
    assert drawn.tobytes() == contact_sheet([held_out, mine], columns=2, cell_px=512).tobytes()


@torch.no_grad()
def test_only_pictures_beyond_1024_px_are_decoded_in_tiles(
    make_grids: Callable[..., SampleGrids],
) -> None:
    grids = make_grids(Ranks(0, 1, torch.device("cpu")))
    pipeline = grids._pipeline(tiny_transformer(seed=5))
    vae = pipeline.vae
    vae.set_tile_size(512)
    for height, is_tiled in ((1024, False), (1056, True)):
        latents = torch.randn(1, 16, height // 16, 2, generator=torch.Generator().manual_seed(1))
        drawn = grids._decode(pipeline, latents)
        made = {}
        for vae.use_tiling in (False, True):
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor)
            (picture,) = pipeline.image_processor.postprocess(decoded.sample, output_type="pil")
            made[vae.use_tiling] = picture.tobytes()
        assert made[True] != made[False]
        assert drawn.tobytes() == made[is_tiled]


def test_a_size_that_would_be_rounded_is_refused_by_the_number_of_its_prompt(
    make_grids: Callable[..., SampleGrids],
) -> None:
    own = (OwnPrompt(prompt="one"), OwnPrompt(prompt="two", size=(100, 128)))
    settings = SETTINGS.model_copy(update={"own_prompts": own})
    with pytest.raises(StartUnusable, match=r"own_prompts\[1\]\.size: height.* 32, got 100"):
        make_grids(Ranks(0, 1, torch.device("cpu")), settings)


def test_two_ranks_draw_the_grid_of_one(make_grids: Callable[..., SampleGrids]) -> None:
    transformer = tiny_transformer(seed=5)
    alone = make_grids(Ranks(0, 1, torch.device("cpu")), name="alone")
    alone.draw(transformer, 2)
    GATHERED.clear()
    for rank in (1, 0):
        make_grids(OneOfTwo(rank, 2, torch.device("cpu")), name="pair").draw(transformer, 2)
    assert [list(part) for part in GATHERED] == [[1], [0]]
    pair = alone.folder.with_name("pair")
    assert file_hashes(pair) == file_hashes(alone.folder)


@pytest.mark.parametrize(
    ("every", "due"), [(2, [2, 4, 5]), (0, [5]), (None, []), (1, [1, 2, 3, 4, 5])]
)
def test_a_grid_is_due_every_so_many_steps_and_at_the_end(
    make_grids: Callable[..., SampleGrids], every: int | None, due: list[int]
) -> None:
    grids = make_grids(
        Ranks(0, 1, torch.device("cpu")), SETTINGS.model_copy(update={"every": every})
    )
    assert [step for step in range(1, 6) if grids.is_due(step)] == due


def test_pictures_beyond_a_position_table_are_refused_before_the_first_step(
    make_grids: Callable[..., SampleGrids], make_dit_job: Callable[..., DitJob], tmp_path: Path
) -> None:
    """SD3's table of 12 patches: held-out images of 4 and 6 fit, a prompt of 32 does not."""
    data = TrainingData.of(make_dit_job(tmp_path))
    transformer = build_tiny_sd3_transformer(
        num_layers=1, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        latent_channels=16, sample_size=16, pos_embed_max_size=12,
    )  # fmt: skip
    here = Ranks(0, 1, torch.device("cpu"))
    embedded = {prompt_id("wide"): (torch.zeros(8, 16), torch.zeros(16))}
    for width, fits in ((160, True), (1024, False)):
        own = (OwnPrompt(prompt="wide", size=(96, width)),)
        settings = SETTINGS.model_copy(update={"own_prompts": own})
        grids = make_grids(here, settings, own_prompts=embedded)
        assert grids.sizes[-1] == (6, width // 16)
        if fits:
            check_pictures(grids, transformer, data, here)
        else:
            with pytest.raises(StartUnusable, match=r"^samples\.own_prompts: .* 32 patches"):
                check_pictures(grids, transformer, data, here)


def test_without_an_empty_prompt_there_is_a_line_and_no_grid_of_a_backbone_that_needs_it(
    make_dit_job: Callable[..., DitJob],
    autoencoder_settings: AutoencoderSettings,
    dit_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(dit_corpus / "texts", tmp_path / "texts")
    index = pd.read_parquet(tmp_path / "texts" / "index.parquet")
    index[index["image_id"] != EMPTY_PROMPT_ID].to_parquet(tmp_path / "texts" / "index.parquet")
    latents, texts = LatentStore(dit_corpus / "latents"), TextStore(tmp_path / "texts")
    job = make_dit_job(tmp_path).model_copy(update={"autoencoder": autoencoder_settings})
    here = Ranks(0, 1, torch.device("cpu"))
    assert grids_of_run(job, latents, texts, ["image00"], here) is not None
    assert capsys.readouterr().err == ""
    sd3 = job.transformer.model_copy(update={"backbone": "sd3"})
    job = job.model_copy(update={"transformer": sd3})
    assert grids_of_run(job, latents, texts, ["image00"], here) is None
    assert (
        "dit_stage1: no sample grids: the text embeddings hold no empty" in capsys.readouterr().err
    )
