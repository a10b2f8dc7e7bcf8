"""A manifest that is captioned a few rows at a time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pandas as pd
import pytest

from components.corpus import manifest_columns
from components.corpus.captions.captioning import caption_photographs
from components.corpus.captions.checks import Caption
from components.corpus.captions.spilled import Spilled
from components.corpus.manifest import read_table, write_table
from components.settings.schema import Settings, load_settings, parse_settings

ROOT = Path(__file__).parents[4]
LAKE, BOAT = "a calm lake below red hills", "a small boat on a river by night"


def settings(translated: str = "shipped", **caption: object) -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    values["ingest"] |= {"kind": "urls", "source": "list.csv"}
    values["caption"] |= {"min_words": 3, "max_words": 10, **caption}
    values["caption"]["translate"]["provider"] = translated
    return parse_settings(values)


def selected(folder: Path) -> Path:
    """Seven rows: two share a caption, one is too short, one has none, one was rejected."""
    captions = [LAKE, None, BOAT, LAKE, "boat", BOAT, "a boat below red hills"]
    table = pd.DataFrame(
        {
            "image_id": [f"{n:064x}" for n in range(7)],
            "uri": [f"photos/{n}.jpg" for n in range(7)],
            "caption_en": captions,
            "kept": [True] * 5 + [False, True],
            "reject_reason": [None] * 5 + ["entropy", None],
            "reject_value": [None] * 5 + [5.0, None],
            "license": [f"licence {n}" for n in range(7)],
        }
    )
    write_table(table, folder / "selected.parquet")
    return folder / "selected.parquet"


@pytest.mark.parametrize("rows", [1, 2, 16_384])
def test_counts_go_over_the_borders_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    path, output = selected(tmp_path), tmp_path / "captioned.parquet"
    monkeypatch.setattr(manifest_columns, "GROUP_ROWS", rows)
    found = caption_photographs(path, Path("no derivatives"), settings(), output)
    assert (found.selected, found.kept, found.lost, found.provided) == (6, 4, 2, 4)
    assert found.sharing_a_caption == 2
    assert {name: n for name, n in found.statuses.items() if n} == {
        "ok": 4,
        "missing": 1,
        "too_short": 1,
    }
    assert found.first_lost == ["1.jpg: missing", "4.jpg: too_short"]
    table = read_table(output)
    assert table["kept"].tolist() == [True, False, True, True, False, False, True]
    assert table["reject_reason"].fillna("").tolist()[4:6] == ["caption", "entropy"]
    assert table["reject_value"].fillna(0).tolist()[4:6] == [1.0, 5.0]
    # What this stage does not ask for is copied.
    assert table["license"].tolist() == [f"licence {n}" for n in range(7)]


def test_one_text_for_all_fills_the_gaps_of_selected_rows(tmp_path: Path) -> None:
    output = tmp_path / "captioned.parquet"
    chosen = settings(provider="fixed", text="lake", provided="replace_failed", translated="none")
    found = caption_photographs(selected(tmp_path), Path("no derivatives"), chosen, output)
    assert (found.kept, found.lost, found.statuses["ok"]) == (6, 0, 6)
    table = read_table(output)
    assert table["caption_en"].tolist()[:5] == [LAKE, "lake", BOAT, LAKE, "lake"]
    assert table["caption_en"].tolist()[5] == BOAT


def test_what_waits_on_disk_comes_back_in_its_order() -> None:
    captions = {"b": Caption("one", None), "a": Caption("two\0\n湖", "湖")}
    waiting = Spilled(Caption)
    for key, caption in captions.items():
        waiting.add(key, caption)
    assert list(waiting.items()) == list(captions.items())
    assert (len(waiting), "a" in waiting, waiting.get("c")) == (2, True, None)
    waiting.add("b", Caption("three", None))
    assert {key: astuple(one)[0] for key, one in waiting.items()} == {
        "b": "three",
        "a": captions["a"].english,
    }


def test_memory_does_not_grow_with_the_captions(tmp_path: Path) -> None:
    rows = 60_000
    table = pd.DataFrame(
        {
            "image_id": [f"{n:064x}" for n in range(rows)],
            "uri": [f"{n}.jpg" for n in range(rows)],
            "caption_en": [f"photograph {n} " * 120 for n in range(rows)],
            # Not checked: that is slow, and the identifier of languages holds 100 MB.
            "kept": False,
            "reject_reason": None,
            "reject_value": None,
            "reject_threshold": None,
        }
    )
    write_table(table, tmp_path / "selected.parquet")
    write_table(table[:10], tmp_path / "few.parquet")
    (tmp_path / "settings.json").write_text(settings().model_dump_json())
    script = (
        "import json, sys; from pathlib import Path\n"
        "from components.corpus import manifest_columns\n"
        "from components.corpus.captions.captioning import caption_photographs\n"
        "manifest_columns.GROUP_ROWS = 1024\n"
        "from components.settings.schema import parse_settings\n"
        "folder = Path(sys.argv[1])\n"
        "settings = parse_settings(json.loads((folder / 'settings.json').read_text()))\n"
        # Not what getrusage says, which begins at the size of the process that started this one.
        "status = lambda: Path('/proc/self/status').read_text().split()\n"
        "peak_mb = lambda: int(status()[status().index('VmHWM:') + 1]) / 1e3\n"
        "def caption(name):\n"
        "    caption_photographs(folder / name, folder, settings, folder / 'out.parquet')\n"
        "    return peak_mb()\n"
        "before = caption('few.parquet')\n"
        "print(caption('selected.parquet') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # The captions are 130 MB. What is written waits for a group of 16,384
    # rows, copied some times: under 130 and 162 MB in two runs.
    assert float(done.stdout) < 260
