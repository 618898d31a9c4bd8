"""The engine as its users hold it: made from a checkpoint, looked into, resized, put to sleep."""

from __future__ import annotations

import atexit
import dataclasses
import pathlib
from collections.abc import Callable

from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL, Assembly, assemble
from ellm_jax.completions import Completions
from ellm_jax.config import EngineConfig, format_bytes, parse_bytes
from ellm_jax.engine_thread import EngineClosed, EngineThread
from ellm_jax.execution import DispatchedStep
from ellm_jax.host_loop import HostLoop
from ellm_jax.intake import Intake, RequestOptions
from ellm_jax.limits import Limits
from ellm_jax.loop_stats import Load, LoopStats
from ellm_jax.memory.events import MemoryEvent
from ellm_jax.memory.report import MemoryReport
from ellm_jax.structured.grammars import Grammars
from ellm_jax.tokenizer import Tokenizer, TokenizerMissing

__all__ = ["Engine", "EngineClosed"]


class Engine(Completions):
    """Serves requests from a thread of its own until it is closed. Methods may be called from any
    thread. Usable as a context manager.

    The methods that take a prompt also take, for all its completions: `priority` (lower is sooner;
    a level counts as ten seconds of waiting), `ttft_ms` and `tpot_ms` (latency targets in
    milliseconds instead of the engine's), and `cache_salt` (requests with different salts share no
    cached prefixes).

    Attributes:
        config: how it was set up.
        model_config: the model.
        dtype: what the model computes in.
        tokenizer: the checkpoint's; None where it has none.
        max_model_len: most tokens of prompt and output together.
    """

    def __init__(self, path: str | pathlib.Path, config: EngineConfig):
        """Use `from_pretrained`."""
        self.config = config
        try:
            self.tokenizer: Tokenizer | None = Tokenizer.from_dir(path)
        except TokenizerMissing:
            self.tokenizer = None
        thread = EngineThread(config.idle_trim_s, _trim_if_idle)
        assembly = assemble(path, config, thread.on_token, thread.on_finish)
        self._loop = assembly.loop
        self._limits = Limits(assembly.loop)
        self._compiler = assembly.compiler
        self.model_config = assembly.model_config
        self.dtype = assembly.dtype
        self.max_model_len = assembly.max_model_len
        self._smallest_need_bytes = assembly.smallest_need_bytes
        self._grammars: Grammars | None = None
        super().__init__(thread, self._make_intake(assembly))
        thread.start(self._loop)
        # A thread inside XLA while the interpreter goes away would take the process down.
        atexit.register(self.close)

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path | None = None, config: EngineConfig | None = None
    ) -> Engine:
        """Loads a Hugging Face or converted checkpoint directory; None: the model in the package.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not supported.
            ValueError: the configuration does not suit the model.
            MemoryError: `device_memory` does not hold the weights and the smallest step.
        """
        return cls(TINY_MODEL if path is None else path, config or EngineConfig())

    def _make_intake(self, assembly: Assembly) -> Intake:
        ledger = assembly.loop.ledger
        config = assembly.model_config
        if self.tokenizer is not None:
            self._grammars = Grammars(self.tokenizer, config.vocab_size, config.eos_token_ids)
        return Intake(
            model_config=assembly.model_config,
            tokenizer=self.tokenizer,
            max_model_len=assembly.max_model_len,
            room_bytes=self._room_bytes(),
            tile_tokens=ledger.kv.layout.tile_tokens,
            chunk_bytes=ledger.chunk_bytes,
            defaults=RequestOptions(ttft_ms=self.config.ttft_ms, tpot_ms=self.config.tpot_ms),
            grammars=self._grammars,
        )

    def _room_bytes(self) -> int:
        """What one request alone can take of the KV cache."""
        ledger = self._loop.ledger
        fixed_bytes = self._loop.absent_bytes
        fixed_bytes += max(self._smallest_need_bytes, ledger.floor_bytes)
        return ledger.capacity_bytes - fixed_bytes

    def memory(self) -> MemoryReport:
        """Bytes by owner and tier; they add up to the limits."""
        host = self._loop.host
        return MemoryReport.from_usage(
            self._loop.ledger.usage(), None if host is None else host.usage()
        )

    def events(self) -> list[MemoryEvent]:
        """The latest moves of memory, oldest first: what moved, why, and how long it took."""
        return self._loop.ledger.events.latest()

    def stats(self) -> LoopStats:
        """Where the host loop's time went since the start or the last `reset_stats`."""
        totals = self._loop.ledger.events.totals()
        return dataclasses.replace(
            self._loop.stats,
            moves={kind: count for kind, (count, _) in totals.items()},
            moved_bytes={kind: moved for kind, (_, moved) in totals.items()},
            compiled_steps=self._compiler.compiled,
        )

    def load(self) -> Load:
        """How many requests run and wait just now."""
        scheduler = self._loop.scheduler
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            moving=len(scheduler.moving),
            offloaded=len(scheduler.offloaded),
        )

    @property
    def asleep(self) -> bool:
        """Whether it sleeps: requests wait."""
        return self._loop.asleep

    def watch_steps(self, on_step: Callable[[DispatchedStep, float], None] | None) -> None:
        """Has every step told when it is over, with the time on the engine's clock; None: no more.
        Called on the engine's thread: it must be quick, must not raise, and changes nothing."""
        self._loop.on_step = on_step

    def cost_model(self) -> dict[str, float]:
        """How long steps and copies take here, as learned so far; what the simulator goes by."""
        return self._loop.scheduler.cost.to_dict()

    def resize(
        self, *, device_memory: int | str | None = None, host_memory: int | str | None = None
    ) -> None:
        """Changes the limits while requests run, and returns when they hold. Requests that no
        longer fit go to host memory or wait to be computed again; none ends for it. One that would
        not even fit alone waits until the limit is raised.

        Args:
            device_memory, host_memory: as in `EngineConfig`; None leaves it as it is.

        Raises:
            ValueError: `device_memory` does not hold the weights and the smallest step.
        """
        if host_memory is not None:
            host_bytes = parse_bytes(host_memory)
            self._thread.call(lambda: self._limits.resize_host(host_bytes))
        if device_memory is not None:
            limit_bytes = parse_bytes(device_memory)
            self._thread.call(lambda: self._resize(limit_bytes))

    def _resize(self, limit_bytes: int) -> None:
        ledger = self._loop.ledger
        usage = ledger.usage()
        need_bytes = max(self._smallest_need_bytes, ledger.floor_bytes) + ledger.chunk_bytes
        weights_bytes = usage["weights"] + self._loop.absent_bytes
        least_bytes = weights_bytes + usage["workspace"] + need_bytes
        if limit_bytes < least_bytes:
            raise ValueError(
                f"device_memory={format_bytes(limit_bytes)}: weights, the engine's own arrays and "
                f"the smallest step need {format_bytes(least_bytes)}; give that or more"
            )
        self._limits.resize(limit_bytes)
        self._intake = dataclasses.replace(self._intake, room_bytes=self._room_bytes())

    def sleep(self) -> None:
        """Gives nearly all memory back: weights, cached prefixes, and KV, which goes to host memory
        as far as that has room. Requests, running and new ones, wait until `wake`."""
        self._thread.call(self._sleep)

    def _sleep(self) -> None:
        self._limits.sleep()
        _native.malloc_trim()

    def wake(self) -> None:
        """Loads the weights again, and goes on.

        Raises:
            OutOfMemory: the limit was lowered meanwhile and does not hold them; still asleep.
        """
        self._thread.call(self._limits.wake)

    def warm_up(self) -> None:
        """Compiles every step shape that a batch can come in, as `EngineConfig.warm_up` does for
        the most common ones. What else requests ask for (log probabilities, penalties) is
        compiled when the first one comes."""
        self._thread.call(self._compiler.warm_up_all)

    def reset_stats(self) -> None:
        """Starts the statistics and the peaks of the memory anew."""

        def reset() -> None:
            self._loop.stats.reset()
            self._loop.ledger.events.reset_totals()
            self._loop.ledger.reset_peaks()

        self._thread.call(reset)

    def trim(self) -> None:
        """Gives memory that nobody uses back to the system now, cached prefixes included."""

        def trim() -> None:
            if not self._loop.busy:
                self._loop.ledger.drop_prefixes()
            _trim_if_idle(self._loop)

        self._thread.call(trim)

    def close(self) -> None:
        """Aborts what runs, gives all memory of the KV cache back, and ends the thread."""
        self._thread.close()
        if self._grammars is not None:
            self._grammars.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _trim_if_idle(loop: HostLoop) -> None:
    if not loop.busy:
        loop.ledger.trim()
        _native.malloc_trim()
