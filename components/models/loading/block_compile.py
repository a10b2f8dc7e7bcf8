"""Transformer blocks as compiled code, for training and for sampling."""

from __future__ import annotations

from typing import Any

from components.models.loading.transformer_blocks import transformer_blocks


def require_compiler(setting: str) -> None:
    """Refuse to compile for the CPU where there is no C++ compiler.

    Args:
        setting: dotted name and value, for the message.

    Raises:
        ValueError: one line.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        # Asked now: otherwise the lack would show at the first step, after the model is loaded.
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            f"{setting}: device cpu needs a C++ compiler (g++, or the one in CXX), and there is "
            "none"
        ) from None


def compile_blocks(model: Any) -> None:
    """Compile every block of a diffusers transformer when it is first called.

    The names of its weights stay as they are.

    Args:
        model: bare model.
    """
    for block in transformer_blocks(model):
        # In place. `torch.compile(block)` would wrap it, and every weight's name would get a
        # prefix that no export or adapter expects.
        block.compile(dynamic=True)
