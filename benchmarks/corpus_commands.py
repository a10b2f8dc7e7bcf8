"""The corpus commands over a synthetic manifest with real captions: peak memory and seconds.

    python benchmarks/corpus_commands.py --rows 1000000

Every command runs as a person types it, in a clone of this repository whose tables hold captions of
80 English words and 140 Chinese characters. Peak memory is that of the command's process (or of
the largest process that it starts): imports, reading and MLflow's record are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from process_tree import command_environment, peak_of_tree

ROOT = Path(__file__).resolve().parents[1]
ENGLISH_WORDS, CHINESE_CHARACTERS = 80, 140
_BATCH = 50_000
# What differs between the two versions that `diff` and `drift` compare.
_CHANGED_CAPTIONS, _CHANGED_ENTROPY = 0.01, 0.02

STAGES = ("select", "caption", "validate", "slices")
COMMANDS = {
    **{name: ["stage", "run", name] for name in STAGES},
    "what-if": ["select", "--what-if", "entropy_bits=6.8"],
    "diff": ["corpus", "diff", "data/caption/manifest.parquet", "after.parquet"],
    "drift": ["corpus", "drift", "data/caption/manifest.parquet", "after.parquet"],
    "datasheet": ["corpus", "datasheet", "data/slices/manifest.parquet"],
}
# Exit codes of a command that has worked: 1 says that something changed.
_FINE = (0, 1)


def make_tables(clone: Path, rows: int) -> None:
    """Write what the stages ingest, signals, quality and people leave behind, batch by batch."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    sys.path.insert(0, str(ROOT))
    from components.corpus.manifest import SCHEMA
    from components.corpus.people.evidence import PEOPLE_SCHEMA
    from components.corpus.quality.scorer import QUALITY_SCHEMA
    from components.files.parquet_files import write_row_groups
    from components.signals.candidate import SIGNALS_SCHEMA

    rng = np.random.default_rng(0)
    # Words of real captions, because the stage caption rejects what is in no language.
    lines = (ROOT / "data" / "sample" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line) for line in lines]
    english = " ".join(caption["caption_en"] for caption in captions)
    vocabulary = pa.array(sorted(set(re.findall("[a-z]+", english))))
    chinese = "".join(caption["caption_zh"] for caption in captions)
    characters = pa.array(sorted(set(re.findall("[\u4e00-\u9fff]", chinese))))

    def joined(words: pa.Array, count: int, size: int, separator: str) -> pa.Array:
        # Falling frequencies, as in language, so that compression is plausible.
        drawn = (len(words) * rng.random(count * size) ** 3).astype(np.int32)
        offsets = np.arange(0, count * size + 1, size, dtype=np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(drawn)))
        return pc.binary_join(lists, separator)

    def hexadecimal(count: int) -> pa.Array:
        text = rng.bytes(count * 32).hex()
        offsets = np.arange(0, 64 * count + 1, 64, dtype=np.int32)
        return pa.StringArray.from_buffers(
            count, pa.py_buffer(offsets), pa.py_buffer(text.encode())
        )

    def one_of(count: int, *values: str) -> pa.Array:
        return pa.array(values).take(pa.array(rng.integers(0, len(values), count)))

    def table(schema: pa.Schema, columns: dict[str, object], count: int) -> pa.Table:
        arrays = [
            pa.array(columns[field.name]).cast(field.type)
            if field.name in columns
            else pa.nulls(count, field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)

    def ingest(start: int, count: int, ids: pa.Array) -> dict[str, object]:
        height, width = rng.integers(2160, 5000, count), rng.integers(3840, 8000, count)
        numbers = pa.array(np.arange(start, start + count)).cast(pa.string())
        return {
            "image_id": ids,
            "uri": pc.binary_join_element_wise("data/ingest/originals/", ids, ".jpg", ""),
            "width": width,
            "height": height,
            "megapixels": width * height / 1e6,
            "aspect_ratio": width / height,
            "format": one_of(count, "JPEG"),
            "bytes_per_pixel": rng.uniform(0.1, 2.0, count),
            "integrity": one_of(count, *["ok"] * 99, "empty file (0 bytes)"),
            "caption_en": pc.binary_join_element_wise(
                joined(vocabulary, count, ENGLISH_WORDS, " "), ".", ""
            ),
            "caption_zh": joined(characters, count, CHINESE_CHARACTERS, ""),
            "source": one_of(count, "unsplash", "pexels", "flickr"),
            "image_url": pc.binary_join_element_wise("https://images.example/", numbers, ""),
            "work_url": pc.binary_join_element_wise("https://works.example/", numbers, ""),
            "photographer": pc.binary_join_element_wise(
                "photographer ", pa.array(rng.integers(0, 50_000, count)).cast(pa.string()), ""
            ),
            "license": one_of(count, "CC0-1.0", "CC-BY-4.0"),
            "record_id": numbers,
        }

    def signals(ids: pa.Array, integrity: pa.Array) -> dict[str, object]:
        count = len(ids)
        return {
            "image_id": ids,
            "integrity": integrity,
            "flat_fraction": rng.beta(1, 3, count),
            "entropy_bits": np.minimum(8.0, rng.normal(7.4, 0.3, count)),
            "glcm_score": rng.normal(1.0, 0.2, count),
            "glcm_entropy_bits": rng.normal(9.0, 0.5, count),
            "jpeg_quality": rng.integers(70, 100, count),
            "pdq_hash": hexadecimal(count),
            "pdq_quality": rng.integers(40, 100, count),
        }

    def quality(ids: pa.Array) -> dict[str, object]:
        count, digest = len(ids), "ab" * 32
        return {
            "image_id": ids,
            "quality_score": rng.normal(4.2, 0.3, count),
            "quality_scorer": one_of(count, "q-align"),
            "quality_weights": one_of(count, digest),
            "aesthetic": rng.normal(55, 10, count),
            "aesthetic_scorer": one_of(count, "artimuse"),
            "aesthetic_weights": one_of(count, digest),
        }

    def people(ids: pa.Array) -> dict[str, object]:
        count, digest = len(ids), "cd" * 32
        person = rng.random(count) < 0.2
        return {
            "image_id": ids,
            "person_count": person.astype(int),
            "person_boxes": one_of(
                count, *["[]"] * 4, '[{"box": [0.1, 0.2, 0.3, 0.4], "score": 0.91}]'
            ),
            "person_scorer": one_of(count, "nudenet"),
            "person_weights": one_of(count, digest),
            "is_character": person,
            "channel": pc.if_else(pa.array(person), "human", "general"),
            "nsfw_score": rng.beta(1, 20, count),
            "nsfw_scorer": one_of(count, "nudenet"),
            "nsfw_weights": one_of(count, digest),
        }

    identifiers: list[pa.Array] = []
    integrity: list[pa.Array] = []

    def manifest_tables() -> Iterator[pa.Table]:
        for start in range(0, rows, _BATCH):
            count = min(_BATCH, rows - start)
            ids = hexadecimal(count)
            columns = ingest(start, count, ids)
            identifiers.append(ids)
            integrity.append(columns["integrity"])
            yield table(SCHEMA, columns, count)

    data = clone / "data"
    write_row_groups(manifest_tables(), SCHEMA, data / "ingest" / "manifest.parquet")
    for name, schema, make in (
        ("signals", SIGNALS_SCHEMA, lambda n: signals(identifiers[n], integrity[n])),
        ("quality", QUALITY_SCHEMA, lambda n: quality(identifiers[n])),
        ("people", PEOPLE_SCHEMA, lambda n: people(identifiers[n])),
    ):
        batches = (table(schema, make(n), len(identifiers[n])) for n in range(len(identifiers)))
        write_row_groups(batches, schema, data / name / f"{name}.parquet")
    (data / "signals" / "derivatives.parquet").touch()
    (data / "ingest" / "coverage.json").write_text("{}\n", encoding="utf-8")


def make_captioned(clone: Path) -> None:
    """Write what select and caption would leave behind, without running them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sys.path.insert(0, str(ROOT))
    from components.corpus.manifest import SCHEMA
    from components.files.parquet_files import write_row_groups

    rng = np.random.default_rng(2)
    data = clone / "data"
    names = ("signals", "quality", "people")
    measured = [pq.ParquetFile(data / name / f"{name}.parquet") for name in names]
    manifest = pq.ParquetFile(data / "ingest" / "manifest.parquet")
    buckets = pa.array(["2048x2048", "1536x2752", "2752x1536", "1792x2336", "2336x1792"])

    def tables() -> Iterator[pa.Table]:
        # All have rows of the same images in the same groups.
        for group in range(manifest.num_row_groups):
            table = manifest.read_row_group(group)
            columns = {name: table[name] for name in SCHEMA.names}
            for file in measured:
                part = file.read_row_group(group)
                columns |= {one: part[one] for one in part.column_names if one in columns}
            sharp = pc.greater_equal(columns["entropy_bits"], 7.0)
            detailed = pc.less_equal(columns["flat_fraction"], 0.5)
            sound = pc.equal(columns["integrity"], "ok")
            kept = pc.and_(pc.and_(sharp, detailed), sound)
            drawn = pa.array(rng.integers(0, len(buckets), len(table)))
            columns |= {
                "kept": kept,
                "reject_reason": pc.if_else(kept, pa.scalar(None, pa.string()), "entropy"),
                "reject_value": pc.if_else(kept, None, columns["entropy_bits"]),
                "reject_threshold": pc.if_else(kept, pa.scalar(None, pa.float64()), 7.0),
                "bucket": buckets.take(drawn),
                "caption_status": pc.if_else(kept, "ok", pa.scalar(None, pa.string())),
                "caption_model": pa.array(["provided: list"]).take(
                    pa.array(np.zeros(len(table), int))
                ),
            }
            yield pa.Table.from_pydict(columns).cast(SCHEMA)

    write_row_groups(tables(), SCHEMA, data / "caption" / "manifest.parquet")
    (data / "caption" / "text_lengths.json").write_text("{}\n", encoding="utf-8")


def make_other_version(clone: Path) -> None:
    """`after.parquet`: the captioned manifest with some other captions and entropies."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    sys.path.insert(0, str(ROOT))
    from components.files.parquet_files import write_row_groups

    rng = np.random.default_rng(1)
    source = pq.ParquetFile(clone / "data" / "caption" / "manifest.parquet")

    def tables() -> Iterator[pa.Table]:
        for batch in source.iter_batches(batch_size=_BATCH):
            table = pa.Table.from_batches([batch])
            names = table.column_names
            other = pa.array(rng.random(len(table)) < _CHANGED_CAPTIONS)
            caption = pc.if_else(
                other,
                pc.binary_join_element_wise(table["caption_en"], "again", " "),
                table["caption_en"],
            )
            moved = np.where(rng.random(len(table)) < _CHANGED_ENTROPY, 0.1, 0.0)
            table = table.set_column(names.index("caption_en"), "caption_en", caption)
            entropy = pc.subtract(table["entropy_bits"], pa.array(moved))
            yield table.set_column(names.index("entropy_bits"), "entropy_bits", entropy).cast(
                source.schema_arrow
            )

    write_row_groups(tables(), source.schema_arrow, clone / "after.parquet")


def make_clone(folder: Path, target: int | None) -> Path:
    """The files of the working tree without pictures, under git, with the settings to measure.

    Args:
        folder: gets `clone`.
        target: `select.target_images`.
    """
    import yaml

    clone = folder / "clone"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if name and Path(name).suffix not in {".jpg", ".png"} and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    (clone / "dvc.lock").unlink(missing_ok=True)
    path = clone / "params.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Captions came with the images, as in the released metadata.
    settings["ingest"] |= {"kind": "urls", "source": "list.csv"}
    settings["caption"]["provided"] = "keep"
    # Of the lengths that the synthetic captions have.
    settings["caption"] |= {"min_words": 10, "max_words": 200}
    settings["select"]["target_images"] = target
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (clone / "list.csv").write_text("image_url\n", encoding="utf-8")
    commit = ["git", "-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost", "commit"]
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*commit, "-qm", "clone"]):
        subprocess.run(command, cwd=clone, check=True)
    return clone


