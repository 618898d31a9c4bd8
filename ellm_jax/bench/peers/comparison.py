"""Engines in rounds: each started anew, asked every scenario, and ended, ours beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ellm_jax.bench.peers.catalogue import comparable
from ellm_jax.bench.peers.cores import busy_share
from ellm_jax.bench.peers.scenarios import (
    HIGHER_IS_BETTER,
    Answer,
    Scenario,
    median_figures,
    read_answers,
)
from ellm_jax.bench.peers.session import Launch, PeerError, PeerLost, Session

_WARM_SEED = 1
_ASKED_SEED = 2
START = "start"
"""The stage before the scenarios, among the names of those that failed."""


@dataclass
class Run:
    """What an engine did between one start and its end.

    Attributes:
        round: from 1.
        beside: the engine that ours was measured beside; None for others, and where ours ran once
            for all of a round.
        figures: by key; those of what failed are missing.
        first_tokens: of each request, by scenario.
        busy_before: the share of the cores that others kept busy just before.
    """

    round: int
    beside: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)
    busy_before: float = 0.0


@dataclass
class EngineRuns:
    """All that is known of an engine.

    Attributes:
        versions: of its packages.
        precision: what it really computes in.
        runs: in the order of their starts.
        failures: why, by what failed: `START`, or a scenario. Neither is tried again.
    """

    versions: dict[str, str] = field(default_factory=dict)
    precision: str = ""
    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def median(self) -> dict[str, float]:
        """Each figure's median over the runs that have it."""
        keys = dict.fromkeys(key for run in self.runs for key in run.figures)
        return {
            key: statistics.median(r.figures[key] for r in self.runs if key in r.figures)
            for key in keys
        }


@dataclass(frozen=True)
class Rules:
    """How engines are measured.

    Attributes:
        scenarios: what each is asked.
        rounds: how often.
        vocab_size: of the model, for random tokens.
        seed: of these; an engine gets the same as the others of its round.
        timeout_s: most seconds for one answer, loading included.
        ours_each: ours runs beside each other engine, not once a round.
        cores: that the engines run on; whether others use them is noted.
    """

    scenarios: Sequence[Scenario]
    rounds: int
    vocab_size: int
    seed: int = 0
    timeout_s: float = 600.0
    ours_each: bool = True
    cores: Sequence[int] = ()


def compare(
    ours: Launch, peers: Sequence[Launch], rules: Rules, tell: Callable[[str], None]
) -> dict[str, EngineRuns]:
    """Runs every engine in every round; what fails is noted, and the others go on. The order turns
    from round to round, so that none always follows the same one.

    Args:
        ours: our own engine.
        peers: the others.
        rules: how they are measured.
        tell: is told what comes next.
    """
    found = {launch.name: EngineRuns() for launch in (ours, *peers)}
    for number in range(1, rules.rounds + 1):
        for launch, beside in _order(ours, peers, number, rules.ours_each):
            engine = found[launch.name]
            if START in engine.failures:
                continue
            tell(f"round {number} of {rules.rounds}: {launch.name}")
            run = Run(number, beside, busy_before=busy_share(rules.cores))
            fresh = not engine.runs
            engine.runs.append(run)
            _Measurement(launch, rules, engine, run, tell).measure(fresh)
    return found


def _order(
    ours: Launch, peers: Sequence[Launch], number: int, ours_each: bool
) -> Iterable[tuple[Launch, str | None]]:
    """The engines of a round, each with what ours runs beside."""
    turn = (number - 1) % max(1, len(peers))
    turned = [*peers[turn:], *peers[:turn]]
    if not ours_each or not peers:
        both: list[tuple[Launch, str | None]] = [(peer, None) for peer in turned]
        place = 0 if number % 2 else len(both)
        return [*both[:place], (ours, None), *both[place:]]
    pairs: list[tuple[Launch, str | None]] = []
    for peer in turned:
        pair: list[tuple[Launch, str | None]] = [(ours, peer.name), (peer, None)]
        pairs += pair if number % 2 else pair[::-1]
    return pairs


