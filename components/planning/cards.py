"""Which cards are enough for training an adapter and for sampling, and with which settings.

Ways are tried in order, those first that lose nothing; what a way changes is said beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from components.planning.advice import Changes, changed
from components.planning.memory import GIB
from components.planning.stage_memory import Verdict, stage_memory, verdict_of
from components.planning.transformer import Transformer

CARDS_GB = (8, 16, 24, 48, 80, 141)
EDGES_PX = (1024, 2048, 4096)
_Q, _T = "models.transformer.quantisation", "models.text_encoders.quantisation"
EXACT = "exact"
_INT8, _NF4 = (
    "velocity within 1% (int8, random weights)",
    "velocity within 6% (nf4, random weights)",
)
_TILES = "decoded in tiles"
_TRAINING: tuple[tuple[Changes, str], ...] = (
    ({}, EXACT),
    ({"offload_activations": True}, EXACT),
    ({_Q: "int8"}, _INT8),
    ({_Q: "int8", "offload_activations": True}, _INT8),
    ({_Q: "nf4"}, _NF4),
    ({_Q: "nf4", "offload_activations": True}, _NF4),
    ({_Q: "nf4", "offload_activations": True, "ema_device": "cpu"}, _NF4),
    # Last, though exact: all weights of the blocks travel twice for every micro batch.
    ({"offload_activations": True, "offload_base": True}, EXACT),
)
_SAMPLING: tuple[tuple[Changes, str], ...] = (
    ({}, EXACT),
    ({"generate.memory": ["text-first"]}, EXACT),
    ({"generate.memory": ["text-first", "block-offload"]}, EXACT),
    ({"generate.memory": ["text-first"], _Q: "int8", _T: "int8"}, _INT8),
    ({"generate.memory": ["text-first", "block-offload", "vae-tiling"]}, _TILES),
)


@dataclass(frozen=True)
class CardRow:
    """One way on one card, the first that fits; else the one that needs least."""

    work: str
    """training or sampling."""
    edge_px: int
    card_gb: int
    """As it is sold, taken for so many GiB."""
    verdict: Verdict
    needed_bytes: int
    changes: dict[str, object]
    """Settings that it takes, by dotted name; empty: those given."""
    error: str
    """What it changes."""


def card_rows(transformer: Transformer, stage: str = "dit_stage1") -> Iterator[CardRow]:
    """A row for training and for sampling at every edge on every card.

    Args:
        transformer: shapes and settings; `stage` trains an adapter.
        stage: section of the settings that trains.

    Raises:
        ValueError: the stage trains all weights, for which one card is no question.
    """
    if getattr(transformer.settings, stage).adapter is None:
        raise ValueError(f"{stage}.adapter is null: cards are planned for an adapter")
    for edge in EDGES_PX:
        trained = [
            (_named(changes, stage), error, _training_bytes(transformer, changes, stage, edge))
            for changes, error in _TRAINING
        ]
        sampled = [
            (dict(changes), error, _sampling_bytes(transformer, changes, edge))
            for changes, error in _SAMPLING
        ]
        for work, ways in (("training", trained), ("sampling", sampled)):
            for card in CARDS_GB:
                yield _first_that_fits(work, edge, card, ways)


def _named(changes: Changes, stage: str) -> dict[str, object]:
    return {key if "." in key else f"{stage}.{key}": value for key, value in changes.items()}


def _training_bytes(transformer: Transformer, changes: Changes, stage: str, edge: int) -> int:
    wanted = {f"{stage}.gradient_checkpointing": "blocks", f"{stage}.micro_batch_size": 1}
    under = changed(transformer, {**wanted, **_named(changes, stage)})
    assert under is not None
    return stage_memory(stage, under, [(edge, edge)]).gpu_bytes


def _sampling_bytes(transformer: Transformer, changes: Changes, edge: int) -> int:
    under = changed(transformer, {"generate.sizes": [[edge, edge]], **changes})
    assert under is not None
    return stage_memory("generate", under, [(edge, edge)]).gpu_bytes


def _first_that_fits(
    work: str, edge: int, card: int, ways: list[tuple[dict[str, object], str, int]]
) -> CardRow:
    limit = card * GIB
    for wanted in ("fits", "open"):
        for changes, error, needed in ways:
            if verdict_of(needed, 1, limit) == wanted:
                return CardRow(
                    work, edge, card, verdict_of(needed, 1, limit), needed, changes, error
                )
    changes, error, needed = min(ways, key=lambda way: way[2])
    return CardRow(work, edge, card, "does not fit", needed, changes, error)
