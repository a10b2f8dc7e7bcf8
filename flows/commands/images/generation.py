"""`ultraflux generate`: images from the trained weights or from published ones."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.generation.prompt_files import SEEDS, odd_character
from flows.commands.command_line import why_no_file

if TYPE_CHECKING:
    from components.generation.sampling import GenerationRequest
    from components.settings.schema import Settings

_MULTIPLE_PX = 32
_STRENGTH = 0.6
_MAX_STEPS = 1000
"""As many times as a schedule was trained with (FLUX.1-dev's `num_train_timesteps`)."""


class GenerationRefused(ValueError):
    """The request cannot be met; one line."""


def parse_size(size: str, *, round_size: bool = False, flag: str = "--size") -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT".

    Args:
        size: as typed.
        round_size: take the nearest multiples of 32 instead of refusing other edges.
        flag: or field of a file that it comes from, as an error names it.

    Raises:
        GenerationRefused: not of that form, or an edge is not a positive multiple of 32.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", size)
    if match is None:
        raise GenerationRefused(f"{flag} {size}: expected WIDTHxHEIGHT, such as 5120x2880")
    width, height = int(match[1]), int(match[2])
    if round_size:
        return _rounded(height), _rounded(width)
    for edge in (width, height):
        if edge == 0 or edge % _MULTIPLE_PX:
            raise GenerationRefused(
                f"{flag} {size}: {edge} is not a multiple of 32; the nearest is {_rounded(edge)} "
                "(or add --round-size)"
            )
    return height, width


def _rounded(edge: int) -> int:
    return max(_MULTIPLE_PX, round(edge / _MULTIPLE_PX) * _MULTIPLE_PX)


_NO_SIZE = "--size: missing; such as 5120x2880 (WIDTHxHEIGHT)"


@dataclass(frozen=True)
class GenerateOptions:
    """What the command line says, by its names; None: the settings' value."""

    prompt: str | None = None
    prompts: Path | None = None
    size: str | None = None
    round_size: bool = False
    seed: int = 0
    num_images: int = 1
    steps: int = 0
    guidance_scale: float | None = None
    schedule: str | None = None
    dtype: str | None = None
    memory: str | None = None
    quantise: str | None = None
    attention_backend: str | None = None
    step_cache: str | None = None
    step_cache_threshold: float | None = None
    step_cache_interval: int | None = None
    compile: str | None = None
    batch_size: int = 1
    image: Path | None = None
    strength: float | None = None
    model: Path | None = None
    base: Path | None = None
    transformer: Path | None = None
    rope: str | None = None
    vae_stride: int = 2
    refine: bool = False
    file_format: str = "png"
    overwrite: bool = False
    output: Path = Path("outputs")


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise GenerationRefused(f"--{name} {value}: choose {', '.join(allowed)}")


def _check(options: GenerateOptions) -> None:
    """Everything that can be refused before anything is read."""
    _choose("format", options.file_format, ("png", "jpg"))
    _choose("schedule", options.schedule or "static", ("static", "dynamic"))
    _choose("dtype", options.dtype or "float32", ("float32", "bfloat16", "float16"))
    _choose("rope", options.rope or "official", ("official", "official_prefix", "paper", "flux"))
    _choose("quantise", options.quantise or "none", ("none", "int8", "nf4", "fp8"))
    _choose("vae-stride", str(options.vae_stride), ("1", "2"))
    prompt = options.prompt
    if (prompt is None) == (options.prompts is None):
        raise GenerationRefused("give --prompt or --prompts FILE (one of them)")
    if options.size is None and options.image is None and options.prompts is None:
        raise GenerationRefused(_NO_SIZE)
    if prompt is not None and not prompt.strip():
        raise GenerationRefused("--prompt: empty; say what to paint")
    if prompt is not None and (odd := odd_character(prompt)) is not None:
        raise GenerationRefused(f"--prompt: not UTF-8 at character {odd}")
    strength = options.strength
    if strength is not None and not 0.0 <= strength <= 1.0:
        raise GenerationRefused(f"--strength {strength}: from 0 to 1")
    if strength is not None and options.image is None:
        raise GenerationRefused(f"--strength {strength}: of --image; give one with it")
    if options.num_images < 1 or options.batch_size < 1:
        raise GenerationRefused("--num-images and --batch-size start at 1")
    if options.steps and not 1 <= options.steps <= _MAX_STEPS:
        raise GenerationRefused(f"--steps {options.steps}: from 1 to {_MAX_STEPS}")
    guidance = options.guidance_scale
    if guidance is not None and not 0.0 <= guidance < math.inf:
        raise GenerationRefused(f"--guidance-scale {guidance}: a number from 0")
    _check_seeds(options.seed, options.num_images)
    for name, path in (("prompts", options.prompts), ("image", options.image)):
        if path is not None and not path.is_file():
            raise GenerationRefused(f"--{name} {path}: {why_no_file(path)}")
    if options.image is not None:
        _image_size(options.image)
    if options.base is not None and options.model is None:
        raise GenerationRefused("--base: holds what --model lacks; give --model with it")
    for name in ("model", "transformer"):
        model: Path | None = getattr(options, name)
        # Of published weights below weights/ a line each says how to get them.
        if model is not None and not model.exists() and "weights" not in model.parts:
            raise GenerationRefused(f"--{name} {model}: no such folder or file")


def _check_seeds(first: int, count: int, flag: str = "--seed") -> None:
    if first < 0 or first + count > SEEDS:
        raise GenerationRefused(
            f"{flag} {first} --num-images {count}: seeds go from 0 to {SEEDS - 1}"
        )


def _image_size(path: Path) -> str:
    """WIDTHxHEIGHT of an upright picture at the nearest multiples of 32."""
    from components.images.decoding import ImageUndecodable, read_header

    try:
        header = read_header(path.read_bytes())
    except (OSError, ImageUndecodable) as problem:
        raise GenerationRefused(f"--image {path}: not a readable picture ({problem})") from None
    return f"{_rounded(header.width)}x{_rounded(header.height)}"


def _requests(root: Path, options: GenerateOptions, settings: Settings) -> list[GenerationRequest]:
    """One per prompt and image; seeds count up from the first."""
    from components.generation.prompt_files import PromptLine, read_prompts
    from components.generation.sampling import GenerationRequest

    lines = [] if options.prompt is None else [PromptLine(options.prompt)]
    if options.prompts is not None:
        lines = read_prompts(options.prompts)
    size = options.size
    if size is None and options.image is not None:
        size = _image_size(options.image)
    sizes = []
    for line in lines:
        wanted = line.size or size
        if wanted is None:
            raise GenerationRefused(_NO_SIZE)
        flag = f"{line.where}: size" if line.size else "--size"
        sizes.append(parse_size(wanted, round_size=options.round_size, flag=flag))
        flag = "--seed" if line.seed is None else f"{line.where}: seed"
        first = options.seed if line.seed is None else line.seed
        _check_seeds(first, options.num_images, flag)
    texts = [(line.prompt, "") for line in lines]
    if options.refine:
        texts = refined(root, [line.prompt for line in lines], settings)
    refiner = settings.refiner.endpoint.model if options.refine else ""
    strength = _STRENGTH if options.strength is None else options.strength
    return [
        GenerationRequest(
            prompt=prompt,
            seed=(options.seed if line.seed is None else line.seed) + number,
            height=height,
            width=width,
            name="",
            image=options.image,
            strength=strength if options.image is not None else 1.0,
            original_prompt=original,
            refiner=refiner if original else "",
        )
        for line, (prompt, original), (height, width) in zip(lines, texts, sizes, strict=True)
        for number in range(options.num_images)
    ]


def refined(root: Path, prompts: list[str], settings: Settings) -> list[tuple[str, str]]:
    """(prompt, original or "" where it was kept); says on stderr what was kept and why."""
    from components.chat.client import EndpointUnusable
    from components.chat.spending import CostCapReached
    from components.generation.refiner import refine_prompts

    cache = root / "runs" / "refiner" / "requests.sqlite"
    try:
        results = refine_prompts(prompts, settings.refiner, cache=cache, root=root)
    except (EndpointUnusable, CostCapReached) as problem:
        raise GenerationRefused(f"--refine: {problem}") from None
    for result in results:
        if result.reason:
            print(f"not refined ({result.reason}): {result.original}", file=sys.stderr)
    return [(r.prompt, "" if r.reason else r.original) for r in results]


_SPEED = (
    *("attention_backend", "step_cache", "step_cache_threshold", "step_cache_interval"),
    "compile",
)


def _sped_up(settings: Settings, options: GenerateOptions) -> Settings:
    """The settings with the short cuts that the command line asks for.

    Raises:
        GenerationRefused: a value that the settings refuse.
    """
    from pydantic import ValidationError

    from components.settings.evaluation import GenerateSettings

    typed = {name: getattr(options, name) for name in _SPEED}
    typed = {name: value for name, value in typed.items() if value is not None}
    try:
        chosen = GenerateSettings.model_validate({**settings.generate.model_dump(), **typed})
    except ValidationError as problem:
        error = problem.errors()[0]
        flag = "--" + str(error["loc"][0]).replace("_", "-")
        raise GenerationRefused(f"{flag} {error['input']}: {error['msg'].lower()}") from None
    # Only now: the settings may name the cache that the command line leaves out.
    for cache, name in (("first_block", "threshold"), ("taylorseer", "interval")):
        value = typed.get(f"step_cache_{name}")
        if value is not None and chosen.step_cache != cache:
            raise GenerationRefused(
                f"--step-cache-{name} {value}: of --step-cache {cache}; give it too"
            )
    return settings.model_copy(update={"generate": chosen})


def generate(root: Path, options: GenerateOptions) -> list[Path]:
    """Make the images that are not there yet and return the path of each.

    Args:
        root: repository root.
        options: see the command's help.

    Raises:
        GenerationRefused: a bad option; one line.
        ValueError: unreadable files, or a file in the way.
        components.files.weight_folders.WeightsMissing: a line for each part that is not there.
    """
    _check(options)
    if options.size is not None:
        parse_size(options.size, round_size=options.round_size)
    from components.generation import sampling
    from components.generation.held_weights import encoder_loader
    from components.models.loading.memory_modes import memory_modes, parse_memory
    from flows import environment
    from flows.versioning.profiles import settings_of

    settings = settings_of(root)
    memory = (
        memory_modes(settings.generate.memory)
        if options.memory is None
        else parse_memory(options.memory)
    )
    # Reads weights, and so imports torch: after what is refused by its name.
    from components.models.loading.released import (
        check_transformer,
        departures,
        find_sources,
        source_digests,
    )

    environment.prepare(offline=settings.runtime.offline)
    if options.model is None:
        if options.transformer is not None:
            check_transformer(options.transformer)
        sources = sampling.model_sources(root, settings, transformer=options.transformer)
    else:
        base = options.base or root / "weights" / "FLUX.1-dev"
        sources = find_sources(options.model, base=base, transformer=options.transformer)
    chosen: dict[str, Any] = {
        "num_inference_steps": options.steps or None,
        "guidance_scale": options.guidance_scale,
        "schedule": options.schedule,
        "dtype": options.dtype,
        "quantisation": options.quantise,
        "text_quantisation": options.quantise,
    }
    sampler = replace(
        sampling.sampler_settings(_sped_up(settings, options)),
        vae_tiling=memory.vae_tiling,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    rope_variant, vae_stride = departures(sources, options.rope, options.vae_stride)
    sampler = replace(sampler, rope_variant=rope_variant, vae_stride=vae_stride)
    memory.check(sampler.quantisation, sampler.text_quantisation)
    sampler.speed.check(settings.runtime.device, sampler.dtype)
    requests = _requests(root, options, settings)
    digests = source_digests(sources, sampler.schedule)
    # The key in the name: other settings or weights are another file, nothing is overwritten.
    requests = [
        replace(
            request,
            name=f"{request.width}x{request.height}_seed{request.seed}_"
            f"{sampling.request_key(request, sampler, digests)[:10]}",
        )
        for request in requests
    ]
    requests = list({request.name: request for request in requests}.values())

    load_encoders = encoder_loader(sources, sampler, device=settings.runtime.device, memory=memory)
    made = sampling.generate_images(
        lambda: sampling.load_model(
            sources, sampler, device=settings.runtime.device, memory=memory
        ),
        requests,
        options.output,
        sampler=sampler,
        digests=digests,
        load_encoders=load_encoders if memory.text_first else None,
        batch_size=options.batch_size,
        file_format="jpg" if options.file_format == "jpg" else "png",
        replace=options.overwrite,
    )
    return [options.output / record.file for record in made]
