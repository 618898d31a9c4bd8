"""A whole engine without a device, put together from its real parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ellm_jax._native import KvCache, KvLayout, OutOfMemory, Pool
from ellm_jax.config import format_bytes
from ellm_jax.host_loop import HostLoop
from ellm_jax.memory.balloon import HeapBalloon
from ellm_jax.memory.events import EventKind, EventLog
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.request import Request
from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.shapes import StepMode
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.policy import POLICIES, Sizes
from ellm_jax.scheduler.slo import SloBuffer
from ellm_jax.sim.clock import FakeClock
from ellm_jax.sim.contents import Contents
from ellm_jax.sim.copies import SimBuffer, SimCopier
from ellm_jax.sim.executor import Faults, SimExecutor
from ellm_jax.sim.steps import NeedModel, SimSteps

_SMALLEST_SHARE_TOKENS = 256
"""Of host memory, whatever the targets say."""


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made of.

    Attributes:
        layout: of the KV cache: a slot per request that runs.
        device_bytes: the one limit.
        weights_bytes: of the model.
        need: what steps take.
        cost: how long steps and copies really take.
        policy: a name of `POLICIES`.
        host_bytes: host memory; 0: none.
        workspace_bytes: the engine's own arrays.
        max_batch_tokens: most tokens of a step, where the user says so.
        retained_bytes: what activations keep at most after a step.
        prefix_caching: keep finished prefixes.
        believed: what the scheduler believes of the cost at first; None: the truth.
        vocab_size: of the tokens that are sampled.
        state_rows: most requests with sampler state that run.
        compile_s: time that a step takes to compile; 0: all are compiled at the start.
        host_step_s: time that the host takes per step, beside the device's.
    """

    layout: KvLayout
    device_bytes: int
    weights_bytes: int
    need: NeedModel
    cost: CostModel
    policy: str = "elastic"
    host_bytes: int = 0
    workspace_bytes: int = 0
    max_batch_tokens: int | None = None
    retained_bytes: int = 0
    prefix_caching: bool = True
    believed: CostModel | None = None
    vocab_size: int = 1000
    state_rows: int = 8
    compile_s: float = 0.0
    host_step_s: float = 5e-5


class TracedEvents(EventLog):
    """An event log that is told aloud."""

    def __init__(self, clock: Callable[[], float], trace: Callable[[str], None]):
        """`trace` takes a line per event."""
        super().__init__(clock)
        self._trace = trace

    def add(
        self,
        kind: EventKind,
        count_bytes: int,
        cause: str,
        begin_s: float,
        request_id: str | None = None,
    ) -> None:
        """As of any event log."""
        super().add(kind, count_bytes, cause, begin_s, request_id)
        self._trace(f"{kind} {count_bytes} bytes: {cause} {request_id or ''}".rstrip())


class SettledKvCache(KvCache):
    """A KV cache whose own thread is always waited for, so that a world goes the same way each
    time."""

    def premap(self, slots: Sequence[int], tokens: Sequence[int]) -> int:
        """As the native one, and mapped when it returns."""
        taken = super().premap(slots, tokens)
        self.settle()
        return taken

    def release_async(self, slot: int) -> None:
        """As the native one, and unmapped when it returns."""
        super().release_async(slot)
        self.settle()


@dataclass(frozen=True)
class Hooks:
    """What a world asks of whoever made it.

    Attributes:
        on_finish: called once per request, when it is over.
        faults: what goes wrong with steps.
        copy_fails: whether the next copy fails.
        look_at_contents: follow what each chunk holds; slower.
        settle: wait for the KV cache's thread after each call that uses it.
        trace: takes a line for each thing that happens; None: nobody listens.
    """

    on_finish: Callable[[Request], None] = lambda request: None
    faults: Faults = field(default_factory=Faults)
    copy_fails: Callable[[], bool] = lambda: False
    look_at_contents: bool = False
    settle: bool = True
    trace: Callable[[str], None] | None = None


