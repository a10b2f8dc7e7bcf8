"""Text to image with a trained model: requests, resumable files, and their provenance.

Every image is a pure function of (prompt, seed, size, sampler settings, weights). That identity is
hashed into a key that stands in the PNG itself, so a finished file is recognised after a kill and
a file made by other weights is made anew. No file carries a date.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from components.files.weight_folders import file_digest
from components.files.whole_files import write_text
from components.generation.image_metadata import (
    FileFormat,
    read_metadata,
    save_with_metadata,
    software_version,
)
from components.models.loading.sampling_speed import (
    SamplingSpeed,
    forget_steps,
    sampling_speed,
    speed_up,
)
from components.settings.models import Quantisation
from components.settings.schema import Settings
from components.telemetry.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from components.models.f16_pipeline import F16Pipeline
    from components.models.loading.memory_modes import MemoryModes
    from components.models.loading.released import ModelSources
    from components.models.resonance_rope import RopeVariant

DtypeName = Literal["float32", "bfloat16", "float16"]
KEY_CHUNK = "ultraflux_key"
_OFF = {"quantisation": "none", "text_quantisation": "none", "rope_variant": None, "vae_stride": 2}
"""What leaves the weights as they are."""


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
    image: Path | None = None
    """Starting image of image-to-image."""
    strength: float = 1.0
    """Of image-to-image, 0 to 1."""
    original_prompt: str = ""
    """What a refiner made the prompt from."""
    refiner: str = ""


@dataclass(frozen=True)
class SamplerSettings:
    """What besides prompt, seed and size decides the pixels."""

    num_inference_steps: int
    guidance_scale: float
    shift: float
    max_sequence_length: int
    schedule: Literal["static", "dynamic"] = "static"
    dtype: DtypeName = "float32"
    vae_tiling: bool = False
    """Tiles are blended: close to the whole decode, not equal."""
    quantisation: Quantisation = "none"
    """Of the transformer's blocks."""
    text_quantisation: Quantisation = "none"
    """Of the text encoders' blocks."""
    speed: SamplingSpeed = field(default_factory=SamplingSpeed)
    rope_variant: RopeVariant | None = None
    """Instead of the weights' own."""
    vae_stride: Literal[1, 2] = 2
    """Of a stock autoencoder."""

    def deciding(self) -> dict[str, Any]:
        """Values by name, without what is left as it is by default or in the weights.

        Pictures from before there was such a choice keep their identity.
        """
        values = asdict(self)
        del values["speed"]
        kept = {key: value for key, value in values.items() if (key, value) not in _OFF.items()}
        return kept | self.speed.deciding()


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


def write_generations(
    generations: Sequence[Generation], finished: Path, images: Path, listed: Path
) -> None:
    """Copy finished pictures and list them, a JSON object a line.

    Args:
        generations: in the order of the list.
        finished: folder that holds the files.
        images: folder for the copies; exists.
        listed: file of the list.
    """
    for generation in generations:
        shutil.copyfile(finished / generation.file, images / generation.file)
    lines = (json.dumps(asdict(g), ensure_ascii=False, sort_keys=True) for g in generations)
    write_text(listed, "".join(f"{line}\n" for line in lines))


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
        "sampler": sampler.deciding(),
        "weights": digests,
    }
    if request.image is not None:
        identity |= {"image": file_digest(request.image), "strength": request.strength}
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def model_sources(
    root: Path,
    settings: Settings,
    *,
    transformer: Path | None = None,
    autoencoder: Path | None = None,
) -> ModelSources:
    """Where the parts of the model that this project trained are.

    Args:
        root: repository root.
        settings: of the project.
        transformer: another folder, or file, than the pipeline's newest.
        autoencoder: another folder.

    Raises:
        WeightsMissing: the pipeline has not trained them yet.
    """
    from components.files.weight_folders import resolve_folder

    encoders = root / "data" / "text_embeddings" / "encoders"
    pretrained = settings.models.text_encoders.pretrained
    if not encoders.is_dir() and pretrained is not None:
        encoders = root / pretrained
    folders = {
        "autoencoder": autoencoder or root / "data" / "vae" / "autoencoder",
        "transformer": transformer or root / "data" / "dit_stage2" / settings.generate.weights,
    }
    for kind, folder in folders.items():
        if kind == "autoencoder" or not folder.is_file():
            resolve_folder(folder, f"trained {kind}", "ultraflux run")
    # After the checks: this import takes seconds.
    from components.models.loading.released import ModelSources

    return ModelSources(text_encoders=encoders, **folders)


def default_dtype(settings: Settings) -> DtypeName:
    """float32 on the CPU, bfloat16 on a GPU."""
    return "bfloat16" if settings.runtime.device == "cuda" else "float32"


