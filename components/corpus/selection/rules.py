"""Selection: a pure function from the table of signals to kept and rejected rows.

Signals are measured once; thresholds can change and the table is judged again in seconds. A
rejected row names the first rule that it fails, its value and the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from components.corpus.other_credits import OTHER_CREDITS
from components.corpus.selection.draws import uniform_draws
from components.corpus.selection.quotas import (
    QuotaInfeasible,
    Share,
    quota_sizes,
    smallest_draws,
    stratified_sizes,
)
from components.corpus.selection.rights import EXCLUDED, kept_apart, refused_licenses
from components.settings.corpus import SelectSettings

REASONS = (
    "excluded",
    "integrity",
    "duplicate",
    "license",
    "share_alike",
    "resolution",
    "transparency",
    "nsfw",
    "drawing",
    "flat_fraction",
    "entropy",
    "quality",
    "near_duplicate",
    "aesthetic",
    "aspect_quota",
    "character_quota",
    "sample",
)
"""Rules in the order in which they are tried; the first that fails is the reason.

Free checks come before measured ones and those before model scores. Rules that compare images with
each other come last, among the images that pass everything before: keepers among near duplicates,
the aesthetic percentile, quotas, and the sample of the wanted size.
"""

SETTING_OF = {
    "excluded": "select.exclusions",
    "license": "select.licenses",
    "share_alike": "select.licenses.share_alike",
    "integrity": "ingest.source",
    "duplicate": "ingest.source",
    "resolution": "select.min_pixels",
    "transparency": "select.max_alpha_fraction",
    "nsfw": "select.max_nsfw",
    "drawing": "select.max_drawing",
    "flat_fraction": "select.max_flat_fraction",
    "entropy": "select.min_entropy_bits",
    "quality": "select.min_quality",
    "near_duplicate": "select.near_duplicate_distance",
    "aesthetic": "select.aesthetic_top_fraction",
    "aspect_quota": "select.aspect_quotas",
    "character_quota": "select.character_quota",
    "sample": "select.target_images",
}
"""The setting to look at when a rule rejects too much."""

# Columns that the rules read; the others pass through.
COLUMNS = (
    "image_id",
    "license",
    OTHER_CREDITS,
    "integrity",
    "duplicate_of",
    "width",
    "height",
    "alpha_fraction",
    "nsfw_score",
    "drawing_score",
    "flat_fraction",
    "entropy_bits",
    "quality_score",
    "aesthetic",
    "channel",
    "is_character",
    "bucket",
    "pdq_hash",
    "pdq_quality",
)

STRATA = ("bucket", "channel", "is_character")
"""Samples keep the proportions of these."""

_QUOTA_ROUNDS = 100


@dataclass(frozen=True)
class Judgement:
    """What one rule saw of one row."""

    rule: str
    fails: bool
    reached: bool
    """Whether the row had passed every rule before."""
    value: float
    """NaN: not measured, or the rule knows no number."""
    threshold: float
    """NaN: the rule is off for this row, or knows no number."""


class _Verdicts:
    """First failed rule, value and threshold of every row, as arrays."""

    def __init__(self, count: int, watched: int | None = None) -> None:
        # What every rule says of one row, also after the first that it fails.
        self.watched = watched
        self.seen: list[Judgement] = []
        # -1 passes. It also indexes the None at the end of `reasons`: keep that entry last.
        self.codes = np.full(count, -1, dtype=np.int8)
        self.value = np.full(count, math.nan)
        self.threshold = np.full(count, math.nan)

    @property
    def passing(self) -> np.ndarray:
        return self.codes < 0

    def reject(
        self,
        fails: np.ndarray,
        reason: str,
        values: np.ndarray | None = None,
        threshold: np.ndarray | float = math.nan,
    ) -> None:
        """Reject the rows where `fails`, unless an earlier rule did."""
        limits = np.broadcast_to(threshold, fails.shape)
        if (row := self.watched) is not None:
            value = math.nan if values is None else float(values[row])
            seen = Judgement(
                reason, bool(fails[row]), bool(self.passing[row]), value, float(limits[row])
            )
            self.seen.append(seen)
        # The first verdict stands: each row has one reason, and the counts add up.
        rows = fails & self.passing
        self.codes[rows] = REASONS.index(reason)
        if values is not None:
            self.value[rows] = values[rows]
        self.threshold[rows] = limits[rows]

    def reasons(self) -> np.ndarray:
        return np.array([*REASONS, None], dtype=object)[self.codes]


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64, NaN where missing or where the table has no such column."""
    if column not in table:
        return np.full(len(table), math.nan)
    # Missing is NaN, never 0: a signal that was not measured must be able to fail.
    return table[column].to_numpy(dtype=float, na_value=math.nan)


