"""Published tables: what they hold, what of ours belongs under a column, and what compares.

The tables themselves are data (`components.metrics.paper_tables`). They were measured on other
pictures with other weights; whatever shows them says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Filling = Literal["evaluation", "runtime", "judge", "ablation"]
"""What fills a table here: a suite's scores, its times, a judge's preferences, or an ablation."""


@dataclass(frozen=True)
class PublishedColumn:
    """A column as printed, and what of ours belongs into it."""

    head: str
    """Name with its arrow."""
    measure: str
    """Id of a metric's card; for times a number of `runtime_suite`; for a judge its question."""
    protocol: str = ""
    """Our protocol id that the column was measured under; empty where the paper and the released
    code do not say, so that nothing may be compared with it."""
    script: str = ""
    """Which script or line says so, or what is not said."""


@dataclass(frozen=True)
class PublishedRow:
    """A row as printed."""

    label: str
    values: tuple[str, ...]
    """In column order, digits as printed; "" where the paper has none."""
    stratum: str = ""
    """Group of the suite that the row is of, such as "4096x2048" (width x height)."""
    system: str = ""
    """What it is called here; of an ablation its arm."""
    spec: str = ""
    """SPEC of `ultraflux evaluate` that makes or finds its pictures here."""

    @property
    def title(self) -> str:
        """The label, with its group where the table has groups."""
        return f"{self.stratum}, {self.label}" if self.stratum else self.label


@dataclass(frozen=True)
class PublishedTable:
    """A table as a paper prints it."""

    name: str
    """As of `ultraflux paper table`."""
    caption: str
    source: str
    filling: Filling
    suite: str
    """Suite of `ultraflux evaluate`, or design of `ultraflux ablate`; empty for a judge."""
    fields: tuple[PublishedColumn, ...]
    rows: tuple[PublishedRow, ...]
    wants: str = ""
    """Pictures, prompts and sampling that the table was made with, as far as they are stated."""
    needs: tuple[str, ...] = ()
    """What no command of this project can get, such as hardware or a closed system."""
    options: str = ""
    """Of the command that fills the table here, such as the stated guidance scale."""
    options_of: tuple[tuple[str, str], ...] = ()
    """(pattern of systems' names here, further options for them), such as their steps."""
    beside_suite: bool = False
    """Whether it stands on the page and the screen of its suite's evaluations."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Heads, without the column of systems."""
        return tuple(field.head for field in self.fields)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What of ours belongs under the columns."""
        return tuple(field.measure for field in self.fields)

    @property
    def strata(self) -> tuple[str, ...]:
        """Groups of the rows, in order; ("",) where the table has none."""
        return tuple(dict.fromkeys(row.stratum for row in self.rows))

    def all_options(self, system: str) -> str:
        """Options of the command that measures one system for this table."""
        further = [text for pattern, text in self.options_of if fnmatchcase(system, pattern)]
        return " ".join(filter(None, (self.options, *further)))

    def comparison(self, place: int, protocol: str) -> str:
        """Why numbers of ours do not compare with a column; empty where protocol ids are equal.

        Args:
            place: of the column.
            protocol: id of our metric.
        """
        theirs = self.fields[place].protocol
        if not theirs:
            return "the paper and its released code do not state the protocol"
        return "" if theirs == protocol else f"measured under {theirs}, ours under {protocol}"
