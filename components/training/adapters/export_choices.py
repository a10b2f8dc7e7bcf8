"""Forms in which whole weights are written, known before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from components.settings.bad_input import BadInput

Layout = Literal["diffusers", "bfl"]
Bits = Literal["float32", "bfloat16", "fp8"]
Rounding = Literal["nearest", "stochastic", "deltas"]


WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DELTAS_FILE = "float32_deltas.safetensors"


def check_target(source: Path, out: Path, layout: Layout) -> None:
    """Refuse a target that is not the layout's, or over which nothing may be written.

    Args:
        source: folder of the weights.
        out: see `weight_export.export_whole`.
        layout: of the export.

    Raises:
        BadInput: one line.
    """
    here, target = source.resolve(), out.resolve()
    if here in (target, *target.parents) or target in here.parents:
        raise BadInput(f"--out {out}: would be written over {source}; give another place")
    if layout == "bfl":
        if out.is_dir() or out.suffix != ".safetensors":
            raise BadInput(f"--out {out}: --layout bfl writes one file; give a .safetensors name")
        return
    if out.is_file() or out.suffix == ".safetensors":
        raise BadInput(f"--out {out}: --layout diffusers writes a folder; give its name")
    ours = {"config.json", WEIGHTS_FILE, DELTAS_FILE}
    if out.is_dir() and (others := sorted({one.name for one in out.iterdir()} - ours)):
        raise BadInput(
            f"--out {out}: a folder that holds {others[0]}; it would be replaced, give another"
        )


def check_choice(name: str, value: str, kinds: Any) -> None:
    """Refuse a value that is none of a literal's.

    Raises:
        BadInput: one line.
    """
    if value not in get_args(kinds):
        raise BadInput(f"--{name} {value}: one of {', '.join(get_args(kinds))}")
