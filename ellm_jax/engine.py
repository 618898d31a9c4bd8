"""The engine as its users hold it: generate, stream, abort, look into the memory."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import itertools
import logging
import pathlib
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, cast

from tqdm import tqdm

from ellm_jax import _native
from ellm_jax.assembly import TINY_MODEL, Assembly, assemble
from ellm_jax.config import EngineConfig
from ellm_jax.intake import Group, Intake, Prompt, is_single, params_per_prompt
from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import RequestOutput
from ellm_jax.request import Request, Status
from ellm_jax.sampling import SamplingParams
from ellm_jax.tokenizer import Tokenizer, TokenizerMissing

_Listener = Callable[[Group], None]
_log = logging.getLogger(__name__)


class EngineClosed(RuntimeError):  # a state, not only an error
    """The engine was closed, or has failed; its message says which."""


class Engine:
    """Serves requests from a thread of its own until it is closed. Methods may be called from any
    thread. Usable as a context manager.

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
        self._listeners: dict[Group, _Listener] = {}
        self._by_id: dict[str, Group] = {}
        self._group_of: dict[Request, Group] = {}
        self._changed: dict[Group, None] = {}
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._failure: BaseException | None = None
        self._ids = itertools.count()

        try:
            self.tokenizer: Tokenizer | None = Tokenizer.from_dir(path)
        except TokenizerMissing:
            self.tokenizer = None
        assembly = assemble(path, config, self._on_token, self._on_finish)
        self._loop = assembly.loop
        self.model_config = assembly.model_config
        self.dtype = assembly.dtype
        self.max_model_len = assembly.max_model_len
        self._intake = self._make_intake(assembly)
        self._thread = threading.Thread(target=self._run, name="ellm-engine", daemon=True)
        self._thread.start()
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
            room_bytes=ledger.capacity_bytes - assembly.smallest_need_bytes,
            tile_tokens=ledger.kv.layout.tile_tokens,
            chunk_bytes=ledger.chunk_bytes,
        )

    # What users call.

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Completes prompts and returns when all are done, in the order of the prompts.

        More requests than memory holds wait; none fails for lack of memory unless it could not
        run alone. Nothing is started unless every prompt is valid.

        Args:
            prompts: one prompt or several; each a text, token ids, or the messages of a chat.
            params: for all, or one per prompt.
            progress: show a progress bar.

        Raises:
            ValueError, TypeError: a prompt or parameters that do not suit the model.
            EngineClosed: the engine is closed or has failed.
        """
        several = cast("list[Prompt]", [prompts] if is_single(prompts) else list(prompts))
        now = time.monotonic()
        groups = [
            self._intake.group(prompt, each, self._next_id(), now)
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
                    self._submit(group, listen)
                for _ in groups:
                    group = self._next(finished)
                    tokens += sum(len(request.output_ids) for request in group.requests)
                    speed = tokens / max(1e-9, time.monotonic() - now)
                    bar.set_postfix_str(f"{speed:.1f} tok/s", refresh=False)
                    bar.update()
            except BaseException:
                for group in groups:
                    self._abort_group(group)
                raise
        return [group.output() for group in groups]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Iterator[RequestOutput]:
        """Completes one prompt and yields everything so far whenever there is more.

        It starts when the first output is asked for. What a slow reader misses is part of the next
        output. Leaving the loop aborts the request.

        Raises:
            As `generate`; at the call, not at the first output.
        """
        group = self._group(prompt, params, request_id)
        changed: queue.SimpleQueue[Group] = queue.SimpleQueue()

        def outputs() -> Iterator[RequestOutput]:
            self._submit(group, changed.put)
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
                self._abort_group(group)

        return outputs()

    async def stream_async(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """As `stream`, for asyncio. Cancelling the task aborts the request."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        group = self._group(prompt, params, request_id)

        def notify(_: Group) -> None:
            loop.call_soon_threadsafe(changed.set)

        self._submit(group, notify)
        try:
            done = False
            while not done:
                await changed.wait()
                changed.clear()
                self._raise_failure()
                output = group.output()
                done = output.finished
                yield output
        finally:
            self._abort_group(group)

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Future[RequestOutput]:
        """Queues one prompt and returns at once. The future holds its output when it is over, or
        `EngineClosed` if the engine fails; to give it up, `abort` it by its id. Callbacks of the
        future run on the engine's thread, so they must be quick.

        Raises:
            As `generate`; at the call.
        """
        group = self._group(prompt, params, request_id)
        future: Future[RequestOutput] = Future()
        # Nobody but the engine ends it: a future that could be cancelled might be set twice.
        future.set_running_or_notify_cancel()

        def listen(group: Group) -> None:
            if not group.finished:
                return
            if self._failure is None:
                future.set_result(group.output())
            else:
                future.set_exception(EngineClosed(f"the engine has failed: {self._failure}"))

        self._submit(group, listen)
        return future

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; its memory is given back at once. False if there is none."""
        group = self._by_id.get(request_id)
        if group is None or group.finished:
            return False
        self._abort_group(group)
        return True

    def memory(self) -> MemoryReport:
        """Bytes by owner; they add up to the limit."""
        return MemoryReport.from_usage(self._loop.ledger.usage())

    def stats(self) -> LoopStats:
        """Where the host loop's time went since the start or the last `reset_stats`."""
        return dataclasses.replace(self._loop.stats)

    def warm_up(self) -> None:
        """Compiles every step shape that a batch can come in, as `EngineConfig.warm_up` does for
        the most common ones. What else requests ask for (log probabilities, penalties) is
        compiled when the first one comes."""
        self._call(self._loop.compiler.warm_up_all)

    def reset_stats(self) -> None:
        """Starts the statistics and the peaks of the memory anew."""

        def reset() -> None:
            self._loop.stats = LoopStats()
            self._loop.ledger.reset_peaks()

        self._call(reset)

    def trim(self) -> None:
        """Gives memory that nobody uses back to the system now."""
        self._call(self._trim)

    def close(self) -> None:
        """Aborts what runs, gives all memory of the KV cache back, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Between the callers' threads and the engine's.

    def _next_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _group(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None
    ) -> Group:
        group_id = request_id or self._next_id()
        if group_id in self._by_id:
            raise ValueError(_in_use(group_id))
        return self._intake.group(prompt, params or SamplingParams(), group_id, time.monotonic())

    def _submit(self, group: Group, listener: _Listener) -> None:
        def submit() -> None:
            for request in group.requests:
                self._loop.submit(request)

        with self._wake:
            self._check_open()
            if group.id in self._by_id:
                raise ValueError(_in_use(group.id))
            self._by_id[group.id] = group
            self._listeners[group] = listener
            self._group_of |= dict.fromkeys(group.requests, group)
            self._commands.append(submit)
            self._wake.notify()

    def _abort_group(self, group: Group) -> None:
        """Ends what is left of a group; does nothing if it is over or the engine is."""
        if group.finished or self._failure is not None:
            return

        def abort() -> None:
            for request in group.requests:
                self._loop.abort(request)

        with self._wake:
            self._commands.append(abort)
            self._wake.notify()

    def _command(self, command: Callable[[], None]) -> None:
        """Has the engine's thread do something before its next step."""
        with self._wake:
            self._check_open()
            self._commands.append(command)
            self._wake.notify()

    def _check_open(self) -> None:
        self._raise_failure()
        if self._closing:
            raise EngineClosed("the engine is closed; make a new one")

    def _call(self, function: Callable[[], Any]) -> None:
        """Has the engine's thread do something, and waits for it."""
        done: Future[None] = Future()

        def command() -> None:
            try:
                function()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._command(command)
        while not wait([done], timeout=1.0).done:
            self._raise_failure()
        done.result()

    def _next(self, groups: queue.SimpleQueue[Group]) -> Group:
        group = groups.get()
        self._raise_failure()
        return group

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise EngineClosed(f"the engine has failed: {self._failure}") from self._failure

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._await_work():
                self._run_commands()
                if self._loop.busy:
                    self._loop.step()
                self._publish()
            self._wind_up()
        except BaseException as failure:
            self._fail(failure)
            self._loop.shut_down()
            raise

    def _fail(self, failure: BaseException) -> None:
        """Tells everybody who waits; nobody can wait afterwards."""
        with self._wake:
            self._failure = failure
            listeners = dict(self._listeners)
        for group, listener in listeners.items():
            for request in group.requests:
                if request.status is not Status.FINISHED:
                    request.status = Status.FINISHED
                    request.finish_reason = "error"
                    request.error = f"the engine has failed: {failure}"
            self._tell(group, listener)

    def _tell(self, group: Group, listener: _Listener) -> None:
        """Calls a listener; one that fails, such as that of an event loop that is gone, loses its
        request and harms nobody else."""
        try:
            listener(group)
        except Exception:
            _log.warning("nobody listens to request %s any more", group.id, exc_info=True)
            self._abort_group(group)

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _await_work(self) -> bool:
        """Returns when there is something to do; False when the engine is to end. Gives unused
        memory back once nothing has come for a while."""

        def called() -> bool:
            return bool(self._commands or self._loop.busy or self._closing)

        with self._wake:
            idle = not self._wake.wait_for(called, self.config.idle_trim_s)
        if idle:
            self._trim()
            with self._wake:
                self._wake.wait_for(called)
        return not self._closing

    def _trim(self) -> None:
        if not self._loop.busy:
            self._loop.ledger.trim()
            _native.malloc_trim()

    def _wind_up(self) -> None:
        self._run_commands()
        for request in list(self._group_of):
            self._loop.abort(request)
        self._loop.drain()
        self._publish()
        self._loop.shut_down()

    def _publish(self) -> None:
        """Tells every listener whose requests moved, once per step."""
        changed, self._changed = self._changed, {}
        for group in changed:
            listener = self._listeners[group]
            if group.finished:
                with self._wake:
                    del self._listeners[group], self._by_id[group.id]
            self._tell(group, listener)

    def _on_token(self, request: Request) -> str | int | None:
        group = self._group_of[request]
        self._changed[group] = None
        text = group.texts[request]
        token = request.output_ids[-1]
        if text is None or (token in request.stop_ids and not _keeps_stop(request)):
            return None
        return text.push(token)

    def _on_finish(self, request: Request) -> None:
        with self._wake:
            group = self._group_of.pop(request)
        self._changed[group] = None
        text = group.texts[request]
        if text is not None and not isinstance(request.stop_reason, str):
            text.finish()


def _in_use(group_id: str) -> str:
    return f"request id {group_id!r} is in use by a request that runs; choose another"


def _keeps_stop(request: Request) -> bool:
    """Whether the stop token's text belongs to the output: asked for, or not reached min_tokens."""
    params = request.params
    return params.include_stop_str_in_output or len(request.output_ids) <= params.min_tokens