def _flags(table: pd.DataFrame, column: str, value: str | bool) -> np.ndarray:
    """Where a column equals `value`; nowhere if the table has no such column."""
    if column not in table:
        return np.zeros(len(table), dtype=bool)
    # A missing flag is no.
    return table[column].eq(value).fillna(False).to_numpy(dtype=bool)


def _top_threshold(scores: np.ndarray, top_fraction: float) -> float:
    """The score of the last image inside the top fraction; at least one image is inside."""
    known = scores[~np.isnan(scores)]
    if not len(known):
        return math.nan
    # A share of all that passed so far: those without a score count, though they get no place.
    inside = min(len(known), max(1, math.ceil(top_fraction * len(scores))))
    return float(np.partition(known, len(known) - inside)[len(known) - inside])


def _reject_images(
    table: pd.DataFrame, settings: SelectSettings, verdicts: _Verdicts, human: np.ndarray
) -> None:
    """The rules that look at one image alone."""

    def per_channel(general: float | None, own: float | None) -> np.ndarray:
        """Threshold of every row; NaN where the rule is off."""
        return np.where(
            human, math.nan if own is None else own, math.nan if general is None else general
        )

    # Rules that are off have a NaN limit, which the comparisons below turn into "passes".
    own = settings.human
    # Without number or threshold: these say all with their reason. What somebody has asked to be
    # left out comes first, so that no other rule looks at it.
    verdicts.reject(_flags(table, EXCLUDED, True), "excluded")
    verdicts.reject(~_flags(table, "integrity", "ok"), "integrity")
    verdicts.reject(table["duplicate_of"].notna().to_numpy(), "duplicate")
    if (refused := refused_licenses(table, settings.licenses)) is not None:
        verdicts.reject(refused, "license")
    if (apart := kept_apart(table, settings.licenses)) is not None:
        verdicts.reject(apart, "share_alike")
    pixels = _numbers(table, "width") * _numbers(table, "height")
    # Negated comparisons, so that a missing signal (NaN) fails.
    verdicts.reject(~(pixels >= settings.min_pixels), "resolution", pixels, settings.min_pixels)
    if settings.max_alpha_fraction is not None:
        clear = _numbers(table, "alpha_fraction")
        # Not negated: every decoded file has this measure, but manifests of version 3 have not.
        fails = clear > settings.max_alpha_fraction
        verdicts.reject(fails, "transparency", clear, settings.max_alpha_fraction)
    if settings.max_nsfw is not None:
        nsfw = _numbers(table, "nsfw_score")
        verdicts.reject(~(nsfw <= settings.max_nsfw), "nsfw", nsfw, settings.max_nsfw)
    if settings.max_drawing is not None:
        drawn = _numbers(table, "drawing_score")
        verdicts.reject(~(drawn <= settings.max_drawing), "drawing", drawn, settings.max_drawing)
    flat = _numbers(table, "flat_fraction")
    limit = per_channel(settings.max_flat_fraction, own.max_flat_fraction)
    verdicts.reject(~(flat <= limit) & ~np.isnan(limit), "flat_fraction", flat, limit)
    entropy = _numbers(table, "entropy_bits")
    limit = per_channel(settings.min_entropy_bits, own.min_entropy_bits)
    verdicts.reject(~(entropy >= limit) & ~np.isnan(limit), "entropy", entropy, limit)
    quality = _numbers(table, "quality_score")
    limit = per_channel(settings.min_quality, own.min_quality)
    # Strict, unlike the others: the paper keeps scores above 4.0.
    verdicts.reject(~(quality > limit) & ~np.isnan(limit), "quality", quality, limit)