def load_model(
    sources: ModelSources,
    sampler: SamplerSettings,
    *,
    device: str,
    memory: MemoryModes,
) -> F16Pipeline:
    """A pipeline on its device, with text encoders unless they come first.

    Args:
        sources: the parts.
        sampler: all but steps, guidance and the length of texts is read.
        device: such as "cpu" or "cuda".
        memory: how to save memory.

    Raises:
        WeightsMissing: a part is not there; the message names it.
        WeightsBroken: files that are not these weights.
    """
    import torch

    from components.generation.held_weights import round_pipeline
    from components.models.loading.memory_modes import place_pipeline
    from components.models.loading.released import load_pipeline

    # Said before gigabytes are read.
    memory.check(sampler.quantisation, sampler.text_quantisation)
    sampler.speed.check(device, sampler.dtype)
    dtype = getattr(torch, sampler.dtype)
    pipeline = load_pipeline(
        sources,
        dtype=dtype,
        with_encoders=not memory.text_first,
        schedule=sampler.schedule,
        shift=sampler.shift,
        rope_variant=sampler.rope_variant,
        stride=sampler.vae_stride,
    )
    round_pipeline(pipeline, sampler, dtype, device if memory.offload == "none" else "cpu")
    speed_up(pipeline.transformer, sampler.speed)
    place_pipeline(pipeline, memory, device)
    return pipeline


def sampler_settings(settings: Settings) -> SamplerSettings:
    """The values of the settings that shape an image."""
    return SamplerSettings(
        num_inference_steps=settings.generate.num_inference_steps,
        guidance_scale=settings.generate.guidance_scale,
        shift=settings.generate.shift,
        max_sequence_length=settings.models.text_encoders.max_sequence_length,
        schedule=settings.generate.schedule,
        dtype=default_dtype(settings),
        vae_tiling="vae-tiling" in settings.generate.memory,
        quantisation=settings.models.transformer.quantisation,
        text_quantisation=settings.models.text_encoders.quantisation,
        speed=sampling_speed(settings.generate),
    )


def _embedded_key(path: Path) -> str | None:
    """The key inside a finished file; None when there is no readable image."""
    try:
        return read_metadata(path).get(KEY_CHUNK)
    except ValueError:
        return None


def _fields(
    request: GenerationRequest, sampler: SamplerSettings, digests: dict[str, str], key: str
) -> dict[str, str]:
    """What a picture says about itself."""
    start = {}
    if request.image is not None:
        start = {"image_sha256": file_digest(request.image), "strength": str(request.strength)}
    refined = {}
    if request.original_prompt:
        refined = {"original_prompt": request.original_prompt, "refiner": request.refiner}
    return {
        "prompt": request.prompt,
        **refined,
        "seed": str(request.seed),
        "size": f"{request.height}x{request.width}",
        **start,
        **{name: str(value) for name, value in sampler.deciding().items()},
        **{f"sha256_{name}": digest for name, digest in sorted(digests.items())},
        "software": software_version(),
        KEY_CHUNK: key,
    }


def generate_images(
    load: Callable[[], F16Pipeline],
    requests: Iterable[GenerationRequest],
    out_dir: Path,
    *,
    sampler: SamplerSettings,
    digests: dict[str, str],
    description: str = "generate",
    load_encoders: Callable[[], Any] | None = None,
    batch_size: int = 1,
    file_format: FileFormat = "png",
    replace: bool = True,
) -> list[Generation]:
    """Make every requested image that `out_dir` does not hold already.

    Args:
        load: gives the pipeline; called once, and only if an image is missing.
        requests: what to make; names must be distinct.
        out_dir: folder for `<name>.<file_format>`, created.
        sampler: steps, guidance and so on.
        digests: model name to content digest; part of every image's key.
        description: name of the progress bar.
        load_encoders: gives text encoders that are used and dropped before `load` is called, which
            then need not bring any.
        batch_size: images of one size that are made together. An image does not depend on its
            batch beyond the rounding of sums (a pixel may differ by one level); 1 is exact.
        file_format: png or jpg.
        replace: False: a file under a wanted name that is something else is an error, not replaced.

    Returns:
        One record per request, in order. Killed at any moment, a later call gives the same files.

    Raises:
        ValueError: two requests share a name, a starting image cannot be read, or a file is in the
            way.
    """
    wanted = list(requests)
    if len({request.name for request in wanted}) != len(wanted):
        raise ValueError("request names must be distinct")
    out_dir.mkdir(parents=True, exist_ok=True)
    keys = {request.name: request_key(request, sampler, digests) for request in wanted}
    paths = {request.name: out_dir / f"{request.name}.{file_format}" for request in wanted}
    pending = [r for r in wanted if _embedded_key(paths[r.name]) != keys[r.name]]
    in_the_way = [paths[r.name] for r in pending if paths[r.name].exists()]
    if in_the_way and not replace:
        raise ValueError(
            f"{in_the_way[0]}: is there already and is another picture; allow overwriting or "
            "choose another folder"
        )
    done = len(wanted) - len(pending)
    made = (
        paint_requests(load, load_encoders, pending, sampler, batch_size) if pending else iter(())
    )
    for request, image in track(made, description, total=len(wanted), initial=done):
        key = keys[request.name]
        fields = _fields(request, sampler, digests, key)
        save_with_metadata(image, paths[request.name], fields, file_format)
    return [
        _record(request, paths[request.name], keys[request.name], digests) for request in wanted
    ]


