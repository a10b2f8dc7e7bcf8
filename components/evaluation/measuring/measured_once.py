"""Numbers of pictures that a stage makes in passing, through the ledger.

Where a picture has no file (a photograph cut to a size, a reconstruction), its recipe stands for
its bytes: the digests of what it is made from and how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

from components.evaluation.measuring.ledger import Ledger, ValueKey
from components.metrics.cards import card

Values = dict[str, float | None]


def recipe_digest(kind: str, *parts: str | int) -> str:
    """sha256 that stands for a picture without a file.

    Args:
        kind: how it is made, with a version that changes whenever its pixels would.
        *parts: everything else that decides its pixels, such as digests and sizes.
    """
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()


class MeasuredOnce:
    """Values of known pictures; the others are measured and kept at once.

    Args:
        ledger: compacted by `close`.
        pictures: (image digest, reference digest or "") of every picture that may be asked for, so
            that the ledger is read once.
        metric_ids: all ids that may be asked for.

    Raises:
        LedgerConflict: a key has two values.
        LedgerDamaged: a part cannot be read.
    """

    def __init__(
        self, ledger: Ledger, pictures: Iterable[tuple[str, str]], metric_ids: Sequence[str]
    ) -> None:
        self._ledger = ledger
        wanted = set(pictures)
        self._known = ledger.find(
            _key(image, reference, metric_id)
            for image, reference in wanted
            for metric_id in metric_ids
        )
        self.measured = 0
        """Pictures that the ledger did not know."""

    def values(
        self,
        image: str,
        metric_ids: Sequence[str],
        measure: Callable[[], Values],
        *,
        reference: str = "",
    ) -> Values:
        """The numbers of one picture, in the order of `metric_ids`.

        Args:
            image: digest of the picture.
            metric_ids: what `measure` yields.
            measure: called where a number is missing.
            reference: digest of the reference of pair metrics.
        """
        keys = {metric_id: _key(image, reference, metric_id) for metric_id in metric_ids}
        missing = [metric_id for metric_id, key in keys.items() if key not in self._known]
        if missing:
            measured = measure()
            fresh = {keys[metric_id]: measured[metric_id] for metric_id in missing}
            self._ledger.append(fresh)
            self._known |= fresh
            self.measured += 1
        return {metric_id: self._known[key] for metric_id, key in keys.items()}

    def close(self) -> None:
        """Merge what was kept into one file."""
        self._ledger.compact()


def _key(image: str, reference: str, metric_id: str) -> ValueKey:
    metric = card(metric_id)
    paired = reference if metric.needs == "pair" else ""
    return ValueKey(image, paired, "", metric_id, metric.protocol, "")
