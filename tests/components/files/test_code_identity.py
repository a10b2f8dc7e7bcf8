"""Fingerprints: what an edit means, and whom it concerns."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.files.code_identity import CodeIdentity, changes_bytes

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "components/__init__.py": '"""Library."""\n',
    "components/maths/__init__.py": '"""Maths."""\n',
    "components/maths/constant.py": '"""One number."""\n\nK = 3\n"""Pixels."""\n',
    "components/maths/scale.py": (
        '"""Scaling."""\n\nimport math\nimport os\n\n'
        "from components.maths import constant\n"
        "from components.maths.other import shift\n\n\n"
        'def scale(x: float) -> float:\n    """K times x."""\n'
        "    # why\n    return constant.K * shift(x) + math.pi\n"
    ),
    "components/maths/other.py": "def shift(x):\n    return x + 1\n",
    "components/maths/alone.py": "A = 1\n",
    "components/settings/__init__.py": "",
    "components/settings/schema.py": "LIMIT = 5\n",
    "components/telemetry/__init__.py": "",
    "components/telemetry/progress.py": "EVERY_S = 1\n",
    "components/worker.py": "from components.maths.alone import A\nprint(A)\n",
    "flows/__init__.py": "",
    "flows/records.py": "R = 1\n",
    "flows/stages/__init__.py": "",
    "flows/stages/contract.py": "class StageContext: ...\n",
    "flows/stages/scaled.py": (
        "from components.maths.scale import scale\n"
        "from components.settings.schema import LIMIT\n"
        "from components.telemetry.progress import EVERY_S\n"
        "from flows.records import R\n"
        "from flows.stages.contract import StageContext\n\n\n"
        "def run(context: StageContext):\n    return scale(LIMIT)\n"
    ),
    "flows/stages/started.py": (
        'WORKER = "components.worker"\n\n\ndef run(context):\n    return WORKER\n'
    ),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def fingerprints(root: Path) -> dict[str, str]:
    identity = CodeIdentity(root)
    return {name: identity.fingerprint(f"flows.stages.{name}") for name in identity.stages()}


def changed(root: Path, edit: Callable[[], object]) -> set[str]:
    """Stages whose fingerprint an edit changes."""
    before = fingerprints(root)
    edit()
    after = fingerprints(root)
    return {name for name in before if before[name] != after.get(name)}


def replace(path: Path, old: str, new: str) -> Callable[[], object]:
    text = path.read_text()
    assert old in text
    return lambda: path.write_text(text.replace(old, new))


def test_stages_are_the_modules_with_a_function_run(project: Path) -> None:
    assert CodeIdentity(project).stages() == ["scaled", "started"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("scale", "# why", "# another reason\n\n"),
        ("scale", '"""K times x."""', '"""Something\n    else."""'),
        ("scale", '    """K times x."""\n', ""),
        ("scale", '"""Scaling."""\n', ""),
        ("constant", '"""Pixels."""', '"""Metres."""'),
        ("scale", "return constant.K * shift(x)", "return (\n        constant.K * shift(x)\n    )"),
        ("scale", "import math\nimport os\n", "import os\nimport math\n"),
        ("scale", "import math\nimport os\n", "import math, os\n"),
        ("scale", "-> float:", "-> float:  # noqa"),
    ],
)
def test_what_says_nothing_changes_nothing(project: Path, file: str, old: str, new: str) -> None:
    path = project / "components" / "maths" / f"{file}.py"
    assert changed(project, replace(path, old, new)) == set()


def test_what_only_a_type_checker_reads_is_no_code(project: Path) -> None:
    path = project / "components/maths/scale.py"
    text = path.read_text().replace("import os\n", "import os\nfrom typing import TYPE_CHECKING\n")
    path.write_text(text)
    guarded = "\n\nif TYPE_CHECKING:\n    from components.maths import alone\n\n\ndef scale"
    assert changed(project, replace(path, "\n\n\ndef scale", guarded)) == set()
    alone = project / "components/maths/alone.py"
    assert changed(project, replace(alone, "A = 1", "A = 2")) == {"started"}


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("maths/constant", "K = 3", "K = 4", {"scaled"}),
        ("maths/constant", "K = 3", "K = 3.0", {"scaled"}),
        ("maths/other", "x + 1", "x - 1", {"scaled"}),
        ("maths/scale", "math.pi", "math.e", {"scaled"}),
        ("maths/scale", "import math\n", "import cmath as math\n", {"scaled"}),
        ("maths/scale", "(x: float)", "(x: int)", {"scaled"}),
        ("maths/alone", "A = 1", "A = 2", {"started"}),
        ("worker", "print(A)", "print(-A)", {"started"}),
        ("settings/schema", "LIMIT = 5", "LIMIT = 6", set()),
        ("telemetry/progress", "EVERY_S = 1", "EVERY_S = 9", set()),
    ],
)
def test_a_change_concerns_exactly_the_stages_that_reach_it(
    project: Path, file: str, old: str, new: str, stages: set[str]
) -> None:
    assert changed(project, replace(project / "components" / f"{file}.py", old, new)) == stages


def test_what_places_and_records_stages_concerns_none(project: Path) -> None:
    assert changed(project, replace(project / "flows/records.py", "R = 1", "R = 2")) == set()
    contract = project / "flows/stages/contract.py"
    assert changed(project, replace(contract, "...", "x = 1")) == set()


def test_the_symbol_that_is_imported_counts(project: Path) -> None:
    path = project / "components/maths/other.py"
    path.write_text("def shift(x):\n    return x + 1\n\n\ndef lift(x):\n    return x + 1\n")
    scale = project / "components/maths/scale.py"
    assert changed(project, replace(scale, "import shift", "import lift as shift")) == {"scaled"}


def test_two_modules_that_change_places_are_a_change(project: Path) -> None:
    (project / "components/maths/add.py").write_text("def f(x):\n    return x + 1\n")
    (project / "components/maths/sub.py").write_text("def f(x):\n    return x - 1\n")
    path = project / "components/maths/other.py"
    path.write_text(
        "from components.maths import add, sub\n\n\ndef shift(x):\n    return add.f(2 * sub.f(x))\n"
    )
    swapped = replace(path, "add.f(2 * sub.f(x))", "sub.f(2 * add.f(x))")
    assert changed(project, swapped) == {"scaled"}


def move(root: Path, old: str, new: str) -> None:
    """Move a module and rewrite every mention of it, the local names of its users included."""
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    if not (root / new).with_name("__init__.py").exists():
        (root / new).with_name("__init__.py").write_text('"""A room."""\n')
    (root / old).rename(root / new)
    before, after = (name.removesuffix(".py").replace("/", ".") for name in (old, new))
    (package, stem), (new_package, new_stem) = before.rsplit(".", 1), after.rsplit(".", 1)
    imported = f"from {package} import {stem}\n"
    for path in root.rglob("*.py"):
        text = path.read_text()
        if imported in text:
            text = re.sub(rf"(?<![\w.]){stem}\.", f"{new_stem}.", text)
        text = text.replace(imported, f"from {new_package} import {new_stem}\n")
        path.write_text(text.replace(before, after))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("components/maths/constant.py", "components/maths/zeta.py"),
        ("components/maths/constant.py", "components/numbers/deep/down/one.py"),
        ("components/maths/scale.py", "components/maths/a.py"),
        ("components/maths/other.py", "components/shifting.py"),
        ("components/worker.py", "components/started/by_name.py"),
        ("components/settings/schema.py", "components/settings/all.py"),
    ],
)
def test_moved_and_renamed_modules_are_the_same_code(project: Path, old: str, new: str) -> None:
    assert changed(project, lambda: move(project, old, new)) == set()
    # The edit was a real one: whoever imported the module finds it at its new place.
    done = subprocess.run(
        ["python", "-c", "import flows.stages.scaled as s; print(s.scale(1.0))"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", ["components.worker", "components.worker:A"])
def test_a_string_that_names_a_module_counts_as_its_import(project: Path, text: str) -> None:
    stage = project / "flows/stages/started.py"
    stage.write_text(stage.read_text().replace("components.worker", text))
    edit = replace(project / "components/worker.py", "print(A)", "print(-A)")
    assert changed(project, edit) == {"started"}
    moved = lambda: move(project, "components/worker.py", "components/started/by_name.py")  # noqa: E731
    assert changed(project, moved) == set()


def test_a_package_that_runs_code_counts_and_an_empty_one_does_not(project: Path) -> None:
    path = project / "components/maths/__init__.py"
    assert changed(project, lambda: path.write_text("")) == set()
    assert changed(project, lambda: path.write_text("import locale\n")) == {"scaled", "started"}


def test_templates_count_for_the_modules_that_render_them(project: Path) -> None:
    folder = project / "components" / "maths" / "templates"
    folder.mkdir()
    (folder / "page.html.j2").write_text("<p>{{ x }}</p>")
    (project / "components/maths/other.py").write_text(
        'FOLDER = "templates"\n\n\ndef shift(x):\n    return x + 1\n'
    )
    edit = replace(folder / "page.html.j2", "<p>", "<b>")
    assert changed(project, edit) == {"scaled"}
    # Another name, and the module finds it no more.
    rename = lambda: (folder / "page.html.j2").rename(folder / "sheet.html.j2")  # noqa: E731
    assert changed(project, rename) == {"scaled"}


def test_modules_that_name_each_other_have_fingerprints_too(project: Path) -> None:
    (project / "components/worker.py").write_text(
        "from components.launch import start\n\n\ndef work():\n    return 1\n\n\nstart()\n"
    )
    (project / "components/launch.py").write_text('def start():\n    return "components.worker"\n')
    before = fingerprints(project)
    assert changed(
        project, replace(project / "components/launch.py", "return", "return 'python -m ' +")
    ) == {"started"}
    assert changed(project, replace(project / "components/worker.py", "return 1", "return 2")) == {
        "started"
    }
    assert fingerprints(project) != before


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=40))
def test_any_string_constant_counts_and_any_comment_does_not(tmp_path_factory, text: str) -> None:
    root = tmp_path_factory.mktemp("one")
    for folder in ("components", "flows/stages"):
        (root / folder).mkdir(parents=True)
    stage = root / "flows" / "stages" / "one.py"

    def of(source: str) -> str:
        stage.write_text(source, encoding="utf-8")
        return CodeIdentity(root).fingerprint("flows.stages.one")

    body = "def run(context):\n    return {0!r}\n"
    comment = "".join(f"# {line}\n" for line in text.replace("\f", " ").splitlines())
    assert of(comment + body.format("a")) == of(body.format("a"))
    assert (of(body.format(text)) == of(body.format("a"))) == (text == "a")
    shutil.rmtree(root)


def test_the_rule_of_what_counts() -> None:
    counted = ["components.objectives.haar", "flows.stages.vae", "flows.validation"]
    left_out = [
        "components.settings.training",
        "components.telemetry.metric_log",
        "flows.stages.contract",
        "flows.cli",
        "flows.versioning.graph",
    ]
    assert [name for name in counted if not changes_bytes(name)] == []
    assert [name for name in left_out if changes_bytes(name)] == []


def test_every_module_that_a_stage_reaches_is_in_its_closure() -> None:
    """Against a slow, obvious walk: every import statement that the stage's modules contain."""
    import ast

    identity = CodeIdentity(ROOT)
    for stage in identity.stages():
        seen: set[str] = set()
        waiting = [f"flows.stages.{stage}"]
        while waiting:
            name = waiting.pop()
            if name in seen or name not in identity.modules or not changes_bytes(name):
                continue
            seen.add(name)
            path = ROOT / f"{name.replace('.', '/')}.py"
            if not path.is_file():
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            guarded = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
                for inner in ast.walk(node)
            }
            for node in ast.walk(tree):
                if id(node) in guarded:
                    continue
                if isinstance(node, ast.ImportFrom) and node.module:
                    waiting += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
                elif isinstance(node, ast.Import):
                    waiting += [alias.name for alias in node.names]
        packages = {name for name in seen if (ROOT / name.replace(".", "/")).is_dir()}
        assert seen - packages - set(identity.closure(f"flows.stages.{stage}")) == set(), stage
