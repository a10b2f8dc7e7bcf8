"""Load a pipeline from the layouts in which weights are published, or say exactly what is missing.

A model may be
- a repository folder with `transformer/` and `vae/` (UltraFlux-v1), or with everything
  (FLUX.1-dev, a saved `UltraFluxPipeline`);
- a transformer's own folder (UltraFlux-v1-1-Transformer);
- one `.safetensors` or `.gguf` file with a Flux transformer.

What it lacks comes from a base folder, usually FLUX.1-dev. Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from components.files.install_hints import download_command
from components.files.safetensors_header import metadata_of
from components.files.weight_folders import (
    PICKLED_SUFFIXES,
    ComponentsMissing,
    WeightsMissing,
    class_name,
    file_digest,
    folder_digest,
    require_class,
)
from components.models.autoencoder_f16 import VAE_CLASSES, AutoencoderKLF16, DecodeMode
from components.models.backbones import backbone_in, family_in, family_of
from components.models.checkpoint_files import WeightsBroken, check_folder, file_shapes
from components.models.f16_pipeline import SHIFT, F16Pipeline, Schedule, build_scheduler
from components.models.loading.flux_transformer import TRANSFORMER_CLASSES
from components.models.loading.single_file import said_rope
from components.models.resonance_rope import RopeVariant
from components.models.text_encoders import FOLDERS

ULTRAFLUX, ULTRAFLUX_V11 = "Owen777/UltraFlux-v1", "Owen777/UltraFlux-v1-1-Transformer"
FLUX = "black-forest-labs/FLUX.1-dev"
_ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""As diffusers names it."""
_SCHEDULE = "scheduler_config.json"


@dataclass(frozen=True)
class ModelSources:
    """Where each part of a pipeline is."""

    transformer: Path
    """Folder, or .safetensors or .gguf file."""
    autoencoder: Path
    text_encoders: Path
    """Parent of the four folders of `text_encoders.FOLDERS`."""
    scheduler: Path | None = None
    """Folder with scheduler_config.json; None: Flux' values."""


def _holds(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "tokenizer_config.json"))


def find_sources(
    model: Path,
    *,
    base: Path | None = None,
    transformer: Path | None = None,
    autoencoder: Path | None = None,
) -> ModelSources:
    """Find every part of a pipeline.

    Args:
        model: see the module docstring.
        base: folder for what the model lacks; None: there is none.
        transformer: folder or file that replaces the model's transformer.
        autoencoder: folder that replaces the model's autoencoder.

    Raises:
        ComponentsMissing: parts are not there; a line for each with its path and the command that
            gets it.
        WeightsBroken: `model` is a file of pickled weights, or something else than a model.
    """
    # A file or a transformer's own folder is only a transformer; the rest comes from the base.
    repository = model
    if model.suffix in (".safetensors", ".gguf", *PICKLED_SUFFIXES) or class_name(model) in (
        TRANSFORMER_CLASSES
    ):
        transformer = transformer or model
        repository = base or Path("weights/FLUX.1-dev")
    elif model.is_file():
        raise WeightsBroken(f"{model}: neither .safetensors nor .gguf by its name; rename it")
    elif transformer is None:
        _refuse_other(model)
    # Without a base everything must be in the repository itself, as in FLUX.1-dev.
    fallback = base or repository
    # Collected, not raised one by one: each would cost the user another download and another try.
    missing: list[WeightsMissing] = []
    chosen_transformer = transformer or repository / "transformer"
    try:
        check_transformer(chosen_transformer, None if transformer else repository)
    except WeightsMissing as problem:
        missing.append(problem)
    # The model's own autoencoder first: UltraFlux' F16 decoder is not the base's F8.
    candidates = [repository / "vae", fallback / "vae"]
    chosen_vae = autoencoder or next(filter(_holds, candidates), candidates[0])
    if not _holds(chosen_vae):
        command = download_command(
            _repository_of(chosen_vae.parent), chosen_vae.parent, include=("vae/*",)
        )
        missing.append(WeightsMissing("autoencoder (vae)", chosen_vae, command))
    # Encoders and tokenizers belong together: they come from one folder.
    whole = [root for root in (repository, fallback) if all(_holds(root / n) for n in FOLDERS)]
    encoders = whole[0] if whole else fallback
    for name in FOLDERS:
        if not _holds(encoders / name):
            command = download_command(FLUX, base or "weights/FLUX.1-dev", include=(f"{name}/*",))
            missing.append(WeightsMissing(name, encoders / name, command))
    if missing:
        raise ComponentsMissing(missing)
    # Never missing: without a folder Flux' values are built in.
    schedules = (root / "scheduler" for root in (repository, fallback))
    scheduler = next((s for s in schedules if (s / _SCHEDULE).is_file()), None)
    return ModelSources(chosen_transformer, chosen_vae, encoders, scheduler)


