"""Whole weights for other programs: as a diffusers folder or one file, and in fewer bits.

Every file says what it is (ModelSpec 1.0.1), and what is lost is measured: the error against the
float32 weights, and the share of what training moved them by that is still there
(`sharded.hand_over`). A learning rate of 1e-6 moves weights by less than bfloat16 can hold, so
plain rounding gives most of it back; two ways keep it:

- `stochastic`: up or down with probabilities that make the mean exact (of many weights, not of
  one); the distance to the learned weights is larger than with plain rounding, its direction none.
- `deltas`: beside plain bfloat16 a file with what rounding took, float32; the sum is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from components.files.safetensors_header import SPEC, metadata_of
from components.files.whole_files import whole_file, whole_folder
from components.models.backbones import backbone_of_config
from components.models.checkpoint_files import file_shapes
from components.models.loading.original_layout import original_layout
from components.models.loading.single_file import rope_metadata
from components.settings.bad_input import BadInput
from components.training.adapters.adapter_files import ARCHITECTURES, serialized
from components.training.adapters.export_choices import (
    DELTAS_FILE,
    WEIGHTS_FILE,
    Bits,
    Layout,
    Rounding,
    check_target,
)
from components.training.sharded.hand_over import StoredWeights, read_movement

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Exported:
    """What was written, and what it lost."""

    files: tuple[Path, ...]
    error: float
    """||written - learned|| / ||learned|| over all weights."""
    kept: float | None
    """1 - ||written - learned|| / ||learned - start|| over the trained weights, at least 0. None:
    the folder does not say how far training moved them."""
    mean_error: float
    """Mean of written - learned over the mean absolute value: what does not average out."""


def stochastic_bfloat16(weights: Tensor, seed: int) -> Tensor:
    """Rounded up or down at random, so that the expected value is the weight.

    Args:
        weights: float32, finite.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 1 << 16, weights.shape, generator=generator, dtype=torch.int32)
    # bfloat16 is the upper half of float32: what is added carries into it as often as is due.
    bits = weights.contiguous().view(torch.int32) + noise
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def _is_block_matrix(name: str, tensor: Tensor) -> bool:
    return "transformer_blocks." in name and name.endswith(".weight") and tensor.dim() == 2


def _rounded(name: str, tensor: Tensor, bits: Bits, rounding: Rounding) -> Tensor:
    if bits == "float32":
        return tensor
    if bits == "fp8" and _is_block_matrix(name, tensor):
        # As the fp8 files that ComfyUI reads: plain values, no scales.
        return tensor.clamp(-448, 448).to(_FP8)
    if rounding == "stochastic" and bits == "bfloat16":
        return stochastic_bfloat16(tensor, _seed(name))
    return tensor.to(torch.bfloat16)


def model_metadata(
    folder: Path,
    config: Mapping[str, Any],
    *,
    layout: Layout,
    bits: Bits,
    resolution: str | None,
    date: str,
) -> dict[str, str]:
    """ModelSpec entries of whole weights, from the model card beside them.

    Args:
        folder: exported weights; without a card only what the files themselves say.
        config: of the transformer.
        layout: of the file.
        bits: of its values.
        resolution: WIDTHxHEIGHT that it was trained at; None: what the files there say, if any.
        date: ISO 8601.
    """
    card = _front_matter(folder)
    ours = card.get("ultraflux", {})
    backbone = backbone_of_config(config).name
    about = {
        **SPEC,
        "modelspec.architecture": ARCHITECTURES.get(backbone, backbone),
        "modelspec.implementation": (
            "https://github.com/black-forest-labs/flux" if layout == "bfl" else "diffusers"
        ),
        "modelspec.title": f"UltraFlux {ours.get('stage', folder.parent.name)} "
        f"{ours.get('weights', folder.name)} {bits}",
        "modelspec.date": date,
        "modelspec.license": str(card.get("license_name") or card.get("license") or "unknown"),
        "modelspec.tags": ", ".join(card.get("tags", ["ultraflux", backbone])),
        "ultraflux.backbone": backbone,
    }
    if resolution is None:
        # What the stage's own files say.
        files = sorted(folder.glob("diffusion*.safetensors"))
        resolution = metadata_of(files[0]).get("modelspec.resolution") if files else None
    if resolution is not None:
        about["modelspec.resolution"] = resolution
    if card.get("base_model"):
        about["ultraflux.base"] = str(card["base_model"])
    for name in ("initial_weights", "weights"):
        if ours.get("digests", {}).get(name):
            key = "base_sha256" if name == "initial_weights" else "source_sha256"
            about[f"ultraflux.{key}"] = ours["digests"][name]
    return about | rope_metadata(config)


