"""Files of low-rank adapters: names that diffusers or ComfyUI read, and what the files say.

Factors carry no further scale (W + up @ down), so that a reader that knows nothing of `alpha` is
right; where stock diffusers takes them, `alpha` keys say the same: alpha equals the rank.

Metadata: ModelSpec 1.0.1 (Stability AI; without the date, which would make equal adapters unequal
files), and under `ultraflux.` the base that the change belongs to. `ultraflux.base_sha256` is what
`sha256sum *.safetensors | sha256sum` prints in the base's transformer folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.files.safetensors_header import SPEC, described_header
from components.files.whole_files import whole_file
from components.settings.bad_input import BadInput
from components.training.adapters.flux_names import diffusers_names, original_names
from components.training.adapters.low_rank import Change, LowRank, reduced

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
BASE_SHA256, BASE_TITLE = "ultraflux.base_sha256", "ultraflux.base"
RANK, MISSING = "ultraflux.rank", "ultraflux.missing_share"
LAYERS = "ultraflux.layers"
"""Of files in ComfyUI's names: rank by diffusers' layer, so that they can be read back exactly."""
BACKBONE, STAGES = "ultraflux.backbone", "ultraflux.stages"
Keys = Literal["diffusers", "comfyui"]
ARCHITECTURES = {"flux": "flux-1-dev", "sd3": "stable-diffusion-3"}
"""As the training scripts of kohya name them, which read these files as well."""
_TAKES_ALPHA = ("flux",)
"""Where stock diffusers reads `alpha` keys in its own layout; elsewhere they would be unknown."""
_PREFIX = "transformer."
_KOHYA_DOWN, _KOHYA_UP = ".lora_down.weight", ".lora_up.weight"
_DOWN, _UP, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


@dataclass(frozen=True)
class Adapter:
    """A change of a transformer's weights, and what is known of it."""

    change: Change
    about: Mapping[str, str]
    """Metadata of the file."""

    @property
    def rank(self) -> int:
        """Largest rank of a layer."""
        return max(one.rank for one in self.change.values())

    def cut_to(self, rank: int) -> Adapter:
        """Its best approximation of at most `rank`; the file says what is missing."""
        change, missing = reduced(self.change, rank)
        before = float(self.about.get(MISSING, "0"))
        # Of cuts one after the other the sum is a bound.
        return Adapter(change, {**self.about, MISSING: f"{before + missing:.3g}"})


def write_adapter(adapter: Adapter, path: Path, keys: Keys = "diffusers") -> None:
    """Write one file, the same bytes for the same adapter.

    Args:
        adapter: whose metadata names the backbone.
        path: replaced if it exists; its folder exists.
        keys: `diffusers`: what `load_lora_weights` of the stock pipelines reads; `comfyui`: the
            original layers and names.

    Raises:
        ValueError: `comfyui` for another backbone than Flux, or for a layer it has no name for.
    """
    backbone = adapter.about[BACKBONE]
    tensors: dict[str, Tensor] = {}
    if keys == "comfyui":
        if backbone != "flux":
            raise ValueError(
                f"keys comfyui: an adapter of {backbone} has no other names there; ComfyUI reads "
                "those of diffusers"
            )
        change = original_names(adapter.change)
        names = ("", _KOHYA_DOWN, _KOHYA_UP)
        takes_alpha = True
        ranks = {name: one.rank for name, one in sorted(adapter.change.items())}
        layers = {LAYERS: json.dumps(ranks, separators=(",", ":"))}
    else:
        change, names = dict(adapter.change), (_PREFIX, _DOWN, _UP)
        takes_alpha, layers = backbone in _TAKES_ALPHA, {}
    prefix, down, up = names
    for name, one in change.items():
        tensors[f"{prefix}{name}{down}"] = one.down.contiguous()
        tensors[f"{prefix}{name}{up}"] = one.up.contiguous()
        if takes_alpha:
            tensors[f"{prefix}{name}{_ALPHA}"] = torch.tensor(float(one.rank))
    about = {
        **adapter.about,
        **layers,
        RANK: str(max(one.rank for one in change.values())),
        **SPEC,
        "modelspec.architecture": f"{ARCHITECTURES.get(backbone, backbone)}/lora",
        "modelspec.implementation": (
            "https://github.com/black-forest-labs/flux" if keys == "comfyui" else "diffusers"
        ),
    }
    with whole_file(path) as temporary:
        temporary.write_bytes(serialized(tensors, about))


def serialized(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata stand in order; the library's order differs by process.

    Args:
        tensors: contiguous, by name.
        about: metadata; the hash that ModelSpec defines is added.
    """
    data = safetensors.torch.save(dict(tensors))
    end = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data[end:]).hexdigest()
    return described_header(data[8:end], about, digest) + data[end:]


def read_adapter(path: Path) -> Adapter:
    """An adapter as `write_adapter` leaves it, beside exported weights or in ComfyUI's names.

    Args:
        path: the file, or the folder of exported weights that it lies in.

    Raises:
        BadInput: no such file, or not an adapter of this project; one line.
    """
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"{file}: no adapter; it lies beside weights that were trained with one")
    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise BadInput(f"{file}: not a safetensors file ({problem})") from None
    if BACKBONE not in about:
        raise BadInput(
            f"{file}: does not name its base (made by an earlier version, or by another program); "
            "run the stage again"
        )
    change = _factors(tensors, _PREFIX, _DOWN, _UP)
    if LAYERS in about:
        try:
            ranks = json.loads(about[LAYERS])
            change = diffusers_names(_factors(tensors, "", _KOHYA_DOWN, _KOHYA_UP), ranks)
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise BadInput(f"{file}: not as it was written ({problem})") from None
    if not change:
        raise BadInput(f"{file}: its names are not those of diffusers; give the exported folder")
    own = {key: value for key, value in about.items() if not _is_made_anew(key)}
    return Adapter(change, own)


def _factors(tensors: Mapping[str, Tensor], prefix: str, down: str, up: str) -> dict[str, LowRank]:
    """Changes by layer, of tensors whose names begin and end so."""
    layers = [
        name.removeprefix(prefix).removesuffix(down)
        for name in tensors
        if name.startswith(prefix) and name.endswith(down)
    ]
    return {
        layer: LowRank(tensors[f"{prefix}{layer}{down}"], tensors[f"{prefix}{layer}{up}"])
        for layer in layers
    }


def _is_made_anew(key: str) -> bool:
    """Of metadata that follow from the tensors."""
    if key == LAYERS:
        return True
    made = ("sai_model_spec", "architecture", "implementation", "hash_sha256")
    return key in {f"modelspec.{name}" for name in made}