def check_transformer(path: Path, repository: Path | None = None) -> None:
    """Refuse what cannot be a transformer, before anything is read.

    Args:
        path: folder, or .safetensors or .gguf file.
        repository: the model's folder that `path` is part of; None: it stands alone.

    Raises:
        WeightsMissing: it is not there; names the command that gets it.
        WeightsBroken: pickled weights.
    """
    if not (path.is_file() or _holds(path)):
        raise _missing_transformer(path, repository)
    if path.suffix in PICKLED_SUFFIXES:
        raise WeightsBroken(
            f"{path}: pickled weights can run code and are not loaded; get the .safetensors file"
        )


def _refuse_other(folder: Path) -> None:
    """Refuse a folder of something else, where a download would be no help.

    Raises:
        WeightsBroken: it has no transformer and says what it has.
    """
    if not folder.is_dir() or _holds(folder / "transformer"):
        return
    kind = class_name(folder)
    if kind is not None:
        raise WeightsBroken(
            f"{folder}: holds {kind}; give a model's whole folder, or that of a Flux transformer"
        )
    if (folder / _ADAPTER_FILE).is_file():
        raise WeightsBroken(f"{folder}: holds an adapter ({_ADAPTER_FILE}) and no whole weights")
    if any(folder.glob("*/config.json")):
        parts = sorted(one.parent.name for one in folder.glob("*/config.json"))
        if not {"vae", "text_encoder_2"} & set(parts) or "unet" in parts:
            raise WeightsBroken(f"{folder}: no transformer/ beside {', '.join(parts)}: not Flux")
    files = sorted(one for one in folder.iterdir() if one.suffix in (".safetensors", ".gguf"))
    if files:
        raise WeightsBroken(f"{folder}: no transformer/ in it; give a file, such as {files[0]}")


def _repository_of(folder: Path) -> str:
    # Folders are named after repositories by the download commands, so the name tells which one.
    return FLUX if "flux.1" in folder.name.lower() else ULTRAFLUX


def _missing_transformer(path: Path, repository: Path | None) -> WeightsMissing:
    if repository is not None:
        command = download_command(
            _repository_of(repository), repository, include=("transformer/*",)
        )
        return WeightsMissing("transformer", path, command)
    if path.suffix in (".safetensors", ".gguf"):
        command = download_command(FLUX, path.parent, path.name)
    else:
        command = download_command(ULTRAFLUX_V11, path)
    return WeightsMissing("transformer", path, command)


def source_digests(sources: ModelSources, schedule: Schedule = "static") -> dict[str, str]:
    """Content digest of each part; of a text encoder folder only its parts count.

    A folder's scheduler is a part where `load_scheduler` reads it.
    """
    file = sources.transformer
    # A FLUX.1-dev folder also holds what is not read here.
    family = family_in(sources.text_encoders)
    parts = [f"{name}={folder_digest(sources.text_encoders / name)}" for name in family.folders]
    read: dict[str, str] = {}
    if schedule == "dynamic" and sources.scheduler is not None:
        read["scheduler"] = file_digest(sources.scheduler / _SCHEDULE)
    return {
        **read,
        "autoencoder": folder_digest(sources.autoencoder),
        "transformer": file_digest(file) if file.is_file() else folder_digest(file),
        "text_encoders": hashlib.sha256("\n".join(parts).encode()).hexdigest(),
    }


def departures(sources: ModelSources, rope_variant: str | None, stride: int) -> tuple[Any, Any]:
    """What of a wish differs from the weights' own and so changes pictures.

    Args:
        sources: from `find_sources`.
        rope_variant: wanted; None: the weights' own.
        stride: wanted of the autoencoder, where it is a stock one.

    Returns:
        (`rope_variant` or None, `stride` or 2), as `load_pipeline` takes them.
    """
    if class_name(sources.autoencoder) != "AutoencoderKL":
        stride = 2
    if rope_variant is not None and rope_variant == _own_rope(sources.transformer):
        rope_variant = None
    return rope_variant, stride