def _reject_near_duplicates(
    table: pd.DataFrame, settings: SelectSettings, verdicts: _Verdicts
) -> np.ndarray:
    """Drop what lies within the distance of a keeper; the keeper's image_id of each dropped row.

    Stars are drawn among the rows that pass everything before: a keeper that another rule rejects
    would take others with it, and these may be further apart than the limit.
    """
    # Here, not above: compiled code that settings and quotas do without.
    from components.corpus.selection.duplicates import KEEPER_COLUMNS, keepers

    kept_instead = np.full(len(table), None, dtype=object)
    limit = settings.near_duplicate_distance
    if limit is None or "pdq_hash" not in table or table["pdq_hash"].isna().all():
        return kept_instead
    rows = np.flatnonzero(verdicts.passing)
    compared = [name for name in KEEPER_COLUMNS if name in table]
    own, bits = keepers(
        table[compared].iloc[rows],
        max_distance=limit,
        min_quality=settings.near_duplicate_min_quality,
    )
    is_dropped = own != np.arange(len(rows))
    lost = np.zeros(len(table), dtype=bool)
    lost[rows[is_dropped]] = True
    distance = np.full(len(table), math.nan)
    distance[rows] = bits
    verdicts.reject(lost, "near_duplicate", distance, limit)
    kept_instead[lost] = table["image_id"].iloc[rows[own[is_dropped]]].to_numpy()
    return kept_instead


def _reject_by_aesthetic(
    table: pd.DataFrame, settings: SelectSettings, verdicts: _Verdicts, human: np.ndarray
) -> None:
    """Keep the top share, of the whole or of each channel."""
    own = settings.human.aesthetic_top_fraction
    channels = [(np.ones(len(table), dtype=bool), settings.aesthetic_top_fraction)]
    if own is not None:
        channels = [(~human, settings.aesthetic_top_fraction), (human, own)]
    scores = _numbers(table, "aesthetic")
    # Taken once: what one channel loses must not move the other's threshold.
    before = verdicts.passing
    for rows, fraction in channels:
        # At 1.0 nothing is asked, not even that there is a score.
        if fraction < 1.0:
            # NaN if nobody has a score, and then all fail: a rule that is on needs its signal.
            threshold = _top_threshold(scores[before & rows], fraction)
            limit = np.where(rows, threshold, math.nan)
            verdicts.reject(rows & ~(scores >= threshold), "aesthetic", scores, limit)


def _cut_to_shares(
    groups: np.ndarray, shares: list[Share], draws: np.ndarray, verdicts: _Verdicts, reason: str
) -> bool:
    """Apply one quota to the passing rows; whether any was rejected."""
    rows = np.flatnonzero(verdicts.passing)
    counts = np.bincount(groups[rows], minlength=len(shares))
    try:
        sizes = quota_sizes(counts.tolist(), shares)
    except QuotaInfeasible as problem:
        raise QuotaInfeasible(f"{SETTING_OF[reason]}: {problem}") from None
    if (sizes == counts).all():
        return False
    # The smallest draws stay, so that a larger quota keeps all that a smaller one kept.
    taken, borders = smallest_draws(groups[rows], draws[rows], sizes)
    lost = np.zeros(len(groups), dtype=bool)
    lost[rows[~taken]] = True
    verdicts.reject(lost, reason, draws, borders[groups])
    return True


