"""Wrong names are refused before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "prefect", "mlflow", "diffusers", "transformers", "great_expectations", "dvc")
TYPED = (
    "run --until nosuch",
    "run --engine nosuch",
    "stage run nosuch",
    "stage key nosuch",
    "stage key dit_stage1 -S nosuch.x=1",
    "stage states nosuch",
    "stage fingerprint nosuch",
    "config compose --profile nosuch",
    "plan --profile nosuch",
    "plan --stage nosuch",
    "plan --settings nosuch.yaml",
    "new nosuch",
    "measure nosuch --json",
    "corpus look nosuch",
    "evaluate nosuch --system a=b",
    "report nosuch",
    "judge --a nosuch --b b --prompts p --endpoint http://127.0.0.1:1/v1 --model m",
    "generate --prompt x --size nosuch",
    "generate --prompt x --size 256x256 --rope nosuch",
    "generate --prompt x --size 256x256 --model nosuch",
    "generate --prompt x --size 256x256 --memory nosuch",
    "stores rebuild shard --store nosuch",
    "stores verify nosuch",
    "diagnose wavelet --store nosuch",
    "weights get nosuch",
    "weights list nosuch",
    "weights verify nosuch",
    "weights adapter nosuch --out out",
    "weights export nosuch --out out",
    "weights export data --out out --layout nosuch",
    "ablate nosuch",
    "sweep -S nosuch.x=1,2",
    "sweep -S dit_stage1.steps=nosuch",
    "sweep -S dit_stage1.steps=1,2 --until nosuch",
    "submit -S nosuch.x=1",
    "submit --profile nosuch",
    "promote --alias nosuch",
    "sign nosuch",
    "verify nosuch",
)
# One process imports the command line; each command runs in a copy of it.
PROBE = """
import json, os, sys, time
from flows.cli import main

for typed in json.loads(sys.stdin.read()):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2)
        began = time.process_time()
        sys.argv, code = ["ultraflux", *typed.split()], None
        try:
            main()
        except SystemExit as end:
            code = end.code
        heavy = [name for name in HEAVY if name in sys.modules]
        print("\\n" + json.dumps([typed, code, heavy, time.process_time() - began]), flush=True)
        os._exit(0)
    os.close(writer)
    said, _, found = os.fdopen(reader).read().rstrip().rpartition("\\n")
    os.wait()
    print(json.dumps([*json.loads(found), said]))
"""


@pytest.fixture(scope="module")
def refused(root: Path) -> dict[str, tuple[int, list[str], float, str]]:
    """Each command's exit status, heavy modules, CPU seconds and words."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.replace("HEAVY", repr(HEAVY))],
        input=json.dumps(TYPED),
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {typed: (code, heavy, seconds, said) for typed, code, heavy, seconds, said in rows}


@pytest.mark.parametrize("typed", TYPED)
def test_a_wrong_name_is_one_line_and_costs_no_heavy_import(
    refused: dict[str, tuple[int, list[str], float, str]], typed: str
) -> None:
    code, heavy, seconds, said = refused[typed]
    assert (code in {1, 2}, heavy) == (True, []), said
    assert "nosuch" in said
    assert len(said.strip().splitlines()) == 1, said
    # 0.2 to 0.7 s on a quiet core; tests beside it make a core twice as slow.
    assert seconds < 2.0
