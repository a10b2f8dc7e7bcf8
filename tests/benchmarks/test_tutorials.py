"""Tutorials are typed as they are printed, in a fresh clone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tutorial

from components.settings.schema import Settings

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
PAGE = """\
# A page
<!-- not run: needs a card -->
```bash
false
```
```text
of what is not run
```
```bash
cat note
```
```text
two ... words
```
words
<!-- runs first: what a reader has -->
```bash
echo "two  shown   words" > note; echo $HOME
```
"""


def run(page: Path, clone: Callable[..., Path]) -> list[str]:
    folder = clone("clone", {})
    home = folder.parent / f"{folder.name}-home"
    home.mkdir()
    return tutorial.run_page(page, folder, home)


def test_blocks_run_in_order_and_show_what_the_page_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    outputs = tutorial.run_page(page, tmp_path, tmp_path / "home")
    assert outputs == [f"{tmp_path}/home\n", "two  shown   words\n"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("two ... words", "three ... words", "does not print\nthree ... words"),
        # A part of a line is not the line.
        ("two ... words", "two shown", "does not print\ntwo shown"),
        ("cat note", "cat gone", "ended with 1"),
        # Not only the last command of a block counts.
        ("cat note", "false\ncat note", "ended with 1"),
    ],
)
def test_a_page_that_says_what_does_not_happen_fails(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(old, new))
    with pytest.raises(tutorial.TutorialFailed, match=words):
        tutorial.run_page(page, tmp_path, tmp_path)


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_every_page_shows_outputs_of_what_it_runs(page: Path) -> None:
    found = tutorial.blocks(page.read_text(encoding="utf-8"))
    assert sum(bool(block.printed) for block in found if block.how != "not run") >= 2


@pytest.mark.slow
def test_two_systems_are_evaluated_as_the_page_says(clone: Callable[..., Path]) -> None:
    assert "better" in run(TUTORIALS / "evaluating.md", clone)[1]


@pytest.mark.slow
def test_the_recipe_is_planned_as_the_page_says(clone: Callable[..., Path]) -> None:
    run(TUTORIALS / "cluster.md", clone)


@pytest.mark.slow
def test_photographs_become_an_adapter_and_pictures_as_the_page_says(
    clone: Callable[..., Path],
) -> None:
    run(TUTORIALS / "own_photographs.md", clone)


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_settings_that_a_tutorial_names_exist(page: Path) -> None:
    """Such as `dit_stage1.steps`, in text and behind -S."""
    text = page.read_text(encoding="utf-8")
    sections = "|".join(Settings.model_fields)
    named = set(re.findall(rf"(?:`|-S )((?:{sections})(?:\.[a-z0-9_]+)+)", text))
    assert {name for name in named if not exists(name)} == set()


def exists(name: str) -> bool:
    model: object = Settings
    for part in name.split("."):
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return False
        annotation = fields[part].annotation
        choices = getattr(annotation, "__args__", (annotation,))
        model = next((one for one in choices if hasattr(one, "model_fields")), None)
    return True
