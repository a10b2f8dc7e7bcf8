"""Commands in messages are ones that pip and the hub's client accept; one module writes them."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.cli._cli_utils import typer_factory
from huggingface_hub.cli.download import download

from components.files.install_hints import download_command, fetch_command, install_hint
from components.metrics.cards import CARDS
from components.metrics.weight_files import parts

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
COMMANDS = sorted(
    {part.command for card in CARDS if card.weights is not None for part in parts(card.weights)}
)


def extras(root: Path) -> dict[str, list[str]]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


def calls(root: Path, function: str) -> Iterator[tuple[str, ast.Call]]:
    """(file:line, call) of every call of a function of install_hints."""
    for room in ("components", "flows"):
        for path in sorted((root / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == function:
                    yield f"{path.relative_to(root)}:{node.lineno}", node


def understood(command: str) -> dict[str, Any]:
    """What the hub's client makes of a command; nothing is fetched.

    Raises:
        click.UsageError: the client refuses it.
    """
    program, name, *words = shlex.split(command)
    assert (program, name) == ("hf", "download")
    # Its own group, whose commands are loaded when they are called, parses nothing before that.
    group: Any = typer_factory(help="")
    group.command(name)(download)
    params: dict[str, Any] = group.commands[name].make_context(name, words).params
    return params


def test_every_extra_has_a_hint_that_pip_reads_from_the_clone(root: Path) -> None:
    for extra in extras(root):
        *command, target = shlex.split(install_hint(extra))
        assert command == ["python", "-m", "pip", "install", "-e"]
        assert target == f".[{extra}]"
    assert shlex.split(install_hint()) == ["python", "-m", "pip", "install", "-e", "."]


def test_every_hint_names_an_extra_that_exists(root: Path) -> None:
    known = extras(root)
    named = {
        argument.value: place
        for place, call in calls(root, "install_hint")
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    assert {extra: place for extra, place in named.items() if extra not in known} == {}
    assert {"gpu", "nsfw", "people", "iqa", "ray", "serve"} <= named.keys()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("hf ")])
def test_the_client_understands_every_command_of_the_registry(command: str) -> None:
    params = understood(command)
    assert REPOSITORY.fullmatch(params["repo_id"])
    assert re.fullmatch(r"weights/[\w.-]+", params["local_dir"])
    assert all(re.fullmatch(r"[\w./-]+\.\w+", name) for name in params["filenames"] or [])


@pytest.mark.parametrize(
    ("path", "command"),
    sorted(
        {
            (part.path, part.command)
            for card in CARDS
            if card.weights is not None
            for part in parts(card.weights)
        }
    ),
)
def test_every_command_puts_weights_where_they_are_looked_for(path: str, command: str) -> None:
    if command.startswith("hf "):
        params = understood(command)
        folder = Path(params["local_dir"])
        wanted = Path("weights") / path
        names = list(params["filenames"] or ())
        assert wanted == folder or (wanted.parent, [wanted.name]) == (folder, names)
        return
    program, fail, folders, option, into, address = shlex.split(command)
    assert [program, fail, folders, option] == ["curl", "--fail", "--create-dirs", "-Lo"]
    assert into == f"weights/{path}"
    assert address.startswith("https://")


def test_what_curl_is_told_to_fetch_arrives_and_a_page_of_an_error_does_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a+b.pth").write_bytes(b"weights")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "served")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        codes = [
            subprocess.run(
                shlex.split(fetch_command(f"{base}/{name}", f"weights/x/{into}")), cwd=tmp_path
            ).returncode
            for name, into in (("a%2Bb.pth", "a+b.pth"), ("gone.pth", "gone.pth"))
        ]
        server.shutdown()
    assert codes[0] == 0
    assert codes[1] != 0
    assert (tmp_path / "weights" / "x" / "a+b.pth").read_bytes() == b"weights"
    assert not (tmp_path / "weights" / "x" / "gone.pth").exists()


def test_several_patterns_are_several_options() -> None:
    params = understood(
        download_command("owner/model", "weights/model", include=("tokenizer*/*", "text*/*"))
    )
    assert params["include"] == ("tokenizer*/*", "text*/*")
    assert not params["filenames"]
    data = understood(download_command("o/d", "weights/d", include=("a/*",), dataset=True))
    assert data["repo_type"] == "dataset"
    with pytest.raises(ValueError, match="name files, or give patterns"):
        download_command("owner/model", "weights/model", "config.json", include=("a/*",))


def test_repositories_are_written_as_the_hub_has_them(root: Path) -> None:
    literal = {
        place: call.args[0].value
        for place, call in calls(root, "download_command")
        if isinstance(call.args[0], ast.Constant)
    }
    assert len(literal) >= 8
    assert [place for place, name in literal.items() if not REPOSITORY.fullmatch(name)] == []


def test_no_other_module_writes_a_command_by_hand(root: Path) -> None:
    written = re.compile(r"hf download |huggingface-cli|pip install|ultraflux-mlops\[")
    offending = [
        f"{path.relative_to(root)}:{number}"
        for room in ("components", "flows")
        for path in sorted((root / room).rglob("*.py"))
        if path.name != "install_hints.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if written.search(line)
    ]
    assert offending == []
