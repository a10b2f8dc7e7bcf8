"""Why one photograph is kept or dropped: every rule's value against its threshold, and its keeper.

At a prompt::

    table = read_table(Path("data/select/manifest.parquet"))
    print(*explain(table, find(table, "lake.jpg", Path()), settings).lines())
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from components.corpus.manifest_columns import manifest_batches
from components.corpus.selection.rights import Exclusion, Exclusions
from components.corpus.selection.rules import (
    REASONS,
    SETTING_OF,
    Judgement,
    as_candidates,
    judgements,
)
from components.settings.schema import Settings
from components.telemetry.wording import few, legible

_NAMED_IN_MESSAGES = 3
_SHORTEST_PREFIX = 4
"""Hexadecimal digits of an image_id; fewer are rather a file's name."""

_COMPARED = 20_000
"""Names that a wrong one is compared with, at some microseconds each."""

_SIGN = {"resolution": ">=", "entropy": ">=", "quality": ">", "aesthetic": ">="}
"""How a value must stand to its threshold; `<=` for all others."""


class ImageUnknown(ValueError):
    """No row, or several photographs, go by a name; one line."""


def find(table: pd.DataFrame, image: str, root: Path) -> int:
    """Position of the row that an image_id (or its beginning), path, file name or address means.

    Of byte-identical copies an image_id means the original, a path the copy itself.

    Args:
        table: image_id, uri and duplicate_of; of an address also `Exclusions.COLUMNS`.
        image: what a person typed.
        root: where relative paths of `uri` start.

    Raises:
        ImageUnknown: see there.
    """
    path = Path(image)
    names = {image, path.as_posix(), (Path.cwd() / path).as_posix()}
    for start in (root, root.resolve()):
        if (Path.cwd() / path).is_relative_to(start):
            names.add((Path.cwd() / path).relative_to(start).as_posix())
    uri = table["uri"].astype("string")
    matches = uri.isin(names)
    if not matches.any() and len(image) >= _SHORTEST_PREFIX:
        matches = table["image_id"].astype("string").str.startswith(image.lower())
    if not matches.any():
        # In this order: a name in full says more than the end of a path.
        matches = uri.str.endswith(f"/{path.as_posix()}")
    rows = matches.to_numpy(dtype=bool, na_value=False).nonzero()[0]
    if not len(rows) and "://" in image:
        rows = Exclusions([Exclusion("url", image)]).mask(table).nonzero()[0]
    if not len(rows):
        raise ImageUnknown(
            f"{image}: no candidate has this image_id, path, file name or address"
            f"{meant(path.name, uri)}"
        )
    found = table.iloc[rows]
    if found["image_id"].nunique() > 1:
        raise ImageUnknown(
            f"{image}: {len(found)} candidates go by it "
            f"({few(list(found['uri']), _NAMED_IN_MESSAGES)}); give a path or more of the image_id"
        )
    originals = found["duplicate_of"].isna().to_numpy().nonzero()[0]
    return int(rows[originals[0] if len(originals) else 0])


def meant(name: str, uris: pd.Series) -> str:
    """Photographs of similar file names, else some of those that there are: the end of a line."""
    uris = uris.dropna().astype("string")
    names = uris.str.rsplit("/", n=1).str[-1].str.lower()
    close = difflib.get_close_matches(name.lower(), names.head(_COMPARED), _NAMED_IN_MESSAGES)
    near = uris[names.isin(close)]
    if near.empty and len(name) >= _SHORTEST_PREFIX:
        near = uris[names.str.contains(name.lower(), regex=False)]
    if not near.empty:
        return f"; did you mean {few(list(near), _NAMED_IN_MESSAGES)}?"
    some = f": {few(list(uris), _NAMED_IN_MESSAGES)}" if len(uris) else ""
    return f"; there are {len(uris):,}{some}"


