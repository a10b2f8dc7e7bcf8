"""Benchmark suites: prompts, sizes, references, and the metrics that are reported on them.

Benchmarks are read from a local copy, a folder with `metadata.jsonl` (an object a line: `file_name`
relative to the folder, `text`) and the pictures that it names. Nothing is fetched: a missing copy
is one error with the command that gets it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from components.files.install_hints import download_command
from components.generation.prompt_files import json_objects, odd_character
from components.generation.sampling import image_seed

BENCHMARKS = Path("data/benchmarks")
# The repository is the one that Diffusion-4K's README names; its scripts read eval/size_2048 and
# eval/size_4096 in it. Its present file list was not seen.
_REPOSITORY = "zhang0jhon/Aesthetic-4K"

TEXT_TO_IMAGE_METRICS = (
    *("fid_fitted", "hpsv3", "pickscore", "artimuse", "clip_score_b16", "qalign", "musiq"),
    *("fid", "fid_extrapolated", "kid", "clip_score"),
    *("glcm_score", "compression_ratio", "laion_aesthetics"),
)
DETAIL_METRICS = ("glcm_score", "compression_ratio", "laion_aesthetics")
RECONSTRUCTION_METRICS = ("rfid", "nmse", "psnr_db", "ssim", "lpips")
WEIGHT_FREE_METRICS = (
    *("glcm_score", "compression_ratio", "entropy_bits", "flat_fraction"),
    *("laplacian_variance", "colourfulness", "piqe"),
)


class SuiteMissing(ValueError):
    """The local copy of a benchmark is not there; one line with the command that gets it."""


@dataclass(frozen=True)
class SuiteItem:
    """One picture that a system is asked for."""

    id: str
    """File name without ending, distinct within the suite."""
    prompt: str
    height: int
    width: int
    seed: int
    reference: Path | None = None
    """A real picture of the same subject; for a reconstruction, what is reconstructed."""
    stratum: str = ""
    """Group that is reported on its own, such as "5120x2880" (width x height)."""


@dataclass(frozen=True)
class Suite:
    """What is asked and what is reported."""

    name: str
    title: str
    protocol: str
    """Changes whenever a change of the suite moves a number."""
    metrics: tuple[str, ...]
    items: tuple[SuiteItem, ...]
    is_reconstruction: bool = False
    """References are fitted to the items' size, and pair metrics compare with them."""

    def limited(self, count: int | None) -> Suite:
        """The first `count` items of every stratum; None keeps all."""
        if count is None:
            return self
        seen: dict[str, int] = {}
        kept = []
        for item in self.items:
            seen[item.stratum] = seen.get(item.stratum, 0) + 1
            if seen[item.stratum] <= count:
                kept.append(item)
        return replace(self, items=tuple(kept), protocol=f"{self.protocol}+first{count}")


@dataclass(frozen=True)
class Source:
    """A benchmark folder and the sizes (height, width) at which it is asked for."""

    folder: str
    sizes: tuple[tuple[int, int], ...]
    part: str
    """Its folder below eval/ of the published dataset."""

    def places(self, benchmarks: Path) -> tuple[Path, Path]:
        """Where a local copy may be: under our name, or as it was downloaded."""
        return benchmarks / self.folder, benchmarks / "Aesthetic-4K" / "eval" / self.part


@dataclass(frozen=True)
class SuiteDefinition:
    """How a named suite is made of local copies."""

    name: str
    title: str
    protocol: str
    metrics: tuple[str, ...]
    sources: tuple[Source, ...]
    is_reconstruction: bool = False


SQUARE_4K, SQUARE_2K = (4096, 4096), (2048, 2048)
ASPECT_SIZES = ((2048, 4096), (4096, 2048), (2880, 5120), (5952, 2496))
"""(height, width) of the strata 4096x2048, 2048x4096, 5120x2880, 2496x5952 of UltraFlux."""
RUNTIME_SIZES = (SQUARE_2K, SQUARE_4K, (2880, 5120))
"""(height, width) of the runtime suite."""
_EVAL_4K, _EVAL_2K = "aesthetic-eval-4096", "aesthetic-eval-2048"
_PART_4K, _PART_2K = "size_4096", "size_2048"