def _own_rope(transformer: Path) -> str | None:
    """What a transformer without a wish takes; None: its class has no such thing."""
    if transformer.suffix == ".safetensors" and transformer.is_file():
        # Names a file that is none.
        file_shapes(transformer)
        return str(said_rope(metadata_of(transformer)).get("rope_variant", "official"))
    if transformer.is_file():
        return "official"
    if class_name(transformer) not in TRANSFORMER_CLASSES:
        return None
    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    return str(config.get("rope_variant", "official"))


def load_autoencoder(
    path: Path,
    *,
    dtype: torch.dtype,
    stride: Literal[1, 2] = 2,
    decode_mode: DecodeMode = "official_partitioned",
) -> AutoencoderKLF16:
    """An autoencoder from a folder: ours as it was saved, a stock one with the given stride.

    Args:
        path: folder.
        dtype: of the weights.
        stride: of a stock (F8) folder; 2 is UltraFlux' F16, 1 plain Flux.
        decode_mode: of a stock folder; the default is the released decoder's.

    Raises:
        WeightsMissing: a file is not there.
        WeightsBroken: unreadable files, or tensors missing, unknown or misshapen; names them.
        ValueError: the folder holds another class.
    """
    require_class(path, None, VAE_CLASSES)
    # Our own folders say what they are; their stride and grid are what the decoder was trained for.
    stock = class_name(path) == "AutoencoderKL"
    changes: dict[str, Any] = {"stride": stride, "decode_mode": decode_mode} if stock else {}
    check_folder(path, AutoencoderKLF16, "autoencoder", **changes)
    return AutoencoderKLF16.from_pretrained(
        path, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **changes
    ).eval()


def load_scheduler(
    sources: ModelSources, *, schedule: Schedule, shift: float
) -> FlowMatchEulerDiscreteScheduler:
    """The sampling schedule; a folder's own values serve `dynamic`, as in stock Flux."""
    # The static schedule is the released script's, whatever a folder's scheduler says.
    if schedule == "dynamic" and sources.scheduler is not None:
        loaded: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            sources.scheduler, local_files_only=True, use_dynamic_shifting=True
        )
        return loaded
    return build_scheduler(shift, schedule)


def load_pipeline(
    sources: ModelSources,
    *,
    dtype: torch.dtype,
    encoders: Any = None,
    with_encoders: bool = True,
    rope_variant: RopeVariant | None = None,
    stride: Literal[1, 2] = 2,
    decode_mode: DecodeMode = "official_partitioned",
    schedule: Schedule = "static",
    shift: float = SHIFT,
) -> F16Pipeline:
    """All parts as one pipeline on the CPU, that of the transformer's backbone.

    Args:
        sources: from `find_sources`.
        dtype: of all weights.
        encoders: text encoders that are loaded already.
        with_encoders: False leaves them out: the caller passes embeddings.
        rope_variant: of the rotary positions; None: what the configuration says.
        stride: see `load_autoencoder`.
        decode_mode: see `load_autoencoder`.
        schedule: static (the released script) or dynamic (stock Flux).
        shift: of the static schedule.

    Raises:
        WeightsMissing: a file is not there.
        WeightsBroken: files that are not these weights.
        ValueError: parts that do not fit together.
    """
    # The folder says which encoders they are; whether they fit the transformer is asked below.
    if encoders is None and with_encoders:
        encoders = family_in(sources.text_encoders).load(sources.text_encoders, dtype=dtype)
    # Compared before gigabytes of transformer are read.
    backbone = backbone_in(sources.transformer)
    if encoders is not None and family_of(encoders) is not backbone.text_family():
        raise ValueError(
            f"{sources.text_encoders}: does not hold the text encoders of the {backbone.title} "
            f"transformer {sources.transformer}"
        )
    vae = load_autoencoder(sources.autoencoder, dtype=dtype, stride=stride, decode_mode=decode_mode)
    pipeline: Any = backbone.pipeline_class().from_components(
        vae,
        backbone.load_released(sources.transformer, dtype=dtype, rope_variant=rope_variant),
        encoders,
        scheduler=load_scheduler(sources, schedule=schedule, shift=shift),
    )
    # None: no bar of its own where stderr is not a terminal.
    pipeline.set_progress_bar_config(disable=None, leave=False)
    made: F16Pipeline = pipeline
    return made