def _reject_by_quota(
    table: pd.DataFrame, settings: SelectSettings, verdicts: _Verdicts, draws: np.ndarray
) -> None:
    """Aspect quotas, then the character quota, again until both hold.

    Each only removes rows, so this ends; thresholds are the largest draw that stayed in the group.
    """
    ratios = _numbers(table, "width") / _numbers(table, "height")
    shape = np.full(len(table), len(settings.aspect_quotas))
    # Backwards, so that the first quota an image fits is the one that stays written.
    for position, quota in reversed(list(enumerate(settings.aspect_quotas))):
        shape[(ratios >= quota.min_ratio) & (ratios < quota.max_ratio)] = position
    shapes = [Share(q.name, q.min_share, q.max_share) for q in settings.aspect_quotas]
    # Shares must cover all rows: what fits no quota is a group without bounds.
    shapes.append(Share("other"))
    # Groups in the order of `people`: 0 others, 1 characters.
    person = _flags(table, "is_character", True).astype(np.int64)
    characters = settings.character_quota
    people = (
        [Share("others"), Share("character", characters.min_share, characters.max_share)]
        if characters
        else []
    )
    # Meeting one quota may break the other; rows are only ever taken away, so it settles.
    for _ in range(_QUOTA_ROUNDS):
        changed = bool(settings.aspect_quotas) and _cut_to_shares(
            shape, shapes, draws, verdicts, "aspect_quota"
        )
        if people:
            changed |= _cut_to_shares(person, people, draws, verdicts, "character_quota")
        if not changed:
            return
    raise QuotaInfeasible("select: aspect_quotas and character_quota contradict each other")


def _reject_by_sample(
    table: pd.DataFrame, target: int, verdicts: _Verdicts, draws: np.ndarray
) -> None:
    """Keep a stratified sample of `target` rows."""
    rows = np.flatnonzero(verdicts.passing)
    groups = strata(table.iloc[rows])
    sizes = stratified_sizes(np.bincount(groups).tolist(), target)
    taken, borders = smallest_draws(groups, draws[rows], sizes)
    lost = np.zeros(len(table), dtype=bool)
    lost[rows[~taken]] = True
    threshold = np.full(len(table), math.nan)
    threshold[rows] = borders[groups]
    verdicts.reject(lost, "sample", draws, threshold)


def strata(table: pd.DataFrame) -> np.ndarray:
    """Stratum of each row by bucket, channel and character, numbered in the order of their names.

    Args:
        table: may lack any of `STRATA`.
    """
    codes = np.zeros(len(table), dtype=np.int64)
    for column in STRATA:
        if column in table:
            values = table[column].astype("category").cat
            # Missing is a stratum of its own, under the empty name; its code -1 is the last.
            names = [*map(str, values.categories), ""]
            ranks = np.unique(np.array(names, dtype=object), return_inverse=True)[1]
            # Mixed radix: every combination has its own number.
            codes = codes * len(names) + ranks[values.codes.to_numpy()]
    # Renumbered without holes, since sizes are counted by bincount.
    return np.unique(codes, return_inverse=True)[1] if len(codes) else codes


def select(table: pd.DataFrame, settings: SelectSettings, seed: int = 0) -> pd.DataFrame:
    """Apply the paper's rules (UltraFlux supplement 2.1), then quotas and the sample size.

    Kept: not on the list of exclusions, of a licence that the settings take (ours, not the
    paper's), width * height >= min_pixels, alpha_fraction <= max_alpha_fraction, nsfw_score <=
    max_nsfw, drawing_score <= max_drawing, flat_fraction <= max_flat_fraction, entropy_bits >=
    min_entropy_bits, quality_score > min_quality, no keeper of more pixels within
    near_duplicate_distance (`duplicates.keepers`), and aesthetic among the top fraction of what is
    left (ties at the border are kept; 1.0 switches the rule off). Images of the human channel have
    thresholds of their own. A signal that is missing fails its rule, with a null value
    (alpha_fraction excepted). Then quotas (`quotas.quota_sizes`) and the stratified sample take the
    rows with the smallest draws of (seed, image_id); their reject_value is the row's draw and
    reject_threshold the largest draw that stayed in its group.

    Args:
        table: manifest columns `COLUMNS` (alpha_fraction, nsfw_score, drawing_score, channel,
            is_character, bucket, license, pdq_hash and pdq_quality may be absent), and `EXCLUDED`
            where somebody is; unchanged.
        settings: thresholds.
        seed: project seed.

    Returns:
        a copy with kept, reject_reason, reject_value and reject_threshold; a near duplicate's
        duplicate_of is the image_id of its keeper, its reject_value the bits between the two.

    Raises:
        QuotaInfeasible: no image would be left by the quotas.
    """
    return _selected(table, settings, seed, _Verdicts(len(table)))


