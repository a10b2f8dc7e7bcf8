"""The command `ultraflux generate`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.command_line import fail, print_json, project_root, refusing, workplace
from flows.commands.images.sign import Signer, is_signed, made_with

EPILOG = """Examples:

  ultraflux generate --prompt "a frozen lake at dawn" --size 5120x2880 --num-images 4

  ultraflux generate --prompts prompts.jsonl --size 4096x4096 --output pictures

  ultraflux generate --model weights/UltraFlux-v1 --base weights/FLUX.1-dev --prompt "..." --size
  4096x4096 --dtype bfloat16 --memory text-first,vae-tiling

  ultraflux generate --image photo.jpg --strength 0.6 --prompt "the same place in winter"

  ultraflux generate --show-metadata outputs/picture.png"""


def generate(
    prompt: Annotated[str | None, typer.Option(help="What to paint.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of prompts (.txt, .jsonl, .csv); finished ones are skipped."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels, multiples of 32.")
    ] = None,
    round_size: Annotated[
        bool, typer.Option("--round-size", help="Round edges to the nearest multiple of 32.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    num_images: Annotated[int, typer.Option(help="Per prompt; seeds count up.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps (0: the settings' value).")] = 0,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Input of the guidance embedding.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="static (released script) or dynamic (stock Flux).")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="none, or of text-first, model-offload, block-offload, vae-slicing, "
            "vae-tiling; several with commas. Default: the settings' generate.memory."
        ),
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option(
            help="Weights of transformer and text encoders in none, int8, nf4 or fp8. Default: "
            "the settings' models.*.quantisation."
        ),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            help="native, flash, flash_3, cudnn (rounding) or sage (approximate). Default: the "
            "settings' generate.attention_backend."
        ),
    ] = None,
    step_cache: Annotated[
        str | None,
        typer.Option(
            help="none, first_block or taylorseer: leave blocks out of steps (approximate). "
            "Default: the settings' generate.step_cache."
        ),
    ] = None,
    step_cache_threshold: Annotated[
        float | None, typer.Option(help="Of first_block; larger leaves more out.")
    ] = None,
    step_cache_interval: Annotated[
        int | None, typer.Option(help="Of taylorseer: steps from one computed step to the next.")
    ] = None,
    compile: Annotated[
        str | None, typer.Option(help="none, or blocks: compiled code (rounding).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images made together; 1 is exact.")] = 1,
    image: Annotated[Path | None, typer.Option(help="Starting picture (image-to-image).")] = None,
    strength: Annotated[
        float | None, typer.Option(help="0: keep --image, 1: forget it (default: 0.6).")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="UltraFlux-v1 or FLUX.1-dev folder, a transformer's folder, or a .safetensors "
            "or .gguf file; default: the weights that the pipeline trained."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Folder for what --model lacks (default: weights/FLUX.1-dev)."),
    ] = None,
    transformer: Annotated[
        Path | None, typer.Option(help="Replaces the model's transformer (v1.1).")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(help="official, official_prefix, paper or flux.")
    ] = None,
    vae_stride: Annotated[int, typer.Option(help="Of a stock VAE: 2 is F16, 1 is F8.")] = 2,
    refine: Annotated[
        bool, typer.Option("--refine", help="Enrich prompts first (settings: refiner).")
    ] = False,
    file_format: Annotated[str, typer.Option("--format", help="png or jpg.")] = "png",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace other files under the same name.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs"),
    sign: Annotated[
        bool,
        typer.Option(
            "--sign",
            envvar="ULTRAFLUX_SIGN",
            help="With a signed C2PA manifest (see [bold]ultraflux sign --help[/]).",
        ),
    ] = False,
    show_metadata: Annotated[
        Path | None, typer.Option(help="Print what made a picture, as JSON, and stop.")
    ] = None,
) -> None:
    """Paint pictures from text, or from a picture and text, and print their paths."""
    # Before anything else has a name: the options below, by their fields' names.
    typed = locals()
    if show_metadata is not None:
        from components.generation.image_metadata import read_metadata

        with refusing(ValueError):
            metadata = read_metadata(show_metadata)
        if "ultraflux_key" not in metadata:
            raise fail(f"{show_metadata}: not made by this project, or its metadata was removed", 1)
        print_json(metadata)
        return
    from components.files.weight_folders import WeightsMissing
    from flows.commands.images.generation import GenerateOptions
    from flows.commands.images.generation import generate as make

    options = GenerateOptions(**{one.name: typed[one.name] for one in fields(GenerateOptions)})
    # The key that signs is a project's.
    root = project_root() if sign else workplace()
    with refusing(WeightsMissing, ValueError):
        # Before weights are loaded: a key that cannot sign is found out now.
        signer = Signer(root) if sign else None
        for path in make(root, options):
            # A picture that was there before keeps the manifest that it has.
            if signer is not None and not is_signed(path):
                signer.sign(path, path, made_with(path))
            print(path)
