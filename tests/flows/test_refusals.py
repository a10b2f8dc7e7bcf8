"""Wrong names are refused before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
from flows.cli import main
sys.argv = ["ultraflux", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    heavy = [name for name in ("torch", "prefect", "mlflow", "diffusers") if name in sys.modules]
    print(end.code, ",".join(heavy) or "light")
"""


@pytest.mark.parametrize(
    "typed",
    [
        "run --until nosuch",
        "stage run nosuch",
        "stage fingerprint nosuch",
        "config compose --profile nosuch",
        "plan --profile nosuch",
        "evaluate nosuch --system a=b",
        "stores rebuild nosuch --store nowhere",
        "weights get nosuch",
        "ablate nosuch",
    ],
)
def test_a_wrong_name_costs_no_heavy_import(typed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *typed.split()], capture_output=True, text=True
    )
    assert done.stdout.split()[-2:] == ["2", "light"], done.stdout + done.stderr
    assert "nosuch" in done.stderr or "nowhere" in done.stderr
