"""A drill: rounds of a pipeline under faults, each compared with the run that nobody disturbed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from flows.experiments.chaos.faults import Draw, Fault, bring_back, inflict
from flows.experiments.chaos.site import Site, last_error, made_anew, output_hashes
from flows.experiments.chaos.victims import SERVERS, Victim, marked, victims
from flows.records.owners import ownerless_flow_runs
from flows.records.records import all_records
from flows.services.servers import free_port, services_dir
from flows.services.workers import running_workers

Engine = Literal["local", "prefect", "pools"]
FAULTS_A_ROUND = 40
"""Then a round is left alone, so that it comes to its end."""
START_LASTS_S = 1800.0
"""A start of the pipeline that lasts longer hangs."""
REPAIR_AFTER_S = 3.0
MOST_PROBLEMS = 20
GOING_S = 30.0
"""For processes that end by themselves once nobody needs them."""
_POLL_S, _LOOK_S = 0.05, 0.5
_EARLY = 0.2
_AT_WORK = {"dvc", "stage", "remote stage"}
_DRAWN = re.compile(r"[0-9a-f]{8,}|\d+")
"""Parts of names that differ from run to run: ids, times, process numbers."""


@dataclass
class Report:
    """What a drill found."""

    faults: list[Fault] = field(default_factory=list)
    rounds: int = 0
    starts: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> str:
        """Markdown: a row per kind of fault."""
        lines = ["| fault | times | what the run said, and how often |", "|---|---:|---|"]
        for kind, count in Counter(fault.kind for fault in self.faults).most_common():
            said = Counter(_shape(f.said) for f in self.faults if f.kind == kind).most_common(3)
            words = "; ".join(f"{text} ({times})" for text, times in said)
            lines.append(f"| {kind} | {count} | {words.replace('|', '/')} |")
        return "\n".join(lines)


def _shape(said: str) -> str:
    return _DRAWN.sub("#", re.sub(r"(?<![\w.])/\S+/", "", said))[:110]


class Drill:
    """Disturbs the pipeline of one site."""

    def __init__(
        self,
        site: Site,
        draws: Iterator[Draw],
        *,
        lasts_s: float,
        most_faults: int,
        served: bool,
        say: Callable[[str], None],
        within: Collection[str] = (),
    ) -> None:
        """Prepare.

        Args:
            site: the clones.
            draws: the schedule.
            lasts_s: for how long faults are sent; the last round then comes to its end alone.
            most_faults: likewise, by their number.
            served: servers on PostgreSQL instead of SQLite.
            say: told a line per fault and round.
            within: stages; faults are sent only while one of them is at work; none: at any time.
        """
        self.site, self._draws, self._say = site, draws, say
        self._within = {f"stage {name}" for name in within}
        self._lasts_s, self._most, self._served = lasts_s, most_faults, served
        self._begun = time.monotonic()
        self.report = Report()
        self._until = 0.0
        self._right: dict[str, str] = {}
        self._files: set[str] = set()
        self._back_at: float | None = None
        self._repair_at: float | None = None
        self._up = False
        self._clients: dict[str, str] = {}
        """How the workers' clone finds the servers."""

    def run(self, engines: Sequence[Engine]) -> Report:
        """The undisturbed run, then rounds until time or faults are used up.

        Raises:
            ChaosRefused: the undisturbed run fails, or servers cannot be started.
        """
        site = self.site
        try:
            self._say("undisturbed run")
            site.must(site.undisturbed, "ultraflux", "run", "--no-rehearsal")
            self.learn_what_is_right()
            self._until = time.monotonic() + self._lasts_s
            while self.report.rounds == 0 or not self._is_over():
                engine = engines[self.report.rounds % len(engines)]
                self._round(engine)
                self.report.rounds += 1
                if len(self.report.problems) >= MOST_PROBLEMS:
                    break
        finally:
            self._end()
        self.report.seconds = time.monotonic() - self._begun
        return self.report

    def learn_what_is_right(self) -> None:
        """Take hashes and files of the undisturbed clone for those that must come out."""
        self._right = output_hashes(self.site.undisturbed)
        self._files = _names(self.site.undisturbed)
        # What the undisturbed run leaves in TMPDIR is not the faults' doing.
        _emptied(self.site.temporary)

    def _is_over(self) -> bool:
        return time.monotonic() >= self._until or len(self.report.faults) >= self._most

    def _round(self, engine: Engine) -> None:
        """One pipeline, started again until it ends well, then looked at."""
        site, before, known = self.site, len(self.report.faults), len(self.report.problems)
        made_anew(site.disturbed)
        self._servers(engine)
        unexplained = 0
        while True:
            if self._repair_at is not None and unexplained:
                # Whoever reads what the run said does as it says.
                self._repair(engine)
            code, injected, said = self._start(engine, before)
            if code == 0:
                break
            if not injected:
                unexplained += 1
                self._say(f"  ended with {code} although nothing was done to it: {said}")
            if unexplained == 3:
                self._problem(f"{engine}: three undisturbed starts failed: {said}")
                break
        self._remote_back()
        self._repair(engine)
        self.look(engine)
        faults = len(self.report.faults) - before
        self._say(
            f"round {self.report.rounds + 1} ({engine}): {faults} faults, "
            + ("; ".join(self.report.problems[known:]) or "every hash as undisturbed")
        )

    def _start(self, engine: Engine, round_began: int) -> tuple[int, bool, str]:
        """One start of the pipeline, disturbed; exit code, whether it was, its last words."""
        site = self.site
        command = ["ultraflux", "run", "--no-rehearsal"]
        command += [] if engine == "local" else ["--engine", engine]
        command += ["--remote-data"] if engine == "pools" else []
        log = site.folder / "logs" / f"start-{self.report.starts:04d}.log"
        log.parent.mkdir(exist_ok=True)
        self.report.starts += 1
        mine: list[Fault] = []
        # The fault of an earlier start: this one may refuse to begin.
        is_away = self._back_at is not None
        begun = time.monotonic()
        with log.open("wb") as output:
            run = site.start(site.disturbed, command, output)
        draw = next(self._draws)
        # One start in five is disturbed from its first moment on, the others once a stage is at
        # work: a start takes longer than many stages, and would get most of the faults.
        due = begun + draw.wait_s if draw.choice < _EARLY and not self._within else None
        looked = begun
        try:
            while run.poll() is None:
                now = time.monotonic()
                self._mend(engine, now)
                if (due is None or self._within) and now - looked > _LOOK_S:
                    looked, at_work = now, self._is_at_work()
                    due = (due or now + draw.wait_s) if at_work else None
                open_ = (
                    len(self.report.faults) - round_began < FAULTS_A_ROUND and not self._is_over()
                )
                if open_ and due is not None and now >= due:
                    if (fault := self._inflict(draw, engine)) is not None:
                        mine.append(fault)
                    draw = next(self._draws)
                    due = now + draw.wait_s
                if now - begun > START_LASTS_S:
                    self._problem(f"{engine}: a start hung for {START_LASTS_S:.0f} s ({log})")
                    run.kill()
                time.sleep(_POLL_S)
        finally:
            # Whoever ends the drill ends its run, too.
            if run.poll() is None:
                run.kill()
        text = log.read_text(errors="replace")
        said = last_error(text) if run.returncode > 0 else "went on"
        if run.returncode < 0:
            said = "nothing: it was killed"
        if "Traceback (most recent call last)" in text:
            self._problem(f"{engine}: a traceback in {log}")
        for fault in mine:
            fault.said = said
            self._note(fault)
        return run.returncode, bool(mine) or is_away, said

    def _is_at_work(self) -> bool:
        """Whether there is a stage at work, or one of those that faults are for."""
        alive = self._victims()
        if self._within:
            return any(one.name in self._within for one in alive)
        return any(one.kind in _AT_WORK for one in alive)

    def _inflict(self, draw: Draw, engine: Engine) -> Fault | None:
        site = self.site
        done = inflict(draw, self._victims(), site.remote if engine == "pools" else None)
        if done is None:
            return None
        kind, victim, away_s = done
        now = time.monotonic()
        if away_s:
            self._back_at = now + away_s
        if kind in SERVERS or kind == "worker":
            self._repair_at = self._repair_at or now + REPAIR_AFTER_S
        what = f"{away_s:.0f} s" if victim is None else victim.name
        pid = None if victim is None else victim.process.pid
        fault = Fault(round(now - self._begun, 1), kind, pid, what, engine)
        self.report.faults.append(fault)
        return fault

    def _victims(self) -> list[Victim]:
        return victims(self.site.token, self._clones())

    def _note(self, fault: Fault) -> None:
        with (self.site.folder / "faults.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(fault.as_dict()) + "\n")
        self._say(
            f"  {fault.at_s:7.1f} s  {fault.kind}  {fault.what}"
            f"{f' (process {fault.pid})' if fault.pid else ''}: {fault.said}"
        )

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)

    def _clones(self) -> list[Path]:
        return [path for path in (self.site.disturbed, self.site.worker) if path.is_dir()]

    # What a person, or the machine's supervisor, does beside a run.

    def _mend(self, engine: Engine, now: float) -> None:
        if self._back_at is not None and now >= self._back_at:
            self._remote_back()
        if self._repair_at is not None and now >= self._repair_at:
            self._repair(engine)

    def _remote_back(self) -> None:
        self._back_at = None
        bring_back(self.site.remote)

    def _repair(self, engine: Engine) -> None:
        """Start what was killed of servers and workers, as one types it."""
        self._repair_at = None
        if self._up:
            self._typed(self.site.disturbed, "ultraflux", "up")
            if engine == "pools":
                self._workers()

    def _typed(self, clone: Path, *command: str) -> None:
        """A command that has to work, also beside faults; the second time at the latest."""
        for _ in range(2):
            done = self.site.run(clone, *command)
            if done.returncode == 0:
                return
        self._problem(f"{' '.join(command)}: {last_error(done.stdout + done.stderr)}")

    def _servers(self, engine: Engine) -> None:
        site = self.site
        wanted = engine == "pools" or (engine == "prefect" and self._served)
        if wanted and not self._up:
            ports = [
                *("--prefect-port", str(free_port()), "--mlflow-port", str(free_port())),
                *(["--served"] if self._served else []),
            ]
            site.must(site.disturbed, "ultraflux", "up", *ports)
            clients = (services_dir(site.disturbed) / "clients.env").read_text().split()
            said = dict(line.split("=", 1) for line in clients)
            # The clone knows its own servers; the project's name is for the workers' clone.
            site.shared["ULTRAFLUX_PROJECT"] = said["ULTRAFLUX_PROJECT"]
            self._clients = {k: v for k, v in said.items() if not k.startswith("MLFLOW_")}
            self._up = True
        if engine == "pools":
            if not site.worker.is_dir():
                subprocess.run(
                    ["git", "clone", "-q", str(site.folder / "origin"), str(site.worker)],
                    check=True,
                )
            made_anew(site.worker)
            self._workers()

    def _workers(self) -> None:
        site = self.site
        beside = Site(site.folder, site.token, site.shared | self._clients)
        command = ["ultraflux", "deploy", "--workers", "--limit", "1"]
        done = beside.run(site.worker, *command)
        if done.returncode:
            done = beside.run(site.worker, *command)
        if done.returncode:
            self._problem(f"{' '.join(command)}: {last_error(done.stdout + done.stderr)}")

    # What must hold after a round, and at the end.

    def look(self, engine: Engine) -> None:
        """Note every way in which the disturbed clone is not as the undisturbed one."""
        site = self.site
        self._typed(site.disturbed, "ultraflux", "sync")
        listed = json.loads(site.must(site.disturbed, "ultraflux", "clean", "--json"))
        states = json.loads(site.must(site.disturbed, "ultraflux", "stage", "states", "--json"))
        found = [*self.other_hashes(), *self.open_runs(engine)]
        if left := self.left_running():
            found.append(f"left running: {', '.join(left)}")
        left = self.left_on_disk(
            [one["path"] for one in listed], [f"runs/{one['state']}" for one in states]
        )
        if left:
            names = site.folder / "logs" / f"left-on-disk-{self.report.rounds + 1}.txt"
            names.write_text("\n".join(left) + "\n", encoding="utf-8")
            found.append(f"left on disk: {', '.join(left[:5])} ({len(left)} in all, {names})")
        for problem in found:
            self._problem(f"{engine}: {problem}")

    def other_hashes(self) -> list[str]:
        """Outputs that are not those of the undisturbed run."""
        right, found = self._right, output_hashes(self.site.disturbed)
        return [
            f"{path} has {found.get(path)}, undisturbed {right.get(path)}"
            for path in sorted({*right, *found})
            if right.get(path) != found.get(path)
        ]

    def open_runs(self, engine: Engine) -> list[str]:
        """Runs that read as running, although nothing runs."""
        clone = self.site.disturbed
        records = [r for r in all_records(clone) if r.result is None]
        found = [f"{r.run.name} reads as running ({r.record_id})" for r in records]
        # Other engines have no server that could be told.
        flow_runs = ownerless_flow_runs(clone) if engine == "prefect" else ()
        return found + [f"flow run {one} has no owner and no end" for one, _ in flow_runs]

    def left_running(self) -> list[str]:
        """Processes that are neither servers nor workers, after a while."""
        kept = set()
        if self._up:
            for process in marked("", self._clones()):
                kept.add(process.pid)
            for clone in self._clones():
                for worker in running_workers(clone):
                    kept.add(worker.pid)
        return self._gone(kept)

    def _gone(self, kept: set[int]) -> list[str]:
        deadline = time.monotonic() + GOING_S
        while True:
            left = []
            for process in marked(self.site.token, self._clones()):
                try:
                    above = {process.pid, *(parent.pid for parent in process.parents())}
                    if not above & kept:
                        left.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
                except psutil.Error:
                    continue
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)

    def left_on_disk(self, listed: Sequence[str], states: Sequence[str]) -> list[str]:
        """Files that the undisturbed clone does not have and that no command lists.

        Args:
            listed: paths that `ultraflux clean` lists.
            states: folders of the training states that `ultraflux stage states` lists.
        """
        site, prefixes = self.site, tuple(listed)
        left = {
            name
            for name, path in _names_and_paths(site.disturbed)
            if name not in self._files
            and not path.startswith(prefixes or ("\0",))
            and not _is_log_of_a_start(path, states)
        }
        return sorted(left) + [f"TMPDIR/{name}" for name in _emptied(site.temporary)]

    def _end(self) -> None:
        """Stop everything that the drill started, whatever happened."""
        site = self.site
        self._remote_back()
        if site.worker.is_dir():
            from flows.services.workers import stop_workers

            stop_workers(site.worker)
        if self._up:
            site.run(site.disturbed, "ultraflux", "down")
        if left := self._gone(set()):
            self._problem(f"left running at the end: {', '.join(left)}")
        for process in marked(site.token, []):
            process.kill()