DEFINITIONS: tuple[SuiteDefinition, ...] = (
    SuiteDefinition(
        _EVAL_4K,
        "Aesthetic-Eval@4096 (Diffusion-4K): text to image at 4096 x 4096",
        "aesthetic-eval-4096/v1",
        TEXT_TO_IMAGE_METRICS,
        (Source(_EVAL_4K, (SQUARE_4K,), _PART_4K),),
    ),
    SuiteDefinition(
        _EVAL_2K,
        "Aesthetic-Eval@2048 (Diffusion-4K): text to image at 2048 x 2048",
        "aesthetic-eval-2048/v1",
        TEXT_TO_IMAGE_METRICS,
        (Source(_EVAL_2K, (SQUARE_2K,), _PART_2K),),
    ),
    SuiteDefinition(
        "aspect-ratio",
        "Aesthetic-Eval@4096 prompts at four aspect ratios (UltraFlux)",
        "aspect-ratio/v1",
        TEXT_TO_IMAGE_METRICS,
        (Source(_EVAL_4K, ASPECT_SIZES, _PART_4K),),
    ),
    SuiteDefinition(
        "reconstruction",
        "Autoencoder reconstruction of the Aesthetic-Eval@4096 pictures",
        "reconstruction-4096/v1",
        RECONSTRUCTION_METRICS,
        (Source(_EVAL_4K, (SQUARE_4K,), _PART_4K),),
        is_reconstruction=True,
    ),
    SuiteDefinition(
        "detail",
        "Fine detail at 2048 x 2048 and 4096 x 4096 (Diffusion-4K)",
        "detail/v1",
        DETAIL_METRICS,
        (Source(_EVAL_2K, (SQUARE_2K,), _PART_2K), Source(_EVAL_4K, (SQUARE_4K,), _PART_4K)),
    ),
)
HELD_OUT, RUNTIME = "held-out", "runtime"
RUNTIME_PROMPT = "A mountain lake at dawn, pine forest on the far shore, mist above the water."
WAYS_PROMPTS = (
    RUNTIME_PROMPT,
    "A portrait of an old fisherman with a grey beard, side light, every wrinkle sharp.",
    "A street market at night in the rain, neon signs mirrored in puddles, many people.",
    "A shop sign that reads OPEN ALL NIGHT above a green door in a brick wall.",
    "Dry grass and thistles in the wind, macro, shallow depth of field, plain sky behind.",
    "A white cup on a white table before a white wall.",
    "An aerial view of a city of red roofs around a cathedral, noon, no clouds.",
    "A flat vector illustration of a fox in three colours on a cream background.",
)
"""Of the comparison of ways to sample: fine texture, faces, text, night, blur, flat areas."""


def suite_names() -> tuple[str, ...]:
    """Every name that `load_suite` knows beside paths."""
    return (*(definition.name for definition in DEFINITIONS), HELD_OUT, RUNTIME)


def not_of_suite(name: str, suite: str, protocol: str) -> str:
    """Why numbers are not those of a whole named suite; empty where they are.

    Args:
        name: of `DEFINITIONS`.
        suite: what they were measured on; a folder may have any name.
        protocol: of that suite or of a part of it.
    """
    if suite != name:
        return f"measured on suite {suite}, not {name}"
    known = next((one.protocol for one in DEFINITIONS if one.name == name), "")
    whole, is_part, _ = protocol.partition("+")
    if whole != known:
        return f"measured on another suite of that name ({protocol}, not {known})"
    return f"measured on a part of the suite ({protocol})" if is_part else ""


def item_name(stem: str) -> str:
    """The id that a picture's path without suffix gives; files of a system go by it as well."""
    # Composed: a copy from a Mac has an accent as a character of its own.
    plain = unicodedata.normalize("NFC", stem)
    return re.sub(r"[^\w.-]", "_", plain.replace("/", "__"))


