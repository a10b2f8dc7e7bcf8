"""Money: what a request may cost, what it did cost, and a cap that no run passes."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from components.chat.request_cache import Answer, RequestCache

# Before the first answer says better: a 1024 px picture is 258 to about 1,600 tokens, by model.
_ASSUMED_INPUT_TOKENS = 2000


class CostCapReached(RuntimeError):
    """The next request might pass the cap; one line with what was spent."""


@dataclass(frozen=True)
class Prices:
    """USD per million tokens, and the longest answer."""

    input_usd_per_million: float
    output_usd_per_million: float
    max_tokens: int

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """USD."""
        return (
            input_tokens * self.input_usd_per_million + output_tokens * self.output_usd_per_million
        ) / 1e6


class Budget:
    """A cap over jobs: every request is charged before it is sent, at the most it may cost.

    Without a cap (None) nothing is refused. A job is everything that is asked with one prompt,
    model and set of parameters. What earlier runs spent on the same jobs counts. A request whose
    answer was lost (timeout, kill) keeps its estimate, because it may have been billed.
    """

    def __init__(self, cache: RequestCache, jobs: Sequence[str], cap_usd: float | None) -> None:
        self.cap_usd = math.inf if cap_usd is None else cap_usd
        self._cache = cache
        self._spent = cache.spent(jobs)
        self._open: dict[int, float] = {}
        self._largest_input: dict[str, int] = {}
        self._changed = threading.Condition()

    @property
    def spent_usd(self) -> float:
        """Settled charges, plus the estimates of lost answers."""
        with self._changed:
            return self._spent

    def reserve(self, job: str, prices: Prices) -> int:
        """Charge the most that one more request may cost; waits while open ones might free room.

        Raises:
            CostCapReached: it might pass the cap.
        """
        with self._changed:
            while True:
                tokens = self._largest_input.get(job, _ASSUMED_INPUT_TOKENS)
                estimate = prices.of(tokens, prices.max_tokens)
                if self._spent + sum(self._open.values()) + estimate <= self.cap_usd:
                    break
                if not self._open:
                    raise CostCapReached(
                        f"spent ${self._spent:.4f}, and another request might pass "
                        f"caption.max_cost_usd (${self.cap_usd:g}); raise it to go on"
                    )
                self._changed.wait()
            charge = self._cache.charge(job, estimate)
            self._open[charge] = estimate
            return charge

    def release(self, charge: int, *, was_billed: bool) -> None:
        """A request without an answer: its estimate stays when it may have been billed."""
        with self._changed:
            self._close(charge, self._open[charge] if was_billed else 0.0)

    def settle(self, charge: int, job: str, prices: Prices, key: str, answer: Answer) -> None:
        """Put the answer's price in place of the estimate and keep the answer."""
        with self._changed:
            usd = self._open[charge]
            if answer.input_tokens is not None and answer.output_tokens is not None:
                usd = prices.of(answer.input_tokens, answer.output_tokens)
                self._largest_input[job] = max(self._largest_input.get(job, 0), answer.input_tokens)
            self._close(charge, usd, key, answer)

    def _close(
        self, charge: int, usd: float, key: str | None = None, answer: Answer | None = None
    ) -> None:
        try:
            self._cache.settle(charge, usd, key, answer)
        finally:
            del self._open[charge]
            self._spent += usd
            self._changed.notify_all()
