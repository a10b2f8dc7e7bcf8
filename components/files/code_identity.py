"""What code means, as a hash: the identity of a module that comments and names cannot change.

A module's fingerprint is a Merkle hash over its syntax tree. Comments, docstrings, formatting and
what only a type checker reads are left out. Imports of our own modules are replaced by those
modules' fingerprints, and the local names of imported modules by their order of use. So a comment,
a reformatting, a moved or a renamed module leave the fingerprint as it is, and a changed constant
changes it in every module that can reach the constant, and in no other.

A string that is the dotted name of one of our modules, alone or as `MODULE:ATTRIBUTE`, counts as an
import of it: workers are started by `python -m NAME`, and tables name what they load when needed.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

PACKAGES = ("components", "flows")
CANNOT_CHANGE_BYTES = ("components.settings", "components.telemetry", "flows")
"""Settings reach a stage as DVC parameters; progress and metrics go beside its outputs; what places
and records stages writes none of them."""
CHANGE_BYTES = ("flows.stages", "flows.validation")
"""Of those, what does write outputs: the stage modules, and the data contracts' results."""
STAGES = "flows.stages"
CONTRACT = f"{STAGES}.contract"
"""What stages receive and return; it touches no output either."""
TEMPLATES = "templates"
"""Folder of page templates beside the modules that render them."""

# Written instead of the fingerprint of a module that cannot change bytes, or of the module itself.
_LEFT_OUT, _ITSELF = "left out", "itself"
# Fields that say nothing about what runs, or that only some Python versions have.
_SILENT_FIELDS = frozenset({"type_comment", "type_ignores", "type_params", "kind", "ctx"})


_EMPTY = hashlib.sha256(b"Module\0body\0[\0]\0.\0").hexdigest()
"""`ModuleMeaning.own` of a file that holds comments and docstrings alone."""


def changes_bytes(module: str) -> bool:
    """Whether a module's code may change what a stage writes: the one rule of what counts."""
    if module == CONTRACT:
        return False
    return _inside(module, CHANGE_BYTES) or not _inside(module, CANNOT_CHANGE_BYTES)


