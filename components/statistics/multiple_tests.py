"""Many tests at once: Holm's correction."""

from __future__ import annotations

from collections.abc import Mapping


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given.

    Rejecting where the adjusted value is at most alpha bounds the chance of any false rejection by
    alpha, whatever the dependence between the tests.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p-value of {name} is {p}: expected a number in [0, 1]")
    adjusted: dict[str, float] = {}
    largest = 0.0
    # Ties need no rule: the running maximum gives equal p-values equal results.
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        # Never below the step before: a test cannot be significant where a clearer one is not.
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
