"""Whether a step's loss and gradient norm are those of a run that still learns.

Both are compared with their own running statistics, in logarithms, since a norm that doubles is as
remarkable at 0.1 as at 10. All of it is arithmetic on numbers that are the same on every rank and
in every replay, and it is saved with each checkpoint: a run that was killed finds the same events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from components.files.whole_files import write_text
from components.settings.training import DivergenceSettings

EVENTS_FILE = "divergences.json"
"""In a state's folder: what the guard has done so far."""
# In logarithms. A steady run has a deviation near zero, and 8 of them would be no spike.
_LEAST_DEVIATION = 0.1
# Of `sigmas`: above it a step counts as elevated, and a checkpoint made then is not healthy.
_ELEVATED = 0.5
# So many ordinary steps end an elevation.
_CALM_STEPS = 10


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite, or far above its mean; names the step and its batch."""


@dataclass(frozen=True)
class DivergenceEvent:
    """A step whose update was refused, and what was done."""

    step: int
    """Of the refused update; 0 is the first. Files and people count from 1."""
    action: str
    """`skip` or `rollback`."""
    reason: str
    """One line."""
    back_to: int
    """Steps done when training went on: `step` + 1 for a skip."""
    left_out: tuple[int, int]
    """First and last step whose batches are not trained on."""

    def __str__(self) -> str:
        """One line for people."""
        first, last = (step + 1 for step in self.left_out)
        which = f"step {first}" if first == last else f"steps {first} to {last}"
        then = f"back to step {self.back_to}, " if self.action == "rollback" else ""
        return f"step {self.step + 1}: {self.reason}; {then}{which} left out"


@dataclass
class _Running:
    """Exponential mean and variance of the logarithms of one number."""

    mean: float = 0.0
    variance: float = 0.0

    def deviations(self, value: float) -> float:
        """How many deviations `value` lies above the mean."""
        spread = max(math.sqrt(self.variance), _LEAST_DEVIATION)
        return (math.log(max(value, 1e-30)) - self.mean) / spread

    def add(self, value: float, weight: float) -> None:
        """Take in `value`; with weights 1/n these are the plain mean and variance."""
        away = math.log(max(value, 1e-30)) - self.mean
        self.mean += weight * away
        self.variance = (1.0 - weight) * (self.variance + weight * away * away)


class DivergenceGuard:
    """Statistics of accepted steps, and the events so far."""

    def __init__(self, settings: DivergenceSettings, begun_at: int = 0) -> None:
        """Nothing is known yet.

        Args:
            settings: of the stage.
            begun_at: steps done when the newest segment began, whose checkpoint is there.
        """
        self.settings = settings
        self._begun_at = begun_at
        self.events: list[DivergenceEvent] = []
        self._accepted = 0
        self._running = {"loss": _Running(), "gradient norm": _Running()}
        self._elevated_at: int | None = None

    def judge(self, loss: float, norm: float) -> str | None:
        """Why an update must not happen; None: it may.

        Args:
            loss: mean over the global batch.
            norm: of the gradient, before clipping.
        """
        for (name, running), value in self._values(loss, norm):
            if not math.isfinite(value):
                return f"{name} is not finite"
            above = self._above(running, value)
            if self.settings.sigmas is not None and above > self.settings.sigmas:
                usual = math.exp(running.mean)
                return (
                    f"{name} {value:.4g} is {above:.1f} deviations above its running mean "
                    f"{usual:.4g}"
                )
        return None

    def accept(self, step: int, loss: float, norm: float) -> None:
        """Take in the numbers of an update that happened.

        Args:
            step: 0 is the first.
            loss: finite.
            norm: finite.
        """
        limit = self.settings.sigmas
        pairs = list(self._values(loss, norm))
        if limit is not None and any(
            self._above(running, value) > _ELEVATED * limit for (_, running), value in pairs
        ):
            self._elevated_at = step
        self._accepted += 1
        weight = max(1.0 / self._accepted, 1.0 / self.settings.memory_steps)
        for (_, running), value in pairs:
            running.add(value, weight)

    def is_healthy(self, step: int) -> bool:
        """Whether loss and norm were ordinary in the steps before `step` steps were done."""
        return self._elevated_at is None or step - self._elevated_at > _CALM_STEPS

    def leaves_out(self, step: int) -> bool:
        """Whether an event says that the batch of `step` is not trained on."""
        return any(
            event.action == "rollback" and event.left_out[0] <= step <= event.left_out[1]
            for event in self.events
        )

    @property
    def is_exhausted(self) -> bool:
        """Whether no further event is allowed."""
        return len(self.events) >= self.settings.max_events

    @property
    def rate(self) -> float:
        """By what the learning rate is multiplied after the rollbacks so far."""
        backs = sum(event.action == "rollback" for event in self.events)
        return float(self.settings.rollback_rate**backs)

    def skipped(self, step: int, reason: str) -> DivergenceEvent:
        """Note that the batch of `step` is left out."""
        event = DivergenceEvent(step, "skip", reason, step + 1, (step, step))
        self.events.append(event)
        return event

    def rolled_back(self, step: int, reason: str, back_to: int) -> DivergenceEvent:
        """Note a return to `back_to` steps done; the last batches up to `step` are left out."""
        first = max(back_to, step + 1 - self.settings.left_out_steps)
        event = DivergenceEvent(step, "rollback", reason, back_to, (first, step))
        self.events.append(event)
        return event

    def anchor(self, step: int) -> int:
        """To how many steps done a run returns that diverges after `step`; a function of it alone.

        Not the newest checkpoint: signals and clocks make those, and a replay has others.
        """
        every = self.settings.rollback_every
        return max(self._begun_at, (step - self.settings.rollback_margin) // every * every)

    def is_anchor(self, step: int, newest: int) -> bool:
        """Whether the checkpoint after `step` steps may still be returned to from `newest` on."""
        is_one = step == self._begun_at or step % self.settings.rollback_every == 0
        return is_one and step >= self.anchor(newest)

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "accepted": self._accepted,
            "elevated_at": self._elevated_at,
            "running": {name: asdict(running) for name, running in self._running.items()},
            "events": [asdict(event) for event in self.events],
        }

    def restore(self, state: Mapping[str, Any], *, keep_events: bool = False) -> None:
        """Take over what `state` gave.

        Args:
            state: of a checkpoint.
            keep_events: after a rollback, of which the checkpoint does not know.
        """
        self._accepted = int(state["accepted"])
        self._elevated_at = state["elevated_at"]
        self._running = {name: _Running(**values) for name, values in state["running"].items()}
        if not keep_events:
            self.events = [_event(values) for values in state["events"]]

    def _values(self, loss: float, norm: float) -> Any:
        return zip(self._running.items(), (loss, norm), strict=True)

    def _above(self, running: _Running, value: float) -> float:
        # Statistics of a few steps are none.
        if self._accepted < self.settings.warmup_steps:
            return 0.0
        return running.deviations(value)


def _event(values: Mapping[str, Any]) -> DivergenceEvent:
    first, last = values["left_out"]
    return DivergenceEvent(**{**values, "left_out": (int(first), int(last))})


def write_events(state_dir: Path, guard: DivergenceGuard) -> None:
    """Leave the events for whoever reports on the run; steps count from 1, as in all logs."""
    events = [asdict(_shifted(event, 1)) for event in guard.events]
    text = json.dumps({"first_step": 1, "events": events}, indent=1)
    write_text(state_dir / EVENTS_FILE, text + "\n")


def read_events(state_dir: Path) -> tuple[DivergenceEvent, ...]:
    """What `write_events` left."""
    path = state_dir / EVENTS_FILE
    if not path.exists():
        return ()
    left = json.loads(path.read_text(encoding="utf-8"))
    # A bare list is of an unfinished run of before, whose file counted from 0.
    first, events = (0, left) if isinstance(left, list) else (left["first_step"], left["events"])
    return tuple(_shifted(_event(values), -first) for values in events)


def _shifted(event: DivergenceEvent, steps: int) -> DivergenceEvent:
    """With steps counted from another number; `back_to` is how many are done either way."""
    first, last = event.left_out
    return replace(event, step=event.step + steps, left_out=(first + steps, last + steps))


def batch_folder(state_dir: Path, step: int) -> Path:
    """Where the batch of a refused update is kept.

    Args:
        state_dir: of the stage.
        step: 0 is the first; the name counts from 1, as checkpoints and logs do.
    """
    return state_dir / "diverged" / f"step-{step + 1:08d}"
