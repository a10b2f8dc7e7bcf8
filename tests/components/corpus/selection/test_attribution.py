from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from components.corpus.manifest import write_table
from components.corpus.selection.attribution import (
    FIELDS,
    counted_licenses,
    read_attribution_file,
    write_attribution,
)
from components.files.parquet_files import GROUP_ROWS


def test_every_slice_names_its_photographs_in_order_however_many_batches_hold_them(
    tmp_path: Path,
) -> None:
    count = 2 * GROUP_ROWS + 1
    licenses = ["CC BY-SA 4.0", None, 'my "own", 2026']
    photographers = ["湖 & café", None]
    manifest = pd.DataFrame(
        {
            "image_id": [f"{number:064x}" for number in range(count)],
            "uri": [f"photos/{number}.jpg" for number in range(count)],
            "license": [licenses[number % 3] for number in range(count)],
            "photographer": [photographers[number % 2] for number in range(count)],
        }
    )
    write_table(manifest, tmp_path / "manifest.parquet")
    border = np.arange(GROUP_ROWS - 2, GROUP_ROWS + 2)
    slices = {
        "some": np.array([0, *border, count - 1]),
        "border": border,
        "all": np.arange(count),
        "none": np.array([], dtype=np.int64),
    }

    write_attribution(tmp_path / "manifest.parquet", slices, tmp_path / "attribution")

    assert sorted(path.stem for path in (tmp_path / "attribution").iterdir()) == sorted(slices)
    for name, rows in slices.items():
        found = read_attribution_file(tmp_path / "attribution" / f"{name}.csv")
        assert [row["uri"] for row in found] == [f"photos/{number}.jpg" for number in rows]
    found = read_attribution_file(tmp_path / "attribution" / "all.csv")
    assert list(found[0]) == list(FIELDS)
    share_alike = ("CC-BY-SA-4.0", "https://creativecommons.org/licenses/by-sa/4.0/")
    assert [row["photographer"] for row in found[:2]] == ["湖 & café", ""]
    assert [(row["license_id"], row["license_url"]) for row in found[:1]] == [share_alike]
    assert [row["share_alike"] for row in found[:3]] == ["yes", "no", "no"]
    assert [row["license"] for row in found[:3]] == ["CC BY-SA 4.0", "", 'my "own", 2026']
    assert count % 3 == 0
    assert [number for _, _, number in counted_licenses(found)] == 3 * [count // 3]
