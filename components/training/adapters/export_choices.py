"""Forms in which whole weights are written, known before anything heavy is imported."""

from __future__ import annotations

from typing import Any, Literal, get_args

from components.settings.bad_input import BadInput

Layout = Literal["diffusers", "bfl"]
Bits = Literal["float32", "bfloat16", "fp8"]
Rounding = Literal["nearest", "stochastic", "deltas"]


def check_choice(name: str, value: str, kinds: Any) -> None:
    """Refuse a value that is none of a literal's.

    Raises:
        BadInput: one line.
    """
    if value not in get_args(kinds):
        raise BadInput(f"--{name} {value}: one of {', '.join(get_args(kinds))}")
