"""A clone of this repository whose stages do nothing, for measurements of what runs them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
META = {
    "pool": "cpu",
    "gpus": 0,
    "cpus": 1,
    "mem_gb": 0.1,
    "est_minutes": 0.1,
    "retries": 1,
    "timeout_min": 10.0,
    "resumable": False,
    "gate": False,
}
STAGE = '''\
"""Copies its input."""

import shutil

from flows.stages.contract import StageContext, StageResult


def run(context: StageContext) -> StageResult:
    target = context.root / "data" / "{name}" / "out"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(context.root / "{source}", target)
    return StageResult(summary="copied")
'''


def copy_files(target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the working tree's files that are `wanted` by name, with what Python has compiled.

    Bytecode is valid there too, since Python goes by the source's time and size: a clone that runs
    its own code need not compile it again.
    """
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        source = ROOT / name
        if not wanted(name) or not source.is_file():
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target / name)
        compiled = Path(importlib.util.cache_from_source(str(source)))
        if source.suffix == ".py" and compiled.is_file():
            place = target / compiled.relative_to(ROOT)
            place.parent.mkdir(exist_ok=True)
            shutil.copy2(compiled, place)


def trivial_clone(folder: Path, stages: int) -> Path:
    """`folder`/clone with the files of the working tree; its dvc.yaml is a chain of `stages`.

    Each stage copies one small file. Run commands there with PYTHONPATH set to the clone: the stage
    modules are in it.
    """
    clone = folder / "clone"
    copy_files(clone, lambda name: Path(name).suffix not in {".jpg", ".png"} and name != "dvc.lock")
    graph = {}
    source = "data/sample/README.md"
    for number in range(stages):
        # Every pipeline of the project begins with this name.
        name = "ingest" if number == 0 else f"copy{number}"
        code = STAGE.format(name=name, source=source)
        (clone / "flows" / "stages" / f"{name}.py").write_text(code, encoding="utf-8")
        output = f"data/{name}/out"
        graph[name] = {
            "cmd": f"ultraflux stage run {name}",
            "deps": [source, f"flows/stages/{name}.py"],
            "params": ["project.seed"],
            "outs": [output],
            "meta": META,
        }
        source = output
    (clone / "dvc.yaml").write_text(yaml.safe_dump({"stages": graph}), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    commit = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost", "commit"]
    subprocess.run(["git", "add", "-A"], cwd=clone, check=True)
    subprocess.run([*commit, "-qm", "trivial stages"], cwd=clone, check=True)
    return clone