def run(clone: Path, arguments: list[str]) -> tuple[int, float, float, float, float, str]:
    """Exit code, wall seconds, CPU seconds, peak GiB of a process and of the tree, last line."""
    command = [str(Path(sys.executable).with_name("ultraflux")), *arguments]
    environment = command_environment(clone)
    log = clone / "command.log"
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=clone, env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
        stop, tree = threading.Event(), list[int]()
        sampler = threading.Thread(target=peak_of_tree, args=(process.pid, stop, tree))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.set()
        sampler.join()
    seconds = time.perf_counter() - started
    lines = log.read_text(encoding="utf-8").strip().splitlines() or [""]
    cpu = usage.ru_utime + usage.ru_stime
    code = os.waitstatus_to_exitcode(status)
    return code, seconds, cpu, usage.ru_maxrss / 2**20, tree[0] / 2**30, lines[-1]


def make(what: str, clone: Path, rows: int) -> None:
    """Write tables in another process: what a child peaks at begins at its parent's size."""
    command = [sys.executable, __file__, "--make", what, "--folder", str(clone.parent)]
    subprocess.run([*command, "--rows", str(rows)], check=True)


def main() -> None:
    """Make the tables, then run every command in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--target", type=int, help="select.target_images of a new clone.")
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--folder", type=Path, help="Keep the clone here, or use the one there.")
    parser.add_argument(
        "--captioned", action="store_true", help="Make what select and caption leave behind, too."
    )
    parser.add_argument("--make", choices=("tables", "after", "captioned"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make == "tables":
        return make_tables(options.folder / "clone", options.rows)
    if options.make == "captioned":
        return make_captioned(options.folder / "clone")
    if options.make == "after":
        return make_other_version(options.folder / "clone")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        clone = folder / "clone"
        if not clone.is_dir():
            make_clone(folder, options.target)
            for name in ("code", "source"):
                run(clone, ["stage", "run", name])
            make("tables", clone, options.rows)
        if options.captioned:
            make("captioned", clone, options.rows)
        size = (clone / "data" / "ingest" / "manifest.parquet").stat().st_size
        print(f"{options.rows} rows, manifest of {size / 1e9:.2f} GB", flush=True)
        print(f"{'command':<12}{'exit':>5}{'wall s':>8}{'CPU s':>8}{'GiB':>7}{'tree GiB':>10}")
        for name, arguments in COMMANDS.items():
            if name not in options.only:
                continue
            if name == "diff" and not (clone / "after.parquet").is_file():
                make("after", clone, options.rows)
            code, wall, cpu, peak, tree, said = run(clone, arguments)
            print(
                f"{name:<12}{code:>5}{wall:>8.1f}{cpu:>8.1f}{peak:>7.2f}{tree:>10.2f}", flush=True
            )
            if code not in _FINE:
                print(said, flush=True)
    return None


if __name__ == "__main__":
    main()
