"""The engine as its users hold it: generate, stream, abort, look into the memory and resize it."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import itertools
import pathlib
import queue
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from typing import cast

from tqdm import tqdm

from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL, Assembly, assemble
from ellm_jax.config import EngineConfig, format_bytes, parse_bytes
from ellm_jax.engine_thread import EngineClosed, EngineThread
from ellm_jax.host_loop import HostLoop
from ellm_jax.intake import Group, Intake, Prompt, RequestOptions, is_single, params_per_prompt
from ellm_jax.limits import Limits
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.events import MemoryEvent
from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams
from ellm_jax.tokenizer import Tokenizer, TokenizerMissing

__all__ = ["Engine", "EngineClosed"]


class Engine:
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
        self._ids = itertools.count()
        try:
            self.tokenizer: Tokenizer | None = Tokenizer.from_dir(path)
        except TokenizerMissing:
            self.tokenizer = None
        self._thread = EngineThread(config.idle_trim_s, _trim_if_idle)
        assembly = assemble(path, config, self._thread.on_token, self._thread.on_finish)
        self._loop = assembly.loop
        self._limits = Limits(assembly.loop)
        self._compiler = assembly.compiler
        self.model_config = assembly.model_config
        self.dtype = assembly.dtype
        self.max_model_len = assembly.max_model_len
        self._smallest_need_bytes = assembly.smallest_need_bytes
        self._intake = self._make_intake(assembly)
        self._thread.start(self._loop)
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
        return Intake(
            model_config=assembly.model_config,
            tokenizer=self.tokenizer,
            max_model_len=assembly.max_model_len,
            room_bytes=self._room_bytes(),
            tile_tokens=ledger.kv.layout.tile_tokens,
            chunk_bytes=ledger.chunk_bytes,
            defaults=RequestOptions(ttft_ms=self.config.ttft_ms, tpot_ms=self.config.tpot_ms),
        )

    def _room_bytes(self) -> int:
        """What one request alone can take of the KV cache."""
        ledger = self._loop.ledger
        fixed_bytes = self._loop.absent_bytes
        fixed_bytes += max(self._smallest_need_bytes, ledger.floor_bytes)
        return ledger.capacity_bytes - fixed_bytes

    # What users call.

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        priority: int = 0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Completes prompts and returns when all are done, in the order of the prompts.

        More requests than memory holds wait; none fails for lack of memory unless it could not
        run alone. Nothing is started unless every prompt is valid.

        Args:
            prompts: one prompt or several; each a text, token ids, or the messages of a chat.
            params: for all, or one per prompt.
            progress: show a progress bar.
            priority, ttft_ms, tpot_ms, cache_salt: see the class.

        Raises:
            ValueError, TypeError: a prompt or parameters that do not suit the model.
            EngineClosed: the engine is closed or has failed.
        """
        several = cast("list[Prompt]", [prompts] if is_single(prompts) else list(prompts))
        now = time.monotonic()
        options = RequestOptions(priority, ttft_ms, tpot_ms, cache_salt)
        groups = [
            self._intake.group(prompt, each, self._next_id(), now, options)
            for prompt, each in zip(several, params_per_prompt(params, len(several)), strict=True)
        ]
        finished: queue.SimpleQueue[Group] = queue.SimpleQueue()

        def listen(group: Group) -> None:
            if group.finished:
                finished.put(group)

        with tqdm(total=len(groups), desc="Generating", unit="req", disable=not progress) as bar:
            tokens = 0
            try:
                for group in groups:
                    self._thread.submit(group, listen)
                for _ in groups:
                    group = self._next(finished)
                    tokens += sum(len(request.output_ids) for request in group.requests)
                    speed = tokens / max(1e-9, time.monotonic() - now)
                    bar.set_postfix_str(f"{speed:.1f} tok/s", refresh=False)
                    bar.update()
            except BaseException:
                for group in groups:
                    self._thread.abort_group(group)
                raise
        return [group.output() for group in groups]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        cache_salt: str = "",
    ) -> Iterator[RequestOutput]:
        """Completes one prompt and yields everything so far whenever there is more.

        It starts when the first output is asked for. What a slow reader misses is part of the next
        output. Leaving the loop aborts the request.

        Raises:
            As `generate`; at the call, not at the first output.
        """
        options = RequestOptions(priority, ttft_ms, tpot_ms, cache_salt)
        group = self._group(prompt, params, request_id, options)
        changed: queue.SimpleQueue[Group] = queue.SimpleQueue()

        def outputs() -> Iterator[RequestOutput]:
            self._thread.submit(group, changed.put)
            try:
                done = False
                while not done:
                    self._next(changed)
                    while not changed.empty():
                        changed.get()
                    output = group.output()
                    done = output.finished
                    yield output
            finally:
                self._thread.abort_group(group)

        return outputs()

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """As `stream`, for asyncio. Cancelling the task aborts the request."""
        options = RequestOptions(priority, ttft_ms, tpot_ms, cache_salt)
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        group = self._group(prompt, params, request_id, options)

        def notify(_: Group) -> None:
            loop.call_soon_threadsafe(changed.set)

        self._thread.submit(group, notify)
        try:
            done = False
            while not done:
                await changed.wait()
                changed.clear()
                self._thread.raise_failure()
                output = group.output()
                done = output.finished
                yield output
        finally:
            self._thread.abort_group(group)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        ttft_ms: float | None = None,
        tpot_ms: float | None = None,
        cache_salt: str = "",
    ) -> Future[RequestOutput]:
        """Queues one prompt and returns at once. The future holds its output when it is over, or
        `EngineClosed` if the engine fails; to give it up, `abort` it by its id. Callbacks of the
        future run on the engine's thread, so they must be quick.

        Raises:
            As `generate`; at the call.
        """
        options = RequestOptions(priority, ttft_ms, tpot_ms, cache_salt)
        group = self._group(prompt, params, request_id, options)
        future: Future[RequestOutput] = Future()
        # Nobody but the engine ends it: a future that could be cancelled might be set twice.
        future.set_running_or_notify_cancel()

        def listen(group: Group) -> None:
            if not group.finished:
                return
            if self._thread.failure is None:
                future.set_result(group.output())
            else:
                future.set_exception(EngineClosed(f"the engine has failed: {self._thread.failure}"))

        self._thread.submit(group, listen)
        return future

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; its memory is given back at once. False if there is none."""
        return self._thread.abort(request_id)

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
        log = self._loop.ledger.events
        return dataclasses.replace(
            self._loop.stats, moves=dict(log.counts), moved_bytes=dict(log.bytes)
        )

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
            log = self._loop.ledger.events
            self._loop.stats = LoopStats()
            log.counts.clear()
            log.bytes.clear()
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
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _group(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        options: RequestOptions,
    ) -> Group:
        group_id = request_id or self._next_id()
        self._thread.check_id(group_id)
        now = time.monotonic()
        return self._intake.group(prompt, params or SamplingParams(), group_id, now, options)

    def _next(self, groups: queue.SimpleQueue[Group]) -> Group:
        group = groups.get()
        self._thread.raise_failure()
        return group


def _trim_if_idle(loop: HostLoop) -> None:
    if not loop.busy:
        loop.ledger.trim()
        _native.malloc_trim()