def _batches(
    requests: Sequence[GenerationRequest], batch_size: int
) -> Iterator[list[GenerationRequest]]:
    """Neighbours that one call can make: of one size and one strength."""
    for _, group in groupby(requests, lambda r: (r.height, r.width, r.image is None, r.strength)):
        alike = list(group)
        for first in range(0, len(alike), batch_size):
            yield alike[first : first + batch_size]


def paint_requests(
    load: Callable[[], F16Pipeline],
    load_encoders: Callable[[], Any] | None,
    requests: Sequence[GenerationRequest],
    sampler: SamplerSettings,
    batch_size: int,
) -> Iterator[tuple[GenerationRequest, Image.Image]]:
    """Each request with its picture, nothing saved; arguments as of `generate_images`."""
    import torch

    from components.models.backbones import backbone_of, family_of

    length = sampler.max_sequence_length
    texts: dict[str, tuple[Tensor, Tensor]] = {}
    if load_encoders is not None:
        encoders: Any = load_encoders()
        family = family_of(encoders)
        prompts = [request.prompt for request in requests]
        if family.negative_prompt is not None:
            prompts.append(family.negative_prompt)
        for prompt in dict.fromkeys(prompts):
            text, pooled = family.encode(encoders, [prompt], length)
            texts[prompt] = (text.cpu(), pooled.cpu())
        # The only reference: freed before the large models are loaded.
        encoders = None
    pipeline = load()
    device, family = pipeline._execution_device, family_of(pipeline)
    for batch in _batches(requests, batch_size):
        embedded = []
        for request in batch:
            # One prompt at a time and not by the pipeline, which would warn about long captions.
            if request.prompt in texts:
                embedded.append(texts[request.prompt])
            else:
                embedded.append(family.encode(pipeline, [request.prompt], length))
        start: dict[str, Any] = {}
        if family.negative_prompt is not None and family.negative_prompt in texts:
            states, vector = texts[family.negative_prompt]
            start = {
                "negative_prompt_embeds": states.expand(len(batch), -1, -1).to(device),
                "negative_pooled_prompt_embeds": vector.expand(len(batch), -1).to(device),
            }
        if batch[0].image is not None:
            backbone = backbone_of(pipeline.transformer)
            if not backbone.takes_image:
                raise ValueError(
                    f"image-to-image: {backbone.title} makes images from text only; use Flux "
                    "weights"
                )
            start = {
                "image": [starting_image(r.image, r.height, r.width) for r in batch if r.image],
                "strength": batch[0].strength,
            }
        forget_steps(pipeline.transformer)
        images = pipeline(
            prompt_embeds=torch.cat([text for text, _ in embedded]).to(device),
            pooled_prompt_embeds=torch.cat([pooled for _, pooled in embedded]).to(device),
            height=batch[0].height,
            width=batch[0].width,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            # On the CPU, so that a seed means the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in batch],
            output_type="np",
            **start,
        ).images
        if not np.isfinite(images).all():
            # Rounded to 8 bits it would be black.
            raise ValueError(
                f"seed {batch[0].seed} at {batch[0].width}x{batch[0].height}: no picture but NaN; "
                "damaged weights, or numbers beyond the range of float16"
            )
        yield from zip(batch, pipeline.image_processor.numpy_to_pil(images), strict=True)


def starting_image(path: Path, height: int, width: int) -> Image.Image:
    """A picture for image-to-image: as seen, resized to cover the size, centre kept.

    Raises:
        ValueError: not a readable picture.
    """
    from components.images.aspect_buckets import Bucket, fit_to_bucket
    from components.images.decoding import ImageUndecodable, read_rgb

    try:
        picture = Image.fromarray(read_rgb(path).pixels)
    except ImageUndecodable as problem:
        raise ValueError(f"{path}: not a readable picture ({problem})") from None
    return fit_to_bucket(picture, Bucket(height, width))


def _record(
    request: GenerationRequest, path: Path, key: str, digests: dict[str, str]
) -> Generation:
    return Generation(
        prompt=request.prompt,
        file=path.name,
        seed=request.seed,
        height=request.height,
        width=request.width,
        image_sha256=file_digest(path),
        source_image_id=request.source_image_id,
        key=key,
        digests=dict(sorted(digests.items())),
    )
