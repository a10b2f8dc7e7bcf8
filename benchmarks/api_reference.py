"""docs/api.md, made from the docstrings of the library's public modules.

python benchmarks/api_reference.py

Read off the sources: nothing is imported, so the page needs no torch and costs a tenth of a second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
PUBLIC = {
    "Networks": (
        "models.resonance_rope",
        "models.autoencoder_f16",
        "models.transformer",
        "models.pipeline",
        "models.noise_shift",
        "models.tiny",
        "models.text_encoders",
        "models.loading.released",
    ),
    "Objectives": (
        "objectives.objective",
        "objectives.snr_huber",
        "objectives.fused_snr_huber",
        "objectives.flow_matching",
        "objectives.haar",
    ),
    "Photographs": (
        "images.as_seen",
        "images.decoding",
        "images.aspect_buckets",
        "images.image_store",
        "signals.candidate",
        "signals.entropy",
        "signals.flat_regions",
        "signals.glcm",
        "signals.compression",
        "signals.pdq",
        "engine.map_items",
        "corpus.selection.rules",
        "corpus.selection.rights",
    ),
    "Training": (
        "training.dit.batch_plan",
        "training.dit.trainer",
        "training.vae.trainer",
        "training.stores.latent_store",
        "training.stores.text_store",
        "training.adapters.adapter_files",
        "training.adapters.weight_export",
    ),
    "Pictures and numbers": (
        "generation.sampling",
        "generation.image_metadata",
        "metrics.cards",
        "metrics.registry",
        "evaluation.suites.suites",
        "evaluation.suites.suite_scores",
        "evaluation.statistics.bootstrap",
        "evaluation.statistics.permutation",
        "evaluation.pages.suite_report",
    ),
    "Plans, settings, papers": (
        "planning.planner",
        "planning.flops",
        "settings.schema",
        "papers.croissant",
        "files.signatures",
        "files.content_credentials",
    ),
}
"""Modules of `components` that others may call, by subject; what begins with _ is not theirs."""
HEAD = """# The library

Made from docstrings by `python benchmarks/api_reference.py`; a test fails when it is out of date.
`components` needs no server and no pipeline: numpy, torch, diffusers, PIL and pandas. Modules that
are not here may be called, too, but move without notice. Axes are letters of a tensor's name (B, C,
H, W; L tokens, D channels); t runs from 0 (data) to 1 (noise); sizes are (height, width).
"""


def page() -> str:
    """The page."""
    parts = [HEAD, "| module | what it holds |", "|---|---|"]
    for module in modules():
        parts.append(f"| [`{module}`](#{_anchor(module)}) | {_summary(_parsed(module))} |")
    for subject, names in PUBLIC.items():
        parts += ["", f"## {subject}"]
        for name in names:
            parts += ["", *_module(f"components.{name}")]
    return "\n".join(parts) + "\n"


def modules() -> list[str]:
    """Dotted names of the public modules."""
    return [f"components.{name}" for names in PUBLIC.values() for name in names]


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module that are not private."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def _parsed(module: str) -> ast.Module:
    path = ROOT / f"{module.replace('.', '/')}.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def _anchor(module: str) -> str:
    # As GitHub makes them of headings: dots go.
    return module.replace(".", "")


def _summary(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str:
    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("|", "\\|")


def _module(module: str) -> Iterator[str]:
    tree = _parsed(module)
    yield f"### {module}"
    yield ""
    yield _prose(ast.get_docstring(tree) or "")
    for node in public(tree):
        yield ""
        yield f"**`{_signature(node)}`**"
        yield ""
        yield _prose(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            yield from _members(node)


def _members(node: ast.ClassDef) -> Iterator[str]:
    """Public methods and properties of a class, a line each."""
    lines = [
        f"- `{_signature(one)}`: {_summary(one)}"
        for one in node.body
        if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")
    ]
    if lines:
        yield ""
        yield "*Members*"
        yield ""
        yield from lines


def _signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    properties = {"property", "cached_property"}
    if any(ast.unparse(one) in properties for one in node.decorator_list):
        return node.name
    arguments = re.sub(r"^(?:self|cls)(?:, |$)", "", ast.unparse(node.args))
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returned}"


def _prose(text: str) -> str:
    """A docstring as Markdown: sections of Google's style become lists."""
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        bare = line.strip()
        if bare in {"Args:", "Returns:", "Raises:", "Attributes:", "Yields:"}:
            section, begins = bare[:-1], True
            lines += [f"*{section}*", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = bare.partition(": ")
            is_named = section not in {"Returns", "Yields"} and bool(colon)
            if is_named and re.fullmatch(r"[\w.*, ]{1,60}", name):
                lines.append(f"- `{name}`: {rest}")
            else:
                # What is returned is one text over several lines.
                lines.append(f"- {bare}" if begins else f"  {bare}")
            begins = False
        else:
            section = section if not bare or line.startswith("    ") else ""
            lines.append(f"  {bare}" if section and bare else bare)
    return "\n".join(lines).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
