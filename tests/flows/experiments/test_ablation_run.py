"""Two arms of the data and model design, really trained: one fails, is mended, and goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WORDS = (
    *("ablate", "data-model", "--arm", "c-model", "--arm", "d-full"),
    *("--suite", "real", "--metrics", "compression_ratio,colourfulness,hpsv3"),
)

pytestmark = pytest.mark.slow


def ultraflux(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ultraflux", *words], cwd=project, capture_output=True, text=True, timeout=1800
    )


@pytest.fixture(scope="module")
def project(small_clone: Callable[..., Path]) -> Path:
    # Nothing has so much entropy: the arm with selected data has no data.
    made = small_clone("ablation", {"select.min_entropy_bits": 7.9999})
    suite = made / "runs" / "suite" / "real"
    suite.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(2):
        pixels = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(suite / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a lake {number}"}))
    (suite / "metadata.jsonl").write_text("\n".join(lines))
    return made


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of the printed table by label."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {label.strip(): [value.strip() for value in values] for label, *values in cells}


def test_a_failed_arm_costs_its_row_and_the_same_command_goes_on(project: Path) -> None:
    words = [word.replace("real", "runs/suite/real") for word in WORDS]
    first = ultraflux(project, *words)
    assert first.returncode == 1, first.stdout + first.stderr
    assert "d-full: no numbers: its pipeline did not finish (see above)" in first.stdout
    last = first.stderr.strip().splitlines()[-1]
    assert "1 of 2 arms did not finish: d-full; run the same command to go on" in last
    rows = rows_of(first.stdout)
    model = "C: unselected data, UltraFlux"
    assert rows[model][1] == "147.41"
    assert float(rows[model][-1]) > 0
    assert rows["D: selected data, UltraFlux"] == ["–", "145.81", "–", "10.78", "–", "–"]
    history = project / "runs/ablate/data-model/c-model/data/dit_stage2/history.csv"
    assert history.is_file()
    trained = history.stat().st_mtime_ns

    # Mended, and not committed: settings are what an ablation is about.
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("7.9999", "7.0"))
    second = ultraflux(project, *words)
    assert second.returncode == 0, second.stdout + second.stderr
    finished = rows_of(second.stdout)
    assert finished[model] == rows[model]
    assert history.stat().st_mtime_ns == trained
    assert float(finished["D: selected data, UltraFlux"][-1]) > 0
    assert "Paired differences to 'C: unselected data, UltraFlux'" in second.stdout
    table = (project / "runs/ablate/data-model/table.md").read_text()
    assert table in second.stdout
