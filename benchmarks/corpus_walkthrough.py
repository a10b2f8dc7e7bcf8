"""What the corpus stages say of a folder of photographs, and of files that are wrong.

    python benchmarks/corpus_walkthrough.py [FOLDER] >> docs/corpus.md

Prints Markdown: every photograph of FOLDER with its measures and the verdict of the released rules,
then what each kind of bad file (`bad_files.py`) ends as, and whether that is the right answer. Runs
ingest, signals and select of this repository in a temporary folder; no networks are involved, so
quality and aesthetics are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import pandas as pd
from bad_files import EXTENSIONS, KINDS, make_files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from components.corpus.manifest import read_table  # noqa: E402
from components.corpus.selection.bucket_columns import assign_buckets  # noqa: E402
from components.corpus.selection.rules import select  # noqa: E402
from components.images.aspect_buckets import buckets  # noqa: E402
from components.settings.models import BucketsSettings  # noqa: E402
from components.settings.schema import Settings, load_settings, parse_settings  # noqa: E402
from components.telemetry.metric_log import MetricLog  # noqa: E402
from flows.stages import ingest, signals, source  # noqa: E402
from flows.stages.contract import StageContext  # noqa: E402

PUBLISHED = BucketsSettings(published="table", target_pixels=None)
MEASURES = [
    *("flat_fraction", "entropy_bits", "glcm_score", "pdq_hash", "pdq_quality", "error"),
    "decode_note",
]


def settings_for(source: Path, **ingest_values: object) -> Settings:
    """The committed settings with another source and without attribution."""
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {name: str(contracts / f"{name}.yaml") for name in values["validation"]}
    values["ingest"] |= {"source": str(source), "attribution": None, "kind": "folder"}
    values["ingest"] |= ingest_values
    return parse_settings(values)


def measured(root: Path, settings: Settings) -> pd.DataFrame:
    """The manifest after ingest and signals; `integrity` is the first complaint of either."""
    for stage in (source, ingest, signals):
        name = stage.__name__.rsplit(".", 1)[-1]
        state = root / "runs" / name
        stage.run(StageContext(name, settings, root, state, MetricLog(state / "metrics.jsonl")))
    manifest = read_table(root / "data" / "ingest" / "manifest.parquet")
    found = pd.read_parquet(root / "data" / "signals" / "signals.parquet")
    found = found.rename(columns={"integrity": "decoded"})
    table = manifest.drop(columns=[c for c in MEASURES if c in manifest]).merge(
        found[["image_id", "decoded", *MEASURES]], "left", "image_id"
    )
    complaint = table["error"].fillna(table["decoded"]).fillna("never decoded")
    table["integrity"] = table["integrity"].where(table["integrity"] != "ok", complaint)
    return table


def photographs(folder: Path) -> None:
    """Print one row per photograph, and the count of every reason."""
    settings = settings_for(folder)
    with tempfile.TemporaryDirectory() as scratch:
        table = measured(Path(scratch), settings)
    rule = settings.select
    decided = select(assign_buckets(table, buckets(PUBLISHED)), rule)
    print("| photograph | size | bucket | entropy | flat | GLCM | verdict |")
    print("|---|---|---|---|---|---|---|")
    for row in decided.sort_values("uri").to_dict("records"):
        verdict = "kept" if row["kept"] else row["reject_reason"]
        bucket = row["bucket"] if row["kept"] else ""
        print(
            f"| {Path(row['uri']).name} | {row['width']}x{row['height']} | {bucket} "
            f"| {row['entropy_bits']:.2f} | {row['flat_fraction']:.2f} | {row['glcm_score']:.2f} "
            f"| {verdict} |"
        )
    counts = decided["reject_reason"].fillna("kept").value_counts()
    print("\n" + ", ".join(f"{count} {reason}" for reason, count in counts.items()) + ".\n")


def is_right(row: dict[str, object]) -> bool:
    """Whether a bad file got the answer, and if it is readable the note, of its kind."""
    kind, said = KINDS[str(row["kind"])], str(row["integrity"])
    noted = said != "ok" or re.search(kind.note, str(row["decode_note"])) is not None
    return noted and re.fullmatch(kind.answer, said) is not None


def wrong_files() -> None:
    """Print what each kind of bad file ends as."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        kinds = make_files(root / "photos")
        settings = settings_for(root / "photos", max_megapixels=1.0, extensions=list(EXTENSIONS))
        table = measured(root, settings)
        names = table["uri"].str.removeprefix("photos/")
    assert sorted(names) == sorted(kinds), "a file is missing or twice"
    table["kind"] = names.map(kinds)
    table["right"] = [is_right(row) for row in table.to_dict("records")]
    order = list(KINDS)
    print("| kind | right | what is said (commonest) |\n|---|---|---|")
    for kind, rows in sorted(table.groupby("kind"), key=lambda group: order.index(group[0])):
        said = rows["integrity"].where(rows["integrity"] != "ok", rows["decode_note"])
        answer = said.fillna("measured").value_counts().index[0]
        if rows["integrity"].eq("ok").any() and answer != "measured":
            answer = f"measured; {answer}"
        print(f"| {kind} | {rows['right'].sum()} of {len(rows)} | {answer} |")
    print(
        f"\n{len(table)} files of {len(KINDS)} kinds, {len(table)} rows, {table['right'].sum()} "
        f"with the right answer, {table['error'].notna().sum()} quarantined."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Walk a folder through the corpus stages.")
    parser.add_argument("folder", type=Path, nargs="?", help="photographs")
    folder = parser.parse_args().folder
    if folder is not None:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
        photographs(folder.resolve())
    wrong_files()


if __name__ == "__main__":
    main()