class World:
    """The real loop, scheduler, ledger, pool and slots over a fake device, host memory and clock.

    Attributes:
        config: what it is made of.
        clock: its time.
        pool, kv, ledger, events, executor, steps, loop: its parts.
        host, buffer, slo: of the host tier; None without one.
        peaks: most bytes by owner, seen after steps.
    """

    def __init__(self, config: WorldConfig, hooks: Hooks | None = None):
        """Puts it together.

        Raises:
            OutOfMemory: the limit does not hold weights, workspace and what the policy reserves.
        """
        hooks = hooks or Hooks()
        self.config = config
        clock = self.clock = FakeClock()
        layout = config.layout
        rules = POLICIES[config.policy](
            Sizes(layout.max_tokens, layout.num_slots, config.max_batch_tokens)
        )
        buckets = Buckets(layout.num_slots, rules.max_rows)
        steps = self.steps = SimSteps(clock, buckets, config.need, config.compile_s)
        floor = 0
        if rules.reserved_rows:
            floor = steps.need_bytes(rules.reserved_rows, layout.num_slots, StepMode(), True)
        fixed = config.weights_bytes + config.workspace_bytes
        if fixed + floor > config.device_bytes:
            raise OutOfMemory(
                f"it reserves {format_bytes(floor)} for activations beside {format_bytes(fixed)} "
                f"of weights and workspace, and the limit is {format_bytes(config.device_bytes)}; "
                "raise it, or lower the longest request"
            )
        pool = self.pool = Pool.simulated(layout.chunk_bytes, config.device_bytes)
        pool.reserve("weights", config.weights_bytes)
        pool.reserve("workspace", config.workspace_bytes)
        kv = self.kv = (SettledKvCache if hooks.settle else KvCache)(pool, layout)
        events = EventLog(clock) if hooks.trace is None else TracedEvents(clock, hooks.trace)
        self.events = events
        self.ledger = Ledger(
            pool,
            kv,
            events,
            balloon=HeapBalloon(config.retained_bytes, trim=lambda: None),
            prefix_caching=config.prefix_caching,
            floor_bytes=floor,
        )
        believed = config.believed or CostModel.from_dict(config.cost.to_dict())
        contents = Contents(kv, config.vocab_size) if hooks.look_at_contents else None
        self.host: HostTier | None = None
        self.buffer: SimBuffer | None = None
        self.slo: SloBuffer | None = None
        if rules.host_tier:
            self.buffer = SimBuffer(layout.chunk_bytes, config.host_bytes)
            copier = SimCopier(clock, config.cost.copy_bytes_per_s, contents, hooks.copy_fails)
            self.host = HostTier(self.buffer, copier, kv, events, believed.observe_copy)
            share = layout.chunks_for(min(layout.max_tokens, _SMALLEST_SHARE_TOKENS))
            self.slo = SloBuffer(config.host_bytes, share * layout.chunk_bytes)
        scheduler = Scheduler(
            self.ledger,
            steps.need_bytes,
            buckets.rows_below,
            rules,
            believed,
            max_num_seqs=layout.num_slots,
            state_rows=config.state_rows,
            smallest_prefill=buckets.smallest_prefill,
            host=self.host,
            slo=self.slo,
        )
        self.executor = SimExecutor(
            clock,
            config.cost,
            config.vocab_size,
            contents,
            hooks.faults,
            hooks.trace,
            config.state_rows,
            config.weights_bytes,
        )
        self.loop = HostLoop(
            self.executor,
            steps,
            self.ledger,
            scheduler,
            on_token=lambda request: None,
            on_finish=hooks.on_finish,
            host=self.host,
            slo=self.slo,
            clock=clock,
        )
        self.baseline = self.ledger.usage()
        self.peaks: dict[str, int] = {}

    def could_ever_run(self, request: Request) -> bool:
        """Whether the engine would take a request in at all."""
        return self.loop.scheduler.could_run(request)

    def step(self) -> bool:
        """One step of the loop; False when nothing can go on until something changes."""
        progressed = self.loop.step()
        self.clock.pass_time(self.config.host_step_s)
        for owner, size in self.ledger.usage().items():
            if size > self.peaks.get(owner, -1):
                self.peaks[owner] = size
        return progressed
