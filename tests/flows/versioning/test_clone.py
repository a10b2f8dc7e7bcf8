"""One opening of DVC's Repo for the questions of a unit, and the files as they are after it."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.versioning.clone import Clone
from flows.versioning.graph import GraphError


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Roots of every `Repo` that is opened from now on."""
    from dvc.repo import Repo

    opened: list[str] = []
    begin = Repo.__init__

    def counted(self: Any, root: str, **options: Any) -> None:
        opened.append(root)
        begin(self, root, **options)

    monkeypatch.setattr(Repo, "__init__", counted)
    return opened


def test_the_list_of_stages_opens_the_clone_once(
    toy: Path, openings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy)
    result = CliRunner().invoke(app, ["stage", "list"])
    assert result.exit_code == 0, result.output
    assert "never run" in result.output
    assert len(openings) == 1


def test_a_unit_shares_one_opening_and_answers_like_single_questions(
    toy: Path, openings: list[str]
) -> None:
    subprocess.run(["dvc", "repro", "-q", "c"], cwd=toy, check=True)
    clone = Clone(toy)
    single = clone.graph(), clone.stale(clone.graph()), clone.identity("c"), clone.stage("b")
    alone = len(openings)
    with clone.opened():
        graph = clone.graph()
        together = graph, clone.stale(graph), clone.identity("c"), clone.stage("b")
        assert clone.has_cached_result("a")
        assert not clone.has_cached_result("b")
    assert together == single
    assert set(together[1]) == {"b", "d"}
    assert alone == 5
    assert len(openings) == alone + 1


def test_after_a_unit_edits_and_what_another_process_made_are_seen(toy: Path) -> None:
    clone = Clone(toy)
    with clone.opened():
        graph = clone.graph()
        assert set(clone.stale(graph)) == {"a", "b", "c", "d"}
    subprocess.run(["dvc", "repro", "-q"], cwd=toy, check=True)
    assert set(clone.lock()) == {"a", "b", "c", "d"}
    with clone.opened():
        assert clone.stale(clone.graph()) == {}
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace("deps: [data/a, source]", "deps: [data/b]"))
    with clone.opened():
        graph = clone.graph()
        assert graph["c"].upstream == ("b",)
        assert set(clone.stale(graph)) == {"c", "d"}


def test_another_thread_waits_for_the_end_of_a_unit(toy: Path) -> None:
    clone = Clone(toy)
    answered = threading.Event()

    def ask() -> None:
        clone.graph()
        answered.set()

    with clone.opened():
        clone.graph()
        asking = threading.Thread(target=ask)
        asking.start()
        assert not answered.wait(0.5)
    asking.join(60)
    assert answered.is_set()


def test_a_unit_that_ends_with_an_error_leaves_nothing_open(toy: Path, openings: list[str]) -> None:
    clone = Clone(toy)
    with pytest.raises(GraphError), clone.opened():
        clone.graph("nothing")
    assert set(clone.graph()) == {"a", "b", "c", "d"}
    assert len(openings) == 2