def _inside(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@dataclass(frozen=True)
class Reference:
    """A module that another one uses."""

    module: str
    """Dotted name."""
    symbol: str
    """What is imported from it; empty for the module itself."""
    local: str
    """What the importing module calls it; for a module, its place in the order of use."""


@dataclass(frozen=True)
class ModuleMeaning:
    """A module as far as it means something, before its references are resolved."""

    own: str
    """sha256 of the syntax tree, with every reference to our modules made anonymous."""
    references: tuple[Reference, ...]
    templates: str
    """sha256 of the page templates beside it, when it renders some."""

    @property
    def is_empty(self) -> bool:
        """Whether it does nothing, as a package that holds a docstring alone."""
        return not self.references and self.own == _EMPTY


class CodeIdentity:
    """Fingerprints of the modules below one folder; each file is read once, when it is asked for.

    Attributes:
        root: the folder that holds the packages `components` and `flows`.
    """

    def __init__(self, root: Path) -> None:
        """Read nothing yet."""
        self.root = root
        self._meanings: dict[str, ModuleMeaning] = {}
        self._fingerprints: dict[str, str] = {}

    @cached_property
    def modules(self) -> frozenset[str]:
        """Dotted names of all modules and packages."""
        return frozenset(
            _dotted(path.relative_to(self.root))
            for package in PACKAGES
            for path in (self.root / package).rglob("*.py")
        )

    def stages(self) -> list[str]:
        """Modules of flows/stages that are stages: those with a function `run`."""
        folder = self.root.joinpath(*STAGES.split("."))
        return sorted(
            path.stem
            for path in folder.glob("*.py")
            if any(
                isinstance(node, ast.FunctionDef) and node.name == "run"
                for node in _parse(path, path.read_bytes()).body
            )
        )

    def meaning(self, module: str) -> ModuleMeaning:
        """One module by itself.

        Raises:
            KeyError: there is no such module.
        """
        if module not in self._meanings:
            if module not in self.modules:
                raise KeyError(module)
            path = self._file(module)
            own, references, renders = _read(path, path.read_bytes(), module, self.modules)
            templates = _folder_digest(path.parent / TEMPLATES) if renders else ""
            self._meanings[module] = ModuleMeaning(own, references, templates)
        return self._meanings[module]

    def _file(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def needs(self, module: str) -> list[str]:
        """Modules that count and that a module refers to, itself excepted.

        Packages above an imported module run their `__init__` first, so those are needed too.
        """
        named = {one.module for one in self.meaning(module).references if self._counts(one.module)}
        above = {
            ".".join(name.split(".")[:depth])
            for name in {*named, module}
            for depth in range(1, len(name.split(".")))
        }
        # An empty package says nothing; counting it would make a folder's depth part of the hash.
        above = {name for name in above if self._counts(name) and not self.meaning(name).is_empty}
        return sorted((named | above) - {module})

    def _counts(self, module: str) -> bool:
        return module in self.modules and changes_bytes(module)

    def closure(self, module: str) -> list[str]:
        """A module and all that count and that it can reach, in alphabetical order."""
        seen = {module}
        waiting = [module]
        while waiting:
            for name in self.needs(waiting.pop()):
                if name not in seen:
                    seen.add(name)
                    waiting.append(name)
        return sorted(seen)

    def fingerprint(self, module: str) -> str:
        """sha256 of what a module and everything that it can reach mean.

        Raises:
            KeyError: there is no such module.
            SyntaxError: a module cannot be parsed.
        """
        if module not in self._fingerprints:
            for group in _needed_first(module, self.needs):
                self._hash_group(group)
        return self._fingerprints[module]

    def _hash_group(self, group: list[str]) -> None:
        """Fingerprints of modules that name each other in a circle, or of a single one.

        Members of a circle have no order in which they could contain each other's hashes: each
        takes the members as they stand by themselves.
        """
        if all(module in self._fingerprints for module in group):
            return
        inside = {name: f"circle {self.meaning(name).own}" for name in group if len(group) > 1}
        hashed = {name: self._hash_one(name, inside) for name in group}
        if len(group) > 1:
            together = _sha256(*sorted(hashed.values()))
            hashed = {name: _sha256(own, together) for name, own in hashed.items()}
        self._fingerprints |= hashed

    def _hash_one(self, module: str, inside: Mapping[str, str]) -> str:
        meaning = self.meaning(module)

        def stands_for(name: str) -> str:
            if name == module:
                return _ITSELF
            if not self._counts(name):
                return _LEFT_OUT
            return inside.get(name) or self._fingerprints[name]

        lines = {f"{stands_for(one.module)} {one.symbol} {one.local}" for one in meaning.references}
        packages = {stands_for(name) for name in self.needs(module)}
        return _sha256(meaning.own, meaning.templates, *sorted(lines), "", *sorted(packages))

    def own_hashes(self, module: str) -> dict[str, str]:
        """What each module of a closure means by itself: sha256 by dotted name."""
        found = {}
        for name in self.closure(module):
            meaning = self.meaning(name)
            found[name] = _sha256(meaning.own, meaning.templates)
        return found


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _parse(path: Path, source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        # Odd escapes are the linter's business.
        warnings.simplefilter("ignore")
        return ast.parse(source, filename=str(path))


# By content: a process that asks twice, or was forked by one that asked, parses what changed.
@lru_cache(maxsize=2048)
def _read(
    path: Path, source: bytes, module: str, modules: frozenset[str]
) -> tuple[str, tuple[Reference, ...], bool]:
    """What `_Reader.read` says of a source, and whether the module renders templates."""
    reader = _Reader(module, modules, is_package=path.name == "__init__.py")
    own, references = reader.read(_parse(path, source))
    return own, references, reader.renders


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _sha256(
        *(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    )


class _Reader:
    """Reads one syntax tree: writes down what it means, and collects references."""

    def __init__(self, module: str, modules: frozenset[str], *, is_package: bool) -> None:
        self._module = module
        self._modules = modules
        self._package = module if is_package else module.rpartition(".")[0]
        self._aliases: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._references: set[Reference] = set()
        self.renders = False

    def read(self, tree: ast.Module) -> tuple[str, tuple[Reference, ...]]:
        """(hash of the tree, what it refers to)."""
        for node in _nodes_that_run(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._note_aliases(node)
        digest = hashlib.sha256()
        for piece in self._write(tree):
            digest.update(piece.encode("utf-8", "surrogatepass"))
            digest.update(b"\0")
        used = (Reference(module, "", place) for module, place in self._places.items())
        return digest.hexdigest(), tuple(
            sorted({*self._references, *used}, key=lambda one: (one.module, one.symbol, one.local))
        )

    def _origin(self, node: ast.ImportFrom) -> str:
        """Absolute name of what a `from` names; relative ones start at the package."""
        if not node.level:
            return node.module or ""
        above = self._package.split(".")
        above = above[: len(above) - node.level + 1]
        return ".".join([*above, *filter(None, [node.module])])

    def _note_aliases(self, node: ast.Import | ast.ImportFrom) -> None:
        """Local names that stand for one of our modules."""
        for alias in node.names:
            name = alias.name
            if isinstance(node, ast.ImportFrom):
                name = f"{self._origin(node)}.{alias.name}"
            if name in self._modules and (alias.asname or isinstance(node, ast.ImportFrom)):
                self._aliases[alias.asname or alias.name] = name

    def _place(self, module: str) -> str:
        """A module's place in the order of first use, which no renaming changes."""
        return self._places.setdefault(module, f"module {len(self._places)}")

    def _write(self, node: ast.AST) -> Iterator[str]:
        """The tree in one fixed spelling, independent of the Python version that parsed it."""
        if isinstance(node, ast.Name) and node.id in self._aliases:
            yield self._place(self._aliases[node.id])
            return
        if isinstance(node, ast.Constant):
            yield from self._write_constant(node.value)
            return
        yield type(node).__name__
        for field, value in ast.iter_fields(node):
            if field in _SILENT_FIELDS or value is None:
                continue
            yield field
            if isinstance(value, ast.AST):
                yield from self._write(value)
            elif isinstance(value, list):
                yield from self._write_list(value)
            else:
                yield repr(value)
        yield "."

    def _write_constant(self, value: object) -> Iterator[str]:
        if isinstance(value, str):
            if value == TEMPLATES:
                self.renders = True
            module, colon, rest = value.partition(":")
            if module in self._modules and "." in module:
                yield f"{self._place(module)}{colon}{rest}"
                return
        yield f"{type(value).__name__} {value!r}"

    def _write_list(self, values: list[object]) -> Iterator[str]:
        """A list of nodes; neighbouring imports have no order, and docstrings no meaning."""
        yield "["
        imports: set[str] = set()
        for value in _that_run(values):
            if isinstance(value, ast.Import | ast.ImportFrom):
                imports |= set(self._write_import(value))
                continue
            yield from sorted(imports)
            imports.clear()
            if isinstance(value, ast.AST):
                yield from self._write(value)
            else:
                yield repr(value)
        yield from sorted(imports)
        yield "]"

    def _write_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        """Imports of other people's modules; ours become references."""
        for alias in node.names:
            local = alias.asname or alias.name
            if isinstance(node, ast.Import):
                if alias.name in self._modules:
                    # `import a.b.c` binds `a`; uses of it spell the whole path, as a rename would.
                    self._references.add(Reference(alias.name, "", ""))
                else:
                    yield f"import {alias.name} as {local}"
                continue
            origin = self._origin(node)
            if f"{origin}.{alias.name}" in self._modules:
                # Its uses are written with its place; an unused one still runs.
                self._references.add(Reference(f"{origin}.{alias.name}", "", ""))
            elif origin in self._modules:
                self._references.add(Reference(origin, alias.name, local))
            else:
                yield f"from {origin} import {alias.name} as {local}"


def _that_run(values: Iterable[object]) -> Iterator[object]:
    """Nodes of a list without docstrings and without what only a type checker reads."""
    for value in values:
        if isinstance(value, ast.Expr) and isinstance(value.value, ast.Constant):
            continue
        if isinstance(value, ast.If) and _is_type_checking(value.test):
            yield from _that_run(value.orelse)
        else:
            yield value


def _nodes_that_run(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without what only a type checker reads."""
    yield node
    for _, value in ast.iter_fields(node):
        for inner in _that_run(value if isinstance(value, list) else [value]):
            if isinstance(inner, ast.AST):
                yield from _nodes_that_run(inner)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _needed_first(start: str, needs: Callable[[str], list[str]]) -> Iterator[list[str]]:
    """What `start` can reach, in groups: circles together, and before a group what it needs."""
    import networkx

    graph = networkx.DiGraph()
    waiting = [start]
    graph.add_node(start)
    while waiting:
        module = waiting.pop()
        for name in needs(module):
            if name not in graph:
                waiting.append(name)
            graph.add_edge(module, name)
    circles = networkx.condensation(graph)
    for group in reversed(list(networkx.topological_sort(circles))):
        yield sorted(circles.nodes[group]["members"])