@dataclass(frozen=True)
class Why:
    """The fate of one candidate under the present settings."""

    image_id: str
    uri: str
    integrity: str
    kept: bool
    reason: str | None
    rules: tuple[Judgement, ...]
    """Of rules that are on, in their order."""
    off: tuple[str, ...]
    keeper: tuple[str, str] | None
    """image_id and uri of the picture that is kept in its place."""
    keeps_for: tuple[str, ...]
    """`uri` of those that are dropped for this one."""
    stored_reason: str | None
    """What the stage `select` said; differs after a change of settings."""
    dropped_later: str | None = None
    """By which later stage it is dropped, and why; see `with_later_stages`."""
    said_later: tuple[str, ...] = ()
    """A line per later stage."""

    def lines(self) -> list[str]:
        """A few lines for a terminal."""
        # The first that drops it: of what is rejected here the later stages decide nothing.
        reason = self.dropped_later if self.kept else self.reason
        verdict = "kept" if reason is None else f"dropped by {reason}"
        lines = [f"{self.uri} ({self.image_id[:12]}): {verdict}"]
        lines += [f"  {_line(rule, self)}" for rule in self.rules]
        if self.off:
            lines.append(f"  off, or cut nothing: {', '.join(self.off)}")
        if self.keeper is not None:
            lines.append(f"  kept in its place: {self.keeper[1]} ({self.keeper[0][:12]})")
        if self.keeps_for:
            named = few(self.keeps_for, _NAMED_IN_MESSAGES)
            lines.append(f"  stands for {len(self.keeps_for)} dropped duplicates: {named}")
        if self.stored_reason != self.reason:
            lines.append(
                f"  settings have changed: the stage select said "
                f"{self.stored_reason or 'kept'}; run: ultraflux run --until select"
            )
        return [legible(line) for line in (*lines, *(f"  {line}" for line in self.said_later))]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(rule: Judgement, why: Why) -> str:
    """One rule: verdict, value against threshold, setting."""
    mark = "FAILS" if rule.fails else "ok"
    if rule.fails and not rule.reached:
        mark = "fails too"
    elif not rule.reached and rule.rule in _COMPARING:
        return f"{'-':<9} {rule.rule}: not looked at, a rule before it failed"
    said = ""
    if rule.rule == "integrity" and rule.fails:
        said = f": {why.integrity}"
    elif rule.rule == "near_duplicate":
        if rule.fails:
            said = f": {rule.value:.0f} of 256 bits from a better one, limit {rule.threshold:.0f}"
    elif math.isnan(rule.value) and not math.isnan(rule.threshold):
        # Quotas and samples draw for all; who was not cut has no border to be held against.
        said = ": not measured" if rule.fails else ""
    elif not math.isnan(rule.threshold):
        sign = _SIGN.get(rule.rule, "<=")
        said = f": {_number(rule.value)}, must be {sign} {_number(rule.threshold)}"
    setting = f" ({SETTING_OF[rule.rule]})" if rule.fails else ""
    return f"{mark:<9} {rule.rule}{said}{setting}"


_COMPARING = ("near_duplicate", "aesthetic", "aspect_quota", "character_quota", "sample")
"""Rules that compare images, among those that have passed all before."""


def explain(selected: pd.DataFrame, row: int, settings: Settings) -> Why:
    """Judge every candidate anew and tell what each rule saw of one.

    Args:
        selected: output of the stage `select`.
        row: position in it (`find`).
        settings: present ones; a stored verdict that differs is named.

    Raises:
        QuotaInfeasible: see `select`.
    """
    seen, result = judgements(as_candidates(selected), settings.select, settings.project.seed, row)
    # Of a rule that judged twice (a quota's rounds, a channel's percentile): what failed the row,
    # else what had a threshold for it, else the last.
    last: dict[str, Judgement] = {}
    for rule in seen:
        before = last.get(rule.rule)
        if before is None or not (before.fails or math.isnan(rule.threshold)):
            last[rule.rule] = rule
    off = {
        name
        for name, rule in last.items()
        # Rules that measure something compare it; without a threshold there was no comparison.
        if name not in (*_QUIET, "near_duplicate", "license", "share_alike")
        and math.isnan(rule.threshold)
        and not rule.fails
    } | set(REASONS) - set(last)
    own = result.iloc[row]
    keeper = None
    if isinstance(own["duplicate_of"], str):
        original = result[result["image_id"] == own["duplicate_of"]]
        original = original[original["duplicate_of"].isna() | original["kept"]]
        uri = original["uri"].iloc[0] if len(original) else "not in this table"
        keeper = (own["duplicate_of"], uri)
    stands_for = result[(result["duplicate_of"] == own["image_id"]).to_numpy()]
    if keeper is not None and keeper[0] == own["image_id"]:
        stands_for = stands_for.iloc[:0]
    return Why(
        image_id=own["image_id"],
        uri=own["uri"],
        integrity=str(own["integrity"]),
        kept=bool(own["kept"]),
        reason=_text(own["reject_reason"]),
        rules=tuple(last[name] for name in REASONS if name in last and name not in off),
        off=tuple(name for name in REASONS if name in off and name not in _QUIET),
        keeper=keeper,
        keeps_for=tuple(stands_for["uri"]),
        stored_reason=_text(selected["reject_reason"].iloc[row]),
    )


def with_later_stages(why: Why, data: Path) -> Why:
    """The verdict with what `caption` and `slices` said of the row, as far as they have run.

    Args:
        why: of `explain`.
        data: folder of the stages' outputs.
    """
    said, dropped = [], None
    for stage, column in (("caption", "caption_status"), ("slices", "split")):
        path = data / stage / "manifest.parquet"
        row = _row(path, why.uri, [column, "reject_reason"]) if path.is_file() else {}
        if row.get(column) is not None:
            said.append(f"{stage}: {column} {row[column]}")
        if row.get("reject_reason") == stage:
            dropped = f"{stage} ({row[column]})"
    return replace(why, dropped_later=dropped, said_later=tuple(said))


def _row(manifest: Path, uri: str, columns: Sequence[str]) -> dict[str, Any]:
    batches = manifest_batches(manifest, ["uri", *columns])
    found = (one.filter(pc.equal(one["uri"], uri)).to_pylist() for one in batches)
    return next(filter(None, found), [{}])[0]


_QUIET = ("excluded", "integrity", "duplicate")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
