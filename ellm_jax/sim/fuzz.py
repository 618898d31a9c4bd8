"""Runs random worlds and looks at everything after every step.

`run_seed` plays one; a failure says its seed, and playing that again with `--trace` shows each
step that led there.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import sys
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass

from ellm_jax._native import OutOfMemory
from ellm_jax.limits import Limits
from ellm_jax.request import Request, Status
from ellm_jax.scheduler.plan import Plan
from ellm_jax.sim import invariants
from ellm_jax.sim.contents import sampled_token
from ellm_jax.sim.executor import Faults
from ellm_jax.sim.script import Happening, Script, write_script
from ellm_jax.sim.waiting import check_waits
from ellm_jax.sim.world import Hooks, World

_TRACE_SHOWN = 40
_MAX_FAILURES = 3
# Steps per token to generate, and per eight to prefill, before a world counts as stuck.
_STEPS_PER_TOKEN = 3
_STEPS_PER_LOOK = 5


@dataclass(frozen=True)
class Report:
    """How a world ended.

    Attributes:
        seed: it came from.
        steps: calls of the host loop.
        requests: that were taken in.
        endings: how many of them ended in which way.
        moves: memory events by kind.
        time_s: of the fake clock, at the end.
        fingerprint: of the trace; equal seeds give equal ones.
    """

    seed: int
    steps: int
    requests: int
    endings: dict[str, int]
    moves: dict[str, int]
    time_s: float
    fingerprint: int


class SimulationFailed(AssertionError):
    """A world in which something is wrong.

    Attributes:
        seed: it came from.
        trace: the last lines of what happened.
    """

    def __init__(self, seed: int, error: BaseException, trace: list[str]):
        lines = "\n  ".join(trace)
        super().__init__(
            f"seed {seed}: {type(error).__name__}: {error}\n  {lines}\n"
            f"replay: python -m ellm_jax.sim.fuzz --seeds {seed} --trace"
        )
        self.seed = seed
        self.trace = trace


def run_seed(seed: int, *, settle: bool = True, show: bool = False) -> Report:
    """Plays the world of a seed to its end.

    Args:
        seed: of everything that is random.
        settle: wait for the KV cache's own thread, so that the seed gives the same each time.
        show: print the trace while it grows.

    Raises:
        SimulationFailed: something is wrong; with the end of the trace.
    """
    return run_script(write_script(seed), seed, settle=settle, show=show)


def run_script(script: Script, seed: int = 0, *, settle: bool = True, show: bool = False) -> Report:
    """Plays a script; the seed is of the faults. Otherwise as `run_seed`."""
    story = _Story(script, seed, settle, show)
    try:
        return story.play()
    except Exception as error:
        raise SimulationFailed(seed, error, list(story.tail)) from error
    finally:
        story.world.pool.inject_faults(0, 0.0)
        story.world.kv.close()


class _Story:
    """A world while it is played."""

    def __init__(self, script: Script, seed: int, settle: bool, show: bool):
        self._script = script
        self._seed = seed
        self._settle = settle
        self._rng = random.Random(seed ^ 0x5EED)
        self._show = show
        self.tail: deque[str] = deque(maxlen=_TRACE_SHOWN)
        self._fingerprint = 0
        self._steps = 0
        self._requests: list[Request] = []
        self._finished: Counter[Request] = Counter()
        self._rates = {"driver_faults": 0.0, "step_faults": 0.0, "copy_faults": 0.0}
        self._ever_faulty = False
        self._excused: set[Request] = set()
        self._failed_steps: Counter[Request] = Counter()
        self._restricted: list[tuple[float, float]] = []  # when not everything could run
        self._restricted_since: float | None = None
        faults = Faults(self._step_fails, self._on_broken, self._is_spoiled)
        hooks = Hooks(
            on_finish=self._on_finish,
            faults=faults,
            copy_fails=lambda: self._rng.random() < self._rates["copy_faults"],
            look_at_contents=True,
            settle=settle,
            trace=self._trace,
        )
        self.world = World(script.config, hooks)
        config = script.config
        self._trace(
            f"{config.policy}: {config.device_bytes} + {config.host_bytes} bytes, slots of "
            f"{config.layout.max_tokens} tokens in tiles of {config.layout.tile_tokens}"
        )

    # What the world asks.

    def _trace(self, line: str) -> None:
        now = self.world.clock() if hasattr(self, "world") else 0.0
        line = f"{now:.6f} {line}"
        self.tail.append(line)
        self._fingerprint = zlib.crc32(line.encode(), self._fingerprint)
        if self._show:
            print(line)

    def _step_fails(self, plan: Plan) -> bool:
        fails = self._rng.random() < self._rates["step_faults"]
        fails = fails or any(share.request in self._script.poisoned for share in plan.shares)
        if fails:
            self._blame(plan)
        return fails

    def _blame(self, plan: Plan) -> None:
        for share in plan.shares:
            self._failed_steps[share.request] += 1

    def _on_broken(self, plan: Plan) -> None:
        assert self._ever_faulty, "a slot is broken, and no driver call has failed"
        self._blame(plan)

    def _is_spoiled(self, request: Request) -> bool:
        at = self._script.spoiled.get(request)
        return at is not None and len(request.output_ids) >= at

    def _on_finish(self, request: Request) -> None:
        self._finished[request] += 1
        self._trace(f"{request.id} is over: {request.finish_reason} {request.error or ''}".rstrip())

    # The story.

    def play(self) -> Report:
        """To the end."""
        world, loop = self.world, self.world.loop
        happenings = deque(self._script.happenings)
        idle = 0
        while happenings or loop.busy:
            while happenings and happenings[0].time_s <= world.clock():
                self._happen(happenings.popleft())
                self._check()
            if loop.busy and not loop.asleep:
                self._steps += 1
                if world.step():
                    idle = 0
                    self._check()
                    continue
                self._check()
                idle += 1
                assert idle < 3 or self._is_restricted, "nothing goes on, and there is no reason"
            if happenings:
                world.clock.wait_until(happenings[0].time_s)
            assert self._steps < self._most_steps(), "many steps, and no end"
        invariants.check_empty(world)
        self._check_ends()
        check_waits(self._requests, world.config, self._restricted, self._failed_steps)
        return Report(
            self._seed,
            self._steps,
            len(self._requests),
            dict(Counter(str(request.finish_reason) for request in self._requests)),
            {kind: count for kind, (count, _) in world.events.totals().items()},
            world.clock(),
            self._fingerprint,
        )

    def _happen(self, what: Happening) -> None:
        world, loop = self.world, self.world.loop
        name = "" if what.request is None else f" {what.request.id}"
        self._trace(f"{what.kind}{name} {what.amount:g}")
        if what.request is not None:
            self._happen_to(what.request, what.kind)
        elif what.kind == "resize":
            refusal = RuntimeError if self._rates["driver_faults"] else OutOfMemory
            with contextlib.suppress(refusal):
                Limits(loop).resize(int(what.amount))
        elif what.kind == "resize_host":
            if world.host is not None:
                Limits(loop).resize_host(int(what.amount))
        elif what.kind == "sleep":
            Limits(loop).sleep()
        elif what.kind == "wake":
            with contextlib.suppress(OutOfMemory):
                Limits(loop).wake()
        else:
            self._rates[what.kind] = what.amount
            if what.kind == "driver_faults":
                self._ever_faulty = True
                world.pool.inject_faults(self._rng.getrandbits(63), what.amount)
        self._note_restriction()
        if self._rates["driver_faults"]:
            self._excused.update(r for r in self._requests if r.status is not Status.FINISHED)

    def _happen_to(self, request: Request, kind: str) -> None:
        if kind == "abort":
            if request in self._requests:
                self.world.loop.abort(request)
        elif self._could_ever_run(request):
            self._requests.append(request)
            self.world.loop.submit(request)

    def _could_ever_run(self, request: Request) -> bool:
        """Whether an engine with the limit of the start takes it in."""
        now = self.world.ledger.usage()["limit"]
        raised_by = self._script.config.device_bytes - now
        ledger = self.world.ledger
        scheduler = self.world.loop.scheduler
        if raised_by <= 0 or scheduler.could_run(request):
            return scheduler.could_run(request)
        chunks = ledger.chunks_for(request.max_total_tokens + 1)
        return chunks * ledger.chunk_bytes < raised_by

    @property
    def _is_restricted(self) -> bool:
        return self._restricted_since is not None

    def _note_restriction(self) -> None:
        """Keeps account of when the world is asleep, or smaller than at its start."""
        limit = self.world.ledger.usage()["limit"]
        restricted = (
            self.world.loop.asleep
            or limit < self._script.config.device_bytes
            or any(self._rates.values())
        )
        now = self.world.clock()
        if restricted and self._restricted_since is None:
            self._restricted_since = now
        elif not restricted and self._restricted_since is not None:
            self._restricted.append((self._restricted_since, now))
            self._restricted_since = None

    def _check(self) -> None:
        # What is still being mapped is counted but cannot be seen; so that it happens across steps
        # too, it is waited for now and then only.
        if self._settle or self._steps % _STEPS_PER_LOOK == 0:
            self.world.kv.settle()
            invariants.check_memory(self.world, self._requests)
        invariants.check_queues(self.world, self._requests)
        for request in self._requests:
            over = request.status is Status.FINISHED
            assert self._finished[request] == over, f"{request.id} ended twice, or in silence"

    def _most_steps(self) -> int:
        work = sum(len(r.prompt_ids) // 8 + r.max_tokens for r in self._requests)
        return 1000 + _STEPS_PER_TOKEN * work

    def _check_ends(self) -> None:
        for request in self._requests:
            expected = [
                sampled_token(request.seed, index, self._script.config.vocab_size)
                for index in range(request.max_tokens)
            ]
            stop = next((i for i, token in enumerate(expected) if token in request.stop_ids), None)
            whole = expected if stop is None else expected[: stop + 1]
            where = f"{request.id} ended by {request.finish_reason}"
            if request.finish_reason in ("stop", "length"):
                assert request.output_ids == whole, f"{where} with other tokens than it should"
            else:
                assert request.output_ids == whole[: len(request.output_ids)], f"{where}: tokens"
            if request.finish_reason == "error":
                spoiled = request in self._script.spoiled
                blamed = self._failed_steps[request] >= _MAX_FAILURES
                assert spoiled or blamed or request in self._excused, f"{where}: {request.error}"


def main() -> int:
    """Plays a range of seeds and says what came of it; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description="Plays random worlds.")
    parser.add_argument("--seeds", default="0:1000", help="FIRST:END, or one seed")
    parser.add_argument("--trace", action="store_true", help="print what happens")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # of the faults that are injected
    first, _, end = args.seeds.partition(":")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    begin_s = time.perf_counter()
    steps, failed = 0, []
    endings: Counter[str] = Counter()
    moves: Counter[str] = Counter()
    for seed in seeds:
        try:
            report = run_seed(seed, show=args.trace)
        except SimulationFailed as failure:
            print(failure, file=sys.stderr)
            failed.append(seed)
            if not args.keep_going:
                break
        else:
            steps += report.steps
            endings.update(report.endings)
            moves.update(report.moves)
    spent_s = time.perf_counter() - begin_s
    print(
        f"{len(seeds)} seeds, {steps} steps in {spent_s:.1f} s ({steps / spent_s:.0f} per second)"
    )
    print(f"endings: {dict(endings)}\nmoves: {dict(moves)}\nfailed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
