"""A clone of this repository whose stages do nothing, for measurements of what runs them."""

from __future__ import annotations

import shutil
import subprocess
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


def trivial_clone(folder: Path, stages: int) -> Path:
    """`folder`/clone with the files of the working tree; its dvc.yaml is a chain of `stages`.

    Each stage copies one small file. Run commands there with PYTHONPATH set to the clone: the stage
    modules are in it.
    """
    clone = folder / "clone"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        wanted = name and Path(name).suffix not in {".jpg", ".png"} and name != "dvc.lock"
        if wanted and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
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