def _entries(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(id, picture, prompt) of a folder's metadata.jsonl."""
    metadata = folder / "metadata.jsonl"
    seen: dict[str, str] = {}
    for where, record in json_objects(metadata.read_text(encoding="utf-8-sig"), str(metadata)):
        name, text = record.get("file_name"), record.get("text")
        if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: expected an object with texts `file_name` and `text`")
        if not PurePosixPath(name).name or "\0" in name:
            raise ValueError(f"{where}: file_name {name!r} names no file")
        # JSON may hold half of a character (a cut emoji), which no file takes.
        if odd_character(name + text) is not None:
            raise ValueError(f"{where}: half of a character (\\ud800 to \\udfff) in {name!r}")
        picture = folder / name
        # By the name alone: a link in the user's own folder leads where they laid it, as every
        # picture of a hub's cache does; a name is text from elsewhere.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{where}: file_name '{name}' leads out of the folder; refused")
        item_id = item_name(PurePosixPath(name).with_suffix("").as_posix())
        if item_id in seen:
            raise ValueError(
                f"{where}: '{name}' and {seen[item_id]} give the same name '{item_id}'; "
                "rename one of the pictures"
            )
        seen[item_id] = where.removeprefix(f"{metadata} ")
        yield item_id, picture, text


def read_benchmark(folder: Path) -> list[tuple[str, Path, str]]:
    """(id, picture, prompt) of a local copy, in the order of its metadata.

    Raises:
        ValueError: a bad line, by number, or pictures that are not there.
    """
    try:
        entries = list(_entries(folder))
    except UnicodeDecodeError as problem:
        raise ValueError(f"{folder / 'metadata.jsonl'}: not UTF-8 at {problem.start}") from None
    if not entries:
        raise ValueError(f"{folder / 'metadata.jsonl'}: names no picture")
    missing = [path for _, path, _ in entries if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(entries)} pictures named in metadata.jsonl are not "
            f"there, the first is {missing[0].name}; complete the copy"
        )
    return entries


def _items(
    entries: list[tuple[str, Path, str]], sizes: tuple[tuple[int, int], ...], seed: int
) -> Iterator[SuiteItem]:
    for index, (item_id, picture, prompt) in enumerate(entries):
        for height, width in sizes:
            suffix = f"_{width}x{height}" if len(sizes) > 1 else ""
            yield SuiteItem(
                id=f"{item_id}{suffix}",
                prompt=prompt,
                height=height,
                width=width,
                seed=image_seed(seed, index, height, width),
                reference=picture,
                stratum=f"{width}x{height}",
            )


def _folder_suite(folder: Path, seed: int) -> Suite:
    """A folder of one's own; every picture is asked for at the size of its reference."""
    from components.images.decoding import ImageUndecodable, image_bytes, read_header

    items = []
    for index, (item_id, picture, prompt) in enumerate(read_benchmark(folder)):
        try:
            header = read_header(image_bytes(picture))
        except ImageUndecodable as problem:
            raise ValueError(f"{picture}: {problem}") from None
        size = (header.height, header.width)
        items.append(
            SuiteItem(
                id=item_id,
                prompt=prompt,
                height=size[0],
                width=size[1],
                seed=image_seed(seed, index, *size),
                reference=picture,
                stratum=f"{size[1]}x{size[0]}",
            )
        )
    return Suite(
        name=folder.resolve().name,
        title=f"Pictures of {folder.resolve().name}",
        protocol="folder/v1",
        metrics=WEIGHT_FREE_METRICS,
        items=tuple(items),
    )


