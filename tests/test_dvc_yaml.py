"""dvc.yaml: complete dependencies, declared parameters, valid meta, every stage runnable."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest
import yaml

from components.files.code_identity import CodeIdentity
from components.settings.schema import load_settings
from flows.versioning.code_files import CODE, code_path
from flows.versioning.graph import stage_graph

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> tuple[Path, ...]:
    """Project files that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files = (ROOT / f"{name.replace('.', '/')}.py" for name in sorted(names))
    return tuple(file for file in files if file.is_file())


def test_every_stage_depends_on_the_file_of_its_own_code_and_on_no_other_code() -> None:
    for name, stage in STAGES.items():
        code = [
            dep for dep in stage["deps"] if dep.startswith(("data/code", "components", "flows"))
        ]
        assert code == (["components", "flows"] if name == CODE else [code_path(name)])


def test_the_stages_of_the_graph_are_the_modules_that_can_run() -> None:
    assert set(CodeIdentity(ROOT).stages()) == set(STAGES)


def test_dvc_yaml_is_short_and_names_no_module() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    values = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in values if ".py" in line.partition(" # ")[0]]


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_is_the_stage_and_its_module_exists(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"ultraflux stage run {stage}"
    spec = importlib.util.spec_from_file_location(stage, ROOT / "flows" / "stages" / f"{stage}.py")
    assert spec is not None


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_exists(stage: str) -> None:
    for name in STAGES[stage].get("params", []):
        value = PARAMS
        for part in name.split("."):
            assert part in value, f"{stage}: {name}"
            value = value[part]


@pytest.mark.parametrize("stage", STAGES)
def test_every_settings_section_a_stage_module_reads_is_a_parameter(stage: str) -> None:
    """`settings.<section>` in the stage module (or the part two stages share)."""
    sections = set(PARAMS) - {"runtime"}
    if stage == CODE:
        return
    modules = [ROOT / "flows" / "stages" / f"{stage}.py"]
    modules += [file for file in imported(modules[0]) if file.parent.name == "stages"]
    declared = {name.split(".")[0] for name in STAGES[stage]["params"]}
    for module in modules:
        if module.name == "contract.py":
            continue
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in sections
                and isinstance(node.value, ast.Name | ast.Attribute)
                and getattr(node.value, "id", getattr(node.value, "attr", "")) == "settings"
            ):
                assert node.attr in declared, f"{stage}: settings.{node.attr} is read"


def test_meta_is_valid_and_the_graph_is_the_designed_one() -> None:
    graph = stage_graph(ROOT)
    assert set(graph) == set(STAGES)
    assert set(graph["select"].upstream) == {"code", "ingest", "signals", "quality", "people"}
    # The decoder alone is post-trained, so latents do not wait for it.
    assert "vae" not in graph["latents"].upstream
    assert "vae" not in graph["dit_stage1"].upstream
    assert graph["promote"].meta.gate
    assert graph["validate"].meta.gate


def test_training_stages_are_resumable_and_retried() -> None:
    graph = stage_graph(ROOT)
    for name in ("vae", "dit_stage1", "dit_stage2"):
        assert graph[name].meta.resumable
        assert graph[name].meta.retries >= 1


@pytest.mark.parametrize("profile", ["embedded", "consumer-24gb", "single-gpu", "paper"])
def test_every_profile_composes_into_valid_settings(profile: str) -> None:
    from flows.versioning.profiles import compose

    text = compose(ROOT, profile)
    assert yaml.safe_load(text)["project"]["profile"] == profile
    if profile == "embedded":
        assert (ROOT / "params.yaml").read_text(encoding="utf-8") == text
        assert load_settings(ROOT / "params.yaml").project.profile == profile