class _Measurement:
    """One engine's part of a round."""

    def __init__(
        self,
        launch: Launch,
        rules: Rules,
        engine: EngineRuns,
        run: Run,
        tell: Callable[[str], None],
    ):
        self._launch, self._rules, self._engine = launch, rules, engine
        self._run, self._tell = run, tell
        self._peak_key = "peak_memory_gib"

    def measure(self, fresh: bool) -> None:
        """Asks every scenario that has not failed before. An engine that is lost with one of them
        is started again for the rest. Fresh, its caches are empty: then its start and its peak,
        which compiling may be, are figures of their own."""
        self._peak_key = "first_peak_memory_gib" if fresh else "peak_memory_gib"
        todo = [s for s in self._rules.scenarios if s.name not in self._engine.failures]
        start_key = "first_start_s" if fresh else "start_s"
        while True:
            try:
                with Session(self._launch) as session:
                    self._start(session, start_key)
                    start_key = ""
                    while todo and self._ask(session, todo.pop(0)):
                        pass
            except PeerError as error:
                self._fail(START, error)
                return
            if not todo:
                return

    def _start(self, session: Session, start_key: str) -> None:
        """From nothing to the first token; then whatever it compiles ahead."""
        rules = self._rules
        loaded = session.ask({"do": "load", **self._launch.settings}, rules.timeout_s)
        self._engine.versions = _texts(loaded.get("versions"))
        self._engine.precision = str(loaded.get("precision", "unknown"))
        first = rules.scenarios[0]
        asked = first.requests(rules.vocab_size, (rules.seed, _WARM_SEED, self._run.round))
        asked["output_tokens"] = [1] * len(first.lengths)
        self._answers(session, asked, [(prompt, 1) for prompt, _ in first.lengths])
        if start_key:
            self._run.figures[start_key] = time.monotonic() - session.started_s
        session.ask({"do": "warm_up"}, rules.timeout_s)
        self._note_peak(session)

    def _ask(self, session: Session, scenario: Scenario) -> bool:
        """Measures a scenario; whether the engine can be asked further."""
        rules = self._rules
        samples, tokens = [], []
        try:
            warm_up = scenario.warm_up(rules.vocab_size, (rules.seed, _WARM_SEED))
            session.ask(warm_up, rules.timeout_s)
            for sample in range(scenario.samples):
                seed = (rules.seed, _ASKED_SEED, self._run.round, sample)
                asked = scenario.requests(rules.vocab_size, seed)
                answers = self._answers(session, asked, scenario.lengths)
                samples.append(scenario.figures(answers))
                tokens += [answer.tokens[0] for answer in answers]
        except PeerLost as error:
            self._fail(scenario.name, error)
            return False
        except PeerError as error:
            self._fail(scenario.name, error)
        else:
            self._run.figures |= median_figures(samples)
            self._run.first_tokens[scenario.name] = tokens
        self._note_peak(session)
        return True

    def _answers(
        self, session: Session, asked: dict[str, Any], lengths: Sequence[tuple[int, int]]
    ) -> list[Answer]:
        begin_s = time.monotonic()
        answer = session.ask(asked, self._rules.timeout_s)
        return read_answers(answer, tuple(lengths), time.monotonic() - begin_s)

    def _note_peak(self, session: Session) -> None:
        peak_gib = session.peak_bytes / 2**30
        figures, key = self._run.figures, self._peak_key
        figures[key] = max(peak_gib, figures.get(key, 0.0))

    def _fail(self, stage: str, error: PeerError) -> None:
        self._engine.failures[stage] = str(error)
        self._tell(f"{self._launch.name}: {stage} failed: {error}")


def _texts(found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def ratios(found: dict[str, EngineRuns], ours: str, peer: str) -> dict[str, float]:
    """How many times better ours is, by figure: the median over rounds, each of the two runs that
    lay side by side."""
    by_figure: dict[str, list[float]] = {}
    for run, own in _pairs(found, ours, peer):
        for key in run.figures.keys() & own.figures.keys():
            mine, theirs = own.figures[key], run.figures[key]
            better = mine / theirs if key in HIGHER_IS_BETTER else theirs / mine
            by_figure.setdefault(key, []).append(better)
    return {key: statistics.median(values) for key, values in by_figure.items()}


def agreement(found: dict[str, EngineRuns], ours: str, peer: str) -> tuple[int, int]:
    """Of how many answers the first token is the same as ours, and how many there are. It shows
    whether both run the same model; rounding alone makes a few differ."""
    same = total = 0
    for run, own in _pairs(found, ours, peer):
        for scenario in run.first_tokens.keys() & own.first_tokens.keys():
            for one, other in zip(
                run.first_tokens[scenario], own.first_tokens[scenario], strict=True
            ):
                same += one == other
                total += 1
    return same, total


def _pairs(found: dict[str, EngineRuns], ours: str, peer: str) -> list[tuple[Run, Run]]:
    return [
        (run, own)
        for run in found[peer].runs
        for own in found[ours].runs
        if own.round == run.round and own.beside in (peer, None)
    ]


def best_of(found: dict[str, EngineRuns], ours: str) -> dict[str, str]:
    """Of each figure, the engine that does best among the others at our precision."""
    best: dict[str, str] = {}
    for name, engine in found.items():
        if name == ours or not comparable(engine.precision, found[ours].precision):
            continue
        for key, value in engine.median.items():
            sign = 1 if key in HIGHER_IS_BETTER else -1
            if key not in best or sign * value > sign * found[best[key]].median[key]:
                best[key] = name
    return best