def _held_out_suite(root: Path, seed: int) -> Suite:
    import pandas as pd

    from components.images.original_lookup import OriginalLookup

    table = root / "data" / "slices" / "eval.parquet"
    if not table.is_file():
        raise SuiteMissing(f"held-out: {table} is not there; make it with: ultraflux run")
    rows = pd.read_parquet(table)
    originals = OriginalLookup(root).find_all(rows)
    items = [
        SuiteItem(
            id=str(row["image_id"]),
            prompt=str(row["caption_en"]),
            height=int(row["bucket_height"]),
            width=int(row["bucket_width"]),
            seed=image_seed(seed, index, int(row["bucket_height"]), int(row["bucket_width"])),
            reference=original.path if original.path.exists() else None,
            stratum=f"{row['bucket_width']}x{row['bucket_height']}",
        )
        for index, (row, original) in enumerate(
            zip(rows.to_dict("records"), originals, strict=True)
        )
    ]
    return Suite(
        name=HELD_OUT,
        title="Held-out photographs of our own corpus, at their buckets' sizes",
        protocol="held-out/v1",
        metrics=(*TEXT_TO_IMAGE_METRICS, *WEIGHT_FREE_METRICS[2:]),
        items=tuple(items),
    )


def load_suite(name: str, root: Path, *, data: Path | None = None, seed: int = 0) -> Suite:
    """A suite by name, or a folder with metadata.jsonl.

    Args:
        name: one of `suite_names`, or a path.
        root: repository root; local copies are in its data/benchmarks/.
        data: another place of the local copy, for suites that have one source.
        seed: root of the items' seeds.

    Raises:
        SuiteMissing: no local copy.
        ValueError: an unknown name, or a copy that is not complete and well-formed.
    """
    if (Path(name) / "metadata.jsonl").is_file():
        return _folder_suite(Path(name), seed)
    if name == HELD_OUT:
        return _held_out_suite(root, seed)
    if name == RUNTIME:
        title = "Seconds and memory per picture"
        return Suite(RUNTIME, title, "runtime/v1", (), runtime_items())
    definition = next((d for d in DEFINITIONS if d.name == name), None)
    if definition is None:
        known = ", ".join(suite_names())
        raise ValueError(f"suite '{name}': neither a folder with metadata.jsonl nor one of {known}")
    items: list[SuiteItem] = []
    for source in definition.sources:
        places = source.places(root / BENCHMARKS)
        if data and len(definition.sources) == 1:
            places = (data, data)
        folder = next((p for p in places if (p / "metadata.jsonl").is_file()), None)
        if folder is None:
            command = download_command(
                _REPOSITORY,
                f"{BENCHMARKS}/Aesthetic-4K",
                include=(f"eval/{source.part}/*",),
                dataset=True,
            )
            raise SuiteMissing(
                f"suite {name}: no local copy at {places[0]} (metadata.jsonl); get it with: "
                f"{command}"
            )
        entries = read_benchmark(folder)
        if len(definition.sources) > 1:
            entries = [(f"{source.folder}_{i}", path, text) for i, path, text in entries]
        items += _items(entries, source.sizes, seed)
    return Suite(
        name=definition.name,
        title=definition.title,
        protocol=definition.protocol,
        metrics=definition.metrics,
        items=tuple(items),
        is_reconstruction=definition.is_reconstruction,
    )


def runtime_items(sizes: tuple[tuple[int, int], ...] = RUNTIME_SIZES) -> tuple[SuiteItem, ...]:
    """One item per size (height, width) of the runtime suite, with its fixed prompt."""
    return tuple(
        SuiteItem(
            f"runtime_{w}x{h}", RUNTIME_PROMPT, h, w, image_seed(0, 0, h, w), None, f"{w}x{h}"
        )
        for h, w in sizes
    )


def ways_items(
    sizes: tuple[tuple[int, int], ...] = RUNTIME_SIZES, prompts: int | None = None
) -> tuple[SuiteItem, ...]:
    """The first `prompts` of `WAYS_PROMPTS` at each size (height, width)."""
    return tuple(
        SuiteItem(f"way{index}_{w}x{h}", prompt, h, w, image_seed(0, index, h, w), None, f"{w}x{h}")
        for h, w in sizes
        for index, prompt in enumerate(WAYS_PROMPTS[:prompts])
    )
