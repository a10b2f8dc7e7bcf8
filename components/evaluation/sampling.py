"""Text to image with a trained model: requests, resumable files, and their provenance.

Every image is a pure function of (prompt, seed, size, sampler settings, weights). That identity is
hashed into a key that stands in the PNG itself, so a finished file is recognised after a kill and
a file made by other weights is made anew. No file carries a date.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, PngImagePlugin

from components.progress import track
from components.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from components.models.pipeline import UltraFluxPipeline

KEY_CHUNK = "ultraflux_key"
_SHEET_GAP_PX = 12


@dataclass(frozen=True)
class GenerationRequest:
    """One image to make."""

    prompt: str
    seed: int
    """Of this image's own generator."""
    height: int
    """Pixels, a multiple of 32."""
    width: int
    name: str
    """File name without its ending."""
    source_image_id: str = ""
    """Image whose caption is the prompt; empty for a typed prompt."""


@dataclass(frozen=True)
class SamplerSettings:
    """What besides prompt, seed and size decides the pixels."""

    num_inference_steps: int
    guidance_scale: float
    shift: float
    max_sequence_length: int


@dataclass(frozen=True)
class Generation:
    """One finished image; a line of `generations.jsonl`."""

    prompt: str
    file: str
    seed: int
    height: int
    width: int
    image_sha256: str
    source_image_id: str
    key: str
    digests: dict[str, str]


def image_seed(seed: int, prompt_index: int, height: int, width: int) -> int:
    """Seed of one image in [0, 2^31), independent of which other images are asked for."""
    text = f"{seed}/{prompt_index}/{height}x{width}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF


def make_requests(
    prompts: Sequence[tuple[str, str]], sizes: Sequence[tuple[int, int]], seed: int
) -> list[GenerationRequest]:
    """Every prompt at every size, prompts outermost.

    Args:
        prompts: (source image id, prompt text).
        sizes: (height, width) in pixels.
        seed: root seed.
    """
    return [
        GenerationRequest(
            prompt=prompt,
            seed=image_seed(seed, index, height, width),
            height=height,
            width=width,
            name=f"prompt{index:02d}_{height}x{width}",
            source_image_id=image_id,
        )
        for index, (image_id, prompt) in enumerate(prompts)
        for height, width in sizes
    ]


def request_key(
    request: GenerationRequest, sampler: SamplerSettings, digests: dict[str, str]
) -> str:
    """sha256 of everything that decides the pixels (the file's name is not part of it)."""
    identity = {
        "prompt": request.prompt,
        "seed": request.seed,
        "height": request.height,
        "width": request.width,
        "sampler": asdict(sampler),
        "weights": digests,
    }
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def model_folders(root: Path, settings: Settings) -> dict[str, Path]:
    """Folders of the trained model below a repository root, by kind."""
    encoders = root / "data" / "text_embeddings" / "encoders"
    pretrained = settings.models.text_encoders.pretrained
    if not encoders.is_dir() and pretrained is not None:
        encoders = root / pretrained
    return {
        "autoencoder": root / "data" / "vae" / "autoencoder",
        "transformer": root / "data" / "dit_stage2" / settings.generate.weights,
        "text_encoders": encoders,
    }


def model_digests(folders: dict[str, Path]) -> dict[str, str]:
    """Content digest of each of `model_folders`; of the text encoders only the four parts count."""
    from components.models.text_encoders import FOLDERS
    from components.models.weights import folder_digest

    digests = {kind: folder_digest(folders[kind]) for kind in ("autoencoder", "transformer")}
    # A FLUX.1-dev folder also holds what is not read here.
    parts = [f"{name}={folder_digest(folders['text_encoders'] / name)}" for name in FOLDERS]
    digests["text_encoders"] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return digests


def load_pipeline(root: Path, settings: Settings) -> UltraFluxPipeline:
    """The trained autoencoder, transformer and text encoders of a run as one pipeline.

    float32 on the CPU, bfloat16 on a GPU; nothing is fetched.

    Args:
        root: repository root.
        settings: `generate.weights`, `generate.shift` and `runtime.device` are read.

    Raises:
        WeightsMissing: a model folder is not there; the message names it.
    """
    import torch

    from components.models.autoencoder_f16 import AutoencoderKLF16
    from components.models.pipeline import UltraFluxPipeline
    from components.models.text_encoders import load_text_encoders
    from components.models.transformer import UltraFluxTransformer2DModel
    from components.models.weights import resolve_folder

    folders = model_folders(root, settings)
    train = "dvc repro vae dit_stage2"
    dtype = torch.bfloat16 if settings.runtime.device == "cuda" else torch.float32
    pipeline = UltraFluxPipeline.from_components(
        AutoencoderKLF16.from_pretrained(
            resolve_folder(folders["autoencoder"], "trained autoencoder", train),
            torch_dtype=dtype,
            local_files_only=True,
        ).eval(),
        UltraFluxTransformer2DModel.from_pretrained(
            resolve_folder(folders["transformer"], "trained transformer", train),
            torch_dtype=dtype,
            local_files_only=True,
        ).eval(),
        load_text_encoders(folders["text_encoders"], dtype=dtype),
        shift=settings.generate.shift,
    )
    # None: no bar of its own where stderr is not a terminal.
    pipeline.set_progress_bar_config(disable=None, leave=False)
    pipeline.to(settings.runtime.device)
    return pipeline


