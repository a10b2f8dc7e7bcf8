"""The library's page, against the library."""

from __future__ import annotations

import ast
import importlib

import api_reference
import pytest

MODULES = api_reference.modules()


def test_the_page_of_the_library_is_what_the_docstrings_say() -> None:
    assert api_reference.PAGE.read_text(encoding="utf-8") == api_reference.page(), (
        "docs/api.md is out of date: python benchmarks/api_reference.py"
    )


@pytest.mark.parametrize("module", MODULES)
def test_what_is_public_says_what_it_is(module: str) -> None:
    tree = api_reference._parsed(module)
    assert ast.get_docstring(tree)
    silent = [node.name for node in api_reference.public(tree) if not ast.get_docstring(node)]
    assert silent == []


@pytest.mark.parametrize("module", ["components.objectives.haar", "components.files.signatures"])
def test_names_of_the_page_are_names_of_the_module(module: str) -> None:
    """Two small modules stand for all: importing the others costs what they import."""
    found = importlib.import_module(module)
    named = {node.name for node in api_reference.public(api_reference._parsed(module))}
    assert named
    assert all(getattr(found, name).__module__ == module for name in named)


def test_docstrings_become_lists() -> None:
    text = """Do it.

    Args:
        size: pixels,
            at least 1.
        *rest: others.

    Returns:
        (height, width): both
        in pixels.

    Raises:
        ValueError: no size.
    """
    assert api_reference._prose(ast.literal_eval(repr(text)).replace("\n    ", "\n").strip()) == (
        "Do it.\n\n*Args*\n\n- `size`: pixels,\n  at least 1.\n- `*rest`: others.\n\n"
        "*Returns*\n\n- (height, width): both\n  in pixels.\n\n"
        "*Raises*\n\n- `ValueError`: no size."
    )
