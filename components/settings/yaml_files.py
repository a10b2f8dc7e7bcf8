"""Files of settings, in YAML that DVC reads alike.

PyYAML reads version 1.1, DVC 1.2 (and writes 1e-05, a text in 1.1): powers of ten are numbers here
as well, and what else the two would take for different things (0200 is 128 in 1.1) is refused with
its line.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_POWER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")
NUMBER_IN_DVC = re.compile(rf"[-+]?0o?[0-9_]+|{_POWER.pattern}")
"""Text in YAML 1.1 and a number in 1.2: 08, 1e-4. Also 0200, which is 128 in 1.1."""
_NO_ZEROS = "write the number in decimal without zeros in front, or a text in quotes"
_TAG = "tag:yaml.org,2002:"


class YamlRefused(ValueError):
    """A file that cannot be read, or not in one way; the message, one line, names it."""


class _Refused(yaml.MarkedYAMLError):
    """Why a node is refused; its mark says where."""


class _OneReading(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Refused(
                    problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _refuse(node: Any, advice: str) -> None:
    raise _Refused(
        problem=f"{node.value} is read in two ways (here by YAML 1.1, in DVC by 1.2): {advice}",
        problem_mark=node.start_mark,
    )


def _number(loader: _OneReading, node: Any) -> int | float:
    if ":" in node.value:
        _refuse(node, "write the number in decimal, or a text in quotes")
    if NUMBER_IN_DVC.fullmatch(node.value) and node.tag == f"{_TAG}int":
        _refuse(node, _NO_ZEROS)
    if node.tag == f"{_TAG}int" and abs(loader.construct_yaml_int(node)) >= 2**63:
        raise _Refused(
            problem=f"{node.value} does not fit into 64 bits", problem_mark=node.start_mark
        )
    make = loader.construct_yaml_int if node.tag == f"{_TAG}int" else loader.construct_yaml_float
    return make(node)


def _text(loader: _OneReading, node: Any) -> str:
    # Without a style: neither quoted nor a block.
    if node.style is None and NUMBER_IN_DVC.fullmatch(node.value):
        _refuse(node, _NO_ZEROS)
    return loader.construct_yaml_str(node)


def _truth(loader: _OneReading, node: Any) -> bool:
    if node.value.lower() not in ("true", "false"):
        _refuse(node, "write true or false, or a text in quotes")
    return loader.construct_yaml_bool(node)


_OneReading.add_implicit_resolver(
    f"{_TAG}float", re.compile(f"^(?:{_POWER.pattern})$"), list("-+0123456789")
)
_OneReading.add_constructor(f"{_TAG}int", _number)
_OneReading.add_constructor(f"{_TAG}float", _number)
_OneReading.add_constructor(f"{_TAG}str", _text)
_OneReading.add_constructor(f"{_TAG}bool", _truth)


def read_yaml(path: Path) -> Any:
    """Content of a file.

    Raises:
        FileNotFoundError: it is not there.
        YamlRefused: a folder, not UTF-8, not YAML, a key twice, or a value of two readings.
    """
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        raise YamlRefused(f"{path}: a folder; expected a YAML file") from None
    try:
        return parse_yaml(content.decode("utf-8"), str(path))
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise YamlRefused(
            f"{path}: not UTF-8 at byte {problem.start} (line {line}); save it as UTF-8"
        ) from None


def parse_yaml(text: str, where: str) -> Any:
    """`read_yaml` of a text; `where` stands for its file.

    Raises:
        YamlRefused: as `read_yaml`.
    """
    try:
        return yaml.load(text, _OneReading)
    except _Refused as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark is not None else 1
        raise YamlRefused(f"{where} line {line}: {problem.problem}") from None
    except yaml.MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark is not None else 1
        raise YamlRefused(f"{where}: not valid YAML: line {line}: {problem.problem}") from None
    except yaml.YAMLError as problem:
        raise YamlRefused(f"{where}: not valid YAML: {' '.join(str(problem).split())}") from None
    except RecursionError:
        raise YamlRefused(f"{where}: not valid YAML: brackets in brackets without end") from None
    except ValueError as problem:
        # A date that no calendar has.
        raise YamlRefused(f"{where}: not valid YAML: {problem}") from None