def _front_matter(folder: Path) -> dict[str, Any]:
    card = folder / "README.md"
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 else {}


def export_whole(
    folder: Path,
    out: Path,
    *,
    layout: Layout,
    bits: Bits,
    rounding: Rounding = "nearest",
    resolution: str | None = None,
    date: str,
    min_kept: float = 0.0,
) -> Exported:
    """Write whole weights for other programs.

    Args:
        folder: float32 diffusers folder of a transformer.
        out: `diffusers`: folder; `bfl`: one .safetensors file. Replaced if it is there, a folder
            only where it is an export.
        layout: names and matrices.
        bits: of the values; fp8 (E4M3) is of the blocks' matrices, all else then bfloat16.
        rounding: to bfloat16.
        resolution: see `model_metadata`.
        date: likewise.
        min_kept: share of what training moved the weights by that has to be left, 0 to 1.

    Raises:
        BadInput: no such folder, choices that do not go together, or a hand-over that keeps less
            than `min_kept`, of which nothing is written; one line.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise BadInput(f"{folder}: not a diffusers folder of a transformer (no config.json)")
    check_target(folder, out, layout)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    try:
        backbone_of_config(config)
    except ValueError as problem:
        raise BadInput(f"{folder}: {problem}") from None
    if layout == "bfl" and backbone_of_config(config).name != "flux":
        raise BadInput("--layout bfl: only Flux has weights in one file of that layout")
    if rounding != "nearest" and bits != "bfloat16":
        raise BadInput(f"--rounding {rounding}: of --dtype bfloat16, not {bits}")
    stored = StoredWeights(folder)
    files = sorted(folder.glob("diffusion*.safetensors"))
    names = sorted(name for file in files for name in file_shapes(file))
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    square = whole = signed = absolute = 0.0
    moved_error = 0.0
    moved = read_movement(folder)
    for name in names:
        learned = stored.read(name).float()
        written = _rounded(name, learned, bits, rounding)
        difference = written.double() - learned.double()
        error = float(difference.square().sum())
        square, whole = square + error, whole + float(learned.double().square().sum())
        signed += float(difference.sum())
        absolute += float(learned.double().abs().sum())
        if rounding == "deltas":
            # Exact: the lower half of a float32 has room in another one.
            deltas[name] = learned - written.float()
            error = 0.0
        if name in (moved or {}):
            moved_error += error
        tensors[name] = written
    length = math.sqrt(sum(moved.values())) if moved else 0.0
    kept = max(0.0, 1 - math.sqrt(moved_error) / length) if length else None
    if (0.0 if kept is None else kept) < min_kept:
        said = "an unknown share" if kept is None else f"{kept:.1%}"
        raise BadInput(
            f"{folder}: {bits} keeps {said} of what training moved the weights by (at least "
            f"{min_kept:.1%} is asked for): take float32, or bfloat16 with --rounding deltas"
        )
    about = model_metadata(
        folder, config, layout=layout, bits=bits, resolution=resolution, date=date
    )
    written_files = _write(tensors, deltas, config, out, layout, about)
    return Exported(
        files=written_files,
        error=0.0 if rounding == "deltas" else math.sqrt(square / whole) if whole else 0.0,
        kept=kept,
        mean_error=0.0 if rounding == "deltas" or not absolute else signed / absolute,
    )


def _write(
    tensors: dict[str, Tensor],
    deltas: dict[str, Tensor],
    config: dict[str, Any],
    out: Path,
    layout: Layout,
    about: Mapping[str, str],
) -> tuple[Path, ...]:
    prepare: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = (
        original_layout if layout == "bfl" else dict
    )

    def save(values: Mapping[str, Tensor], path: Path) -> None:
        whole = {name: tensor.contiguous() for name, tensor in prepare(values).items()}
        # Stock loaders of folders ask for this entry.
        path.write_bytes(serialized(whole, {**about, "format": "pt"}))

    if layout == "bfl":
        with whole_file(out) as temporary:
            save(tensors, temporary)
        if not deltas:
            return (out,)
        beside = out.with_name(f"{out.stem}.{DELTAS_FILE}")
        with whole_file(beside) as temporary:
            save(deltas, temporary)
        return out, beside
    with whole_folder(out) as aside:
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save(tensors, aside / WEIGHTS_FILE)
        if deltas:
            save(deltas, aside / DELTAS_FILE)
    names = [WEIGHTS_FILE, *([DELTAS_FILE] if deltas else [])]
    return tuple(out / name for name in names)
