"""The ways to have prompts completed: all at once, as they grow, or in the background."""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, cast

from tqdm import tqdm

from ellm_jax.engine_thread import EngineClosed, EngineThread, Listener
from ellm_jax.intake import Group, Intake, Prompt, RequestOptions, is_single, params_per_prompt
from ellm_jax.outputs import RequestOutput
from ellm_jax.sampling import SamplingParams
from ellm_jax.structured.output import StructuredOutput


class Completions:
    """Takes prompts to an engine's thread, and brings back what becomes of them. Methods may be
    called from any thread."""

    def __init__(self, thread: EngineThread, intake: Intake):
        """Args:
        thread: runs the requests.
        intake: makes them of prompts.
        """
        self._thread = thread
        self._intake = intake
        self._ids = itertools.count()

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
            priority, ttft_ms, tpot_ms, cache_salt: see `Engine`.

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
        for group in groups:
            if group.grammar is not None:
                group.grammar.result()
        finished: queue.SimpleQueue[Group] = queue.SimpleQueue()

        def listen(groups: Sequence[Group]) -> None:
            for group in groups:
                if group.finished:
                    finished.put(group)

        with tqdm(total=len(groups), desc="Generating", unit="req", disable=not progress) as bar:
            tokens = 0
            try:
                for group in groups:
                    self._thread.submit(group, listen)
                for _ in groups:
                    group = finished.get()
                    self._thread.raise_failure()
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
        changed: queue.SimpleQueue[Sequence[Group]] = queue.SimpleQueue()

        if group.grammar is not None:
            group.grammar.result()

        def outputs() -> Iterator[RequestOutput]:
            self._thread.submit(group, changed.put)
            try:
                done = False
                while not done:
                    changed.get()
                    self._thread.raise_failure()
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
        if group.grammar is not None:
            await asyncio.wrap_future(group.grammar)

        def notify(_: Sequence[Group]) -> None:
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
            As `generate`; at the call. But for structured output that cannot be compiled: the
            output says so (see `compile_structured`).
        """
        options = RequestOptions(priority, ttft_ms, tpot_ms, cache_salt)
        group = self._group(prompt, params, request_id, options)
        future: Future[RequestOutput] = Future()
        # Nobody but the engine ends it: a future that could be cancelled might be set twice.
        future.set_running_or_notify_cancel()

        def listen(groups: Sequence[Group]) -> None:
            group = groups[0]
            if not group.finished:
                return
            if self._thread.failure is None:
                future.set_result(group.output())
            else:
                future.set_exception(EngineClosed(f"the engine has failed: {self._thread.failure}"))

        self._thread.submit(group, listen)
        return future

    def compile_structured(self, structured: StructuredOutput) -> Future[Any]:
        """Has structured output compiled, so that a request with it need not wait, or is not even
        made: the future holds `ValueError`, with the reason, where it cannot be compiled. It is
        over within seconds, and what was compiled lately is kept.

        Raises:
            ValueError: there is no tokenizer, llguidance is not installed, or too many wait.
        """
        return self._intake.compile(structured)

    def abort(self, request_id: str) -> bool:
        """Ends a request by its id; its memory is given back at once. False if there is none."""
        return self._thread.abort(request_id)

    # For servers, which check and start at different times and read many streams at once.

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        options: RequestOptions | None = None,
    ) -> Group:
        """Checks a prompt and makes its requests; the time of their arrival is now.

        Raises:
            As `generate`.
        """
        return self._group(prompt, params, request_id, options or RequestOptions())

    def start(self, group: Group, listener: Listener) -> None:
        """Queues a prepared group. After each step that moved any of the groups that have the same
        listener, it is called once with those, on the engine's thread: it must be quick.

        Raises:
            ValueError: the group's id is in use.
            EngineClosed: the engine is closed or has failed.
        """
        self._thread.submit(group, listener)

    def stop(self, group: Group) -> None:
        """Ends what is left of a group that was started; does nothing if it is over."""
        self._thread.abort_group(group)

    @property
    def alive(self) -> bool:
        """Whether it can serve: neither closed nor failed."""
        return self._thread.alive

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's thread; None while it is well."""
        return self._thread.failure

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