def judgements(
    table: pd.DataFrame, settings: SelectSettings, seed: int, row: int
) -> tuple[list[Judgement], pd.DataFrame]:
    """What each rule that is on says of one row, and the table that `select` returns.

    Rules that look at one image alone judge it whatever came before; those that compare images
    only look at rows that have passed (`Judgement.reached`). A quota may judge more than once.

    Args:
        table: see `select`, as are settings and seed.
        settings: thresholds.
        seed: project seed.
        row: position in `table`.

    Raises:
        QuotaInfeasible: no image would be left by the quotas.
    """
    verdicts = _Verdicts(len(table), row)
    result = _selected(table, settings, seed, verdicts)
    return verdicts.seen, result


def _selected(
    table: pd.DataFrame, settings: SelectSettings, seed: int, verdicts: _Verdicts
) -> pd.DataFrame:
    human = _flags(table, "channel", "human")
    _reject_images(table, settings, verdicts, human)
    near = _reject_near_duplicates(table, settings, verdicts)
    _reject_by_aesthetic(table, settings, verdicts, human)
    target = settings.target_images
    # Skipped where nothing is drawn, since it hashes the ids of all that pass.
    if settings.aspect_quotas or settings.character_quota or target is not None:
        draws = np.full(len(table), math.nan)
        rows = np.flatnonzero(verdicts.passing)
        # A purpose of its own, so that who is sampled says nothing about who is held out later.
        draws[rows] = uniform_draws(seed, table["image_id"].iloc[rows], "select")
        _reject_by_quota(table, settings, verdicts, draws)
        if target is not None:
            _reject_by_sample(table, target, verdicts, draws)
    result = table.assign(
        kept=verdicts.passing,
        reject_reason=pd.Series(verdicts.reasons(), table.index, dtype=object),
        reject_value=verdicts.value,
        reject_threshold=verdicts.threshold,
    )
    # An exact duplicate never gets as far as this rule, so the two share the column.
    is_near = pd.notna(near)
    if is_near.any():
        originals = result["duplicate_of"].astype(object).to_numpy(copy=True)
        originals[is_near] = near[is_near]
        result = result.assign(duplicate_of=originals)
    return result


def as_candidates(selected: pd.DataFrame) -> pd.DataFrame:
    """Undo what `select` did to duplicate_of, so that a selected manifest can be judged again.

    A near duplicate names its keeper there, which the exact-duplicate rule would take for its own.
    """
    is_near = selected["reject_reason"].eq("near_duplicate")
    originals = selected["duplicate_of"].astype(object).mask(is_near, None)
    result = selected.assign(duplicate_of=originals)
    # Whom the list of exclusions met is not asked again: it is no threshold that one tries.
    excluded = selected["reject_reason"].eq("excluded")
    return result.assign(**{EXCLUDED: excluded}) if excluded.any() else result


def count_by_reason(table: pd.DataFrame) -> dict[str, int]:
    """Numbers of candidates, kept and rejected rows, each reason named even when it is zero."""
    counts = table["reject_reason"].value_counts()
    return {
        "candidates": len(table),
        "kept": int(table["kept"].sum()),
        **{f"rejected_{reason}": int(counts.get(reason, 0)) for reason in REASONS},
    }


def why_nothing_is_kept(counts: dict[str, int]) -> str:
    """One line: what rejected everything, and which setting decides it.

    Args:
        counts: of `count_by_reason`.
    """
    rejected = {reason: counts[f"rejected_{reason}"] for reason in REASONS}
    listed = ", ".join(f"{reason} {number}" for reason, number in rejected.items() if number)
    # The rule that took most is the likeliest to be set wrongly.
    strictest = max(rejected, key=lambda reason: rejected[reason])
    return (
        f"none of {counts['candidates']} candidates passes ({listed}); "
        f"look at {SETTING_OF[strictest]} first"
    )