def sampler_settings(settings: Settings) -> SamplerSettings:
    """The values of the settings that shape an image."""
    return SamplerSettings(
        num_inference_steps=settings.generate.num_inference_steps,
        guidance_scale=settings.generate.guidance_scale,
        shift=settings.generate.shift,
        max_sequence_length=settings.models.text_encoders.max_sequence_length,
    )


def _embedded_key(path: Path) -> str | None:
    """The key inside a finished file; None when there is no readable image."""
    try:
        with Image.open(path) as image:
            image.load()
            return str(image.info[KEY_CHUNK]) if KEY_CHUNK in image.info else None
    except (OSError, SyntaxError, ValueError):
        return None


def _save(
    image: Image.Image,
    path: Path,
    request: GenerationRequest,
    sampler: SamplerSettings,
    digests: dict[str, str],
    key: str,
) -> None:
    notes = PngImagePlugin.PngInfo()
    chunks = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "size": f"{request.height}x{request.width}",
        "num_inference_steps": str(sampler.num_inference_steps),
        "guidance_scale": str(sampler.guidance_scale),
        "shift": str(sampler.shift),
        **{f"sha256_{name}": digest for name, digest in sorted(digests.items())},
        KEY_CHUNK: key,
    }
    for name, text in chunks.items():
        notes.add_itxt(name, text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    image.save(temporary, format="PNG", pnginfo=notes)
    temporary.replace(path)


def generate_images(
    load: Callable[[], UltraFluxPipeline],
    requests: Iterable[GenerationRequest],
    out_dir: Path,
    *,
    sampler: SamplerSettings,
    digests: dict[str, str],
    description: str = "generate",
) -> list[Generation]:
    """Make every requested image that `out_dir` does not hold already.

    Args:
        load: gives the pipeline; called once, and only if an image is missing.
        requests: what to make; names must be distinct.
        out_dir: folder for `<name>.png`, created.
        sampler: steps, guidance and so on.
        digests: model name to content digest; part of every image's key.
        description: name of the progress bar.

    Returns:
        One record per request, in order. Killed at any moment, a later call gives the same files.

    Raises:
        ValueError: two requests share a name.
    """
    import torch

    wanted = list(requests)
    if len({request.name for request in wanted}) != len(wanted):
        raise ValueError("request names must be distinct")
    out_dir.mkdir(parents=True, exist_ok=True)
    loaded: UltraFluxPipeline | None = None
    done: list[Generation] = []
    for request in track(wanted, description):
        path = out_dir / f"{request.name}.png"
        key = request_key(request, sampler, digests)
        if _embedded_key(path) != key:
            if loaded is None:
                loaded = load()
            # On the CPU, so that a seed means the same noise on every device.
            generator = torch.Generator("cpu").manual_seed(request.seed)
            # Embedded here and not by the pipeline, which would warn about every long caption.
            text, pooled = _embed(loaded, request.prompt, sampler.max_sequence_length)
            image = loaded(
                prompt_embeds=text,
                pooled_prompt_embeds=pooled,
                height=request.height,
                width=request.width,
                num_inference_steps=sampler.num_inference_steps,
                guidance_scale=sampler.guidance_scale,
                generator=generator,
            ).images[0]
            _save(image, path, request, sampler, digests, key)
        done.append(_record(request, path, key, digests))
    return done


def _embed(pipeline: UltraFluxPipeline, prompt: str, length: int) -> tuple[Tensor, Tensor]:
    from components.models.text_encoders import TextEncoders, encode_prompts

    encoders = TextEncoders(
        tokenizer=pipeline.tokenizer,
        tokenizer_2=pipeline.tokenizer_2,
        text_encoder=pipeline.text_encoder,
        text_encoder_2=pipeline.text_encoder_2,
    )
    return encode_prompts(encoders, [prompt], length)


def _record(
    request: GenerationRequest, path: Path, key: str, digests: dict[str, str]
) -> Generation:
    return Generation(
        prompt=request.prompt,
        file=path.name,
        seed=request.seed,
        height=request.height,
        width=request.width,
        image_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source_image_id=request.source_image_id,
        key=key,
        digests=dict(sorted(digests.items())),
    )


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int, cell_px: int, max_px: int = 1024
) -> Image.Image:
    """Pictures on a grid, each fitted into a square cell and centred.

    Args:
        images: row by row.
        columns: pictures per row.
        cell_px: edge of a cell before the sheet is fitted into `max_px`.
        max_px: long edge of the sheet.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one picture and one column")
    rows = math.ceil(len(images) / columns)
    step = cell_px + _SHEET_GAP_PX
    sheet = Image.new("RGB", (columns * step + _SHEET_GAP_PX, rows * step + _SHEET_GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(images):
        row, column = divmod(index, columns)
        left, top = _SHEET_GAP_PX + column * step, _SHEET_GAP_PX + row * step
        draw.rectangle((left, top, left + cell_px - 1, top + cell_px - 1), fill=(238, 238, 238))
        fitted = picture.convert("RGB")
        fitted.thumbnail((cell_px, cell_px), Image.Resampling.LANCZOS)
        offset = ((cell_px - fitted.width) // 2, (cell_px - fitted.height) // 2)
        sheet.paste(fitted, (left + offset[0], top + offset[1]))
    if max(sheet.size) > max_px:
        sheet.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    return sheet