def _emptied(folder: Path) -> list[str]:
    """Names of what stood in a folder."""
    found = sorted(folder.iterdir())
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    return [path.name for path in found]


_KEPT = (
    "runs/records/",
    "runs/logs/",
    "runs/services/",
    "runs/flow-runs/",
    ".git/",
    ".dvc/tmp/",
    ".dvc/config.local",
)
"""What stays by intent: records, logs, databases; what Git and DVC keep for themselves, and the
remote that `--remote-data` wrote there."""

_OF_STARTS = re.compile(r"(runs/[^/]+/[^/]+)/(ranks/.+|restarts\.jsonl)")
"""Logs of a training state: a folder a start of torchrun, a line a restart of its ranks."""


def _is_log_of_a_start(path: str, states: Sequence[str]) -> bool:
    """Whether a file is one that a state keeps for as long as it is kept itself."""
    found = _OF_STARTS.fullmatch(path)
    return found is not None and found[1] in states


def _names_and_paths(clone: Path) -> Iterator[tuple[str, str]]:
    """Files of a clone: names without what is drawn anew for each run, and paths."""
    for path in clone.rglob("*"):
        place = path.relative_to(clone).as_posix()
        if path.is_dir() or place.startswith(_KEPT) or "__pycache__" in place:
            continue
        # The cache is named by content: there every digit counts.
        yield (place if place.startswith(".dvc/cache") else _DRAWN.sub("#", place)), place


def _names(clone: Path) -> set[str]:
    return {name for name, _ in _names_and_paths(clone)}
