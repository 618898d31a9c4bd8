"""What every transport serves: calls in, outputs out, and the engine's limits.

Knows no protocol. Lives on one event loop; the engine has a thread of its own, which wakes the loop
at most once per step, however many streams are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ellm_jax.engine import Engine, EngineClosed
from ellm_jax.intake import Group, RequestOptions
from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import RequestOutput
from ellm_jax.serving.admission import Admission
from ellm_jax.serving.call import Call, check_call
from ellm_jax.serving.errors import ErrorKind, ServiceError, refused
from ellm_jax.serving.info import ModelInfo, ServiceStats
from ellm_jax.serving.observer import NullObserver, Observer, tell_refused
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.stream import RequestStream
from ellm_jax.serving.tenants import Tenant
from ellm_jax.serving.texts import Texts
from ellm_jax.serving.turns import Spread
from ellm_jax.serving.workers import Workers
from ellm_jax.structured.matcher import GrammarsBusy

_INLINE = 2048
"""Prompts of up to so many characters or tokens are checked on the event loop, which takes less
than a millisecond; longer ones on a thread."""

_DELIVER_MOST = 8
"""Streams that are told of their news in one iteration of the event loop: what each then writes
takes longer than to tell it."""

_WATCH_S = 0.25
"""How often the engine's thread is looked after."""

_RETRY_ELSEWHERE_S = 5.0
_RETRY_GRAMMAR_S = 5.0
_LAST_NEWS_S = 2.0


class Service:
    """Serves one engine. Belongs to one event loop.

    Attributes:
        engine: the engine; not closed by the service.
        config: the server's bounds.
        observer: is told of every call.
        model: what is served.
        texts: its tokenizer.
    """

    def __init__(
        self, engine: Engine, config: ServeConfig | None = None, observer: Observer | None = None
    ):
        """Makes it on a running event loop, and begins to look after the engine."""
        self.engine = engine
        self.config = config or ServeConfig()
        self.observer: Observer = observer or NullObserver()
        self.model = ModelInfo.of(engine, self.config.model_name)
        self._max_prompt_tokens = min(
            self.config.max_prompt_tokens or engine.max_model_len, engine.max_model_len
        )
        seats = 2 * engine.config.max_num_seqs
        self._admission = Admission(seats, self.config.max_queue)
        self._streams: dict[RequestStream, asyncio.TimerHandle | None] = {}
        self._seated: dict[Group, RequestStream] = {}
        self._news = Spread(_DELIVER_MOST, self._tell, self._note_if_failed)
        self._names: set[str] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._draining = False
        self._failed = False
        self._on_failure: list[Callable[[], None]] = []
        self._prompts = Workers("ellm-intake", 2, self.config.max_queue + seats)
        self.texts = Texts(engine, self.config.max_body_bytes)
        self._limits = ThreadPoolExecutor(1, thread_name_prefix="ellm-limits")
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._watch_engine())

    # Completions.

    async def open(self, call: Call, *, partial: bool = True) -> RequestStream:
        """Checks a call, queues it, and returns the stream of its output; without `partial`, of one
        update at its end.

        Raises:
            ServiceError: INVALID, TOO_LARGE, OVERLOADED, UNAVAILABLE or DEADLINE; nothing was done.
        """
        begin_s = time.monotonic()
        if call.request_id is None:
            # Here already, so that logs and traces have one name for it from the start.
            call = dataclasses.replace(call, request_id=uuid.uuid4().hex)
        try:
            self.check(call)
            if len(call.prompt) <= _INLINE:
                group = self._prepare(call)
            else:
                group = await self._prompts.run(call.tenant, lambda: self._prepare(call))
                self._check_open()
            if group.grammar is not None:
                await _compiled(group.grammar)
                self._check_open()
            return self._admit(RequestStream(call, group, self._closed, partial), begin_s)
        except ServiceError as error:
            tell_refused(self.observer, error, call.tenant)
            raise

    def check(self, call: Call) -> None:
        """Refuses what `open` would refuse without looking into the prompt. For who has to work for
        the prompt first: when the server is full or ends, work is what there is not.

        Raises:
            ServiceError: INVALID, TOO_LARGE, OVERLOADED, UNAVAILABLE or DEADLINE.
        """
        try:
            self._check_open()
            check_call(call, self.config, self._max_prompt_tokens)
            self._admission.check(call)
        except ServiceError as error:
            tell_refused(self.observer, error, call.tenant)
            raise

    async def stream(self, call: Call) -> AsyncIterator[RequestOutput]:
        """Everything so far, whenever there is more. Each output is a copy, so that a long stream
        costs the square of its length: `open` gives each part once. Closing the iterator aborts.

        Raises:
            ServiceError: as `open`, and as its stream; with the first output.
        """
        async with await self.open(call) as stream:
            async for _ in stream:
                yield stream.output()

    async def complete(self, call: Call) -> RequestOutput:
        """Waits for the end of a call. Cancelling aborts it.

        Raises:
            ServiceError: as `open`, and as its stream.
        """
        async with await self.open(call, partial=False) as stream:
            async for _ in stream:
                pass
            return stream.output()

    def _prepare(self, call: Call) -> Group:
        """Makes requests of a call; on any thread."""
        try:
            options = RequestOptions(
                call.priority, call.ttft_ms, call.tpot_ms, call.tenant.cache_salt
            )
            group = self.engine.prepare(
                call.prompt, call.params, request_id=call.request_id, options=options
            )
        except GrammarsBusy as error:
            raise _busy(error) from error
        except (ValueError, TypeError) as error:
            raise refused(error, "prompt") from error
        tokens = len(group.requests[0].prompt_ids)
        if tokens > self._max_prompt_tokens:
            raise ServiceError(
                ErrorKind.TOO_LARGE,
                f"the prompt has {tokens} tokens, and this server takes "
                f"{self._max_prompt_tokens}; shorten it",
                param="prompt",
            )
        return group

    def _admit(self, stream: RequestStream, begin_s: float) -> RequestStream:
        call = stream.call
        if stream.request_id in self._names:
            raise ServiceError(
                ErrorKind.INVALID,
                f"request_id {stream.request_id!r} is in use by a call that runs; choose another",
                param="request_id",
            )
        displaced = self._admission.admit(stream)
        timer = None
        if call.deadline_s is not None:
            left_s = call.deadline_s - (time.monotonic() - begin_s)
            timer = self._loop.call_later(left_s, self._expire, stream)
        self._streams[stream] = timer
        self._names.add(stream.request_id)
        self._emptied.clear()
        self.observer.on_admitted(call, len(stream.prompt_token_ids))
        if displaced is not None:
            self._fail(displaced, self._admission.overloaded(displaced.call))
        self._start_seated()
        return stream

    def _start_seated(self) -> None:
        if self.engine.failure is not None:
            return  # All that wait are about to be told.
        while (stream := self._admission.next()) is not None:
            self._seated[stream.group] = stream
            try:
                self.engine.start(stream.group, self._notify)
            except (EngineClosed, ValueError) as error:
                del self._seated[stream.group]
                self._admission.release(stream.group)
                self._fail(stream, ServiceError(ErrorKind.UNAVAILABLE, str(error)))

    def _notify(self, groups: Sequence[Group]) -> None:
        """On the engine's thread, once per step."""
        self._loop.call_soon_threadsafe(self._news.add, groups)

    def _tell(self, group: Group) -> None:
        """Tells the stream of a group that there is more."""
        stream = self._seated.get(group)
        if stream is None:
            return
        if not stream.first_token_told and group.requests[0].first_token_s is not None:
            stream.first_token_told = True
            self.observer.on_first_token(stream.call, stream.metrics)
        if not group.finished:
            stream.note_news()
            return
        del self._seated[group]
        self._admission.release(group)
        self._end(stream)
        self._start_seated()

    def _end(self, stream: RequestStream) -> None:
        """A group is over in the engine."""
        requests = stream.group.requests
        error = next((r.error for r in requests if r.finish_reason == "error"), None)
        if error is not None:
            self._fail(stream, ServiceError(ErrorKind.INTERNAL, error))
        elif any(r.finish_reason == "abort" for r in requests):
            self._fail(stream, stopped())
        else:
            self._report(stream, None)
            stream.note_news(end=True)

    def _closed(self, stream: RequestStream) -> None:
        """Nobody reads a stream any more."""
        timer = self._streams.pop(stream)
        if timer is not None:
            timer.cancel()
        self._names.discard(stream.request_id)
        self._report(stream, ServiceError(ErrorKind.CANCELLED, "the client has left"))
        self._stop(stream)
        if not self._streams:
            self._emptied.set()

    def _fail(self, stream: RequestStream, error: ServiceError) -> None:
        """Ends a stream with an error; its memory is given back at once."""
        error.told = True
        stream.fail(error)
        self._report(stream, error)
        self._stop(stream)

    def _stop(self, stream: RequestStream) -> None:
        if not self._admission.drop(stream) and stream.group in self._seated:
            self.engine.stop(stream.group)

    def _report(self, stream: RequestStream, error: ServiceError | None) -> None:
        """Tells the observer how a call ended, the first time."""
        if not stream.end_told:
            stream.end_told = True
            self.observer.on_finished(stream.call, error or stream.output())

    def _expire(self, stream: RequestStream) -> None:
        if not stream.group.finished:
            self._fail(
                stream, ServiceError(ErrorKind.DEADLINE, "the deadline has passed; allow more time")
            )

    # The engine.

    def model_info(self) -> ModelInfo:
        """What is served."""
        return self.model

    def memory(self) -> MemoryReport:
        """Bytes by owner and tier."""
        return self.engine.memory()

    def stats(self) -> ServiceStats:
        """What there is to do just now."""
        return ServiceStats(
            open_streams=len(self._streams),
            queued=self._admission.queued,
            queued_by_tenant=self._admission.waiting(),
            open_by_tenant=Counter(stream.call.tenant.name for stream in self._streams),
            engine=self.engine.load(),
            loop=self.engine.stats(),
            live=self.live,
            ready=self.ready,
            draining=self._draining,
            asleep=self.engine.asleep,
        )

    async def resize(
        self,
        tenant: Tenant,
        *,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
    ) -> MemoryReport:
        """Changes the engine's limits while requests run; the memory as it is then.

        Raises:
            ServiceError: FORBIDDEN; INVALID: a size that does not do; PRECONDITION: not now.
        """
        tenant.require_admin("to resize")
        await self._change(
            lambda: self.engine.resize(device_memory=device_memory, host_memory=host_memory)
        )
        return self.memory()

    async def sleep(self, tenant: Tenant) -> None:
        """Gives nearly all memory back; calls wait until `wake`.

        Raises:
            ServiceError: FORBIDDEN; PRECONDITION.
        """
        tenant.require_admin("to put the engine to sleep")
        await self._change(self.engine.sleep)

    async def wake(self, tenant: Tenant) -> None:
        """Loads the weights again, and goes on.

        Raises:
            ServiceError: FORBIDDEN; PRECONDITION: the limit does not hold them.
        """
        tenant.require_admin("to wake the engine")
        await self._change(self.engine.wake)

    async def _change(self, change: Callable[[], None]) -> None:
        if self._failed:
            raise self._engine_failed(ErrorKind.UNAVAILABLE)
        try:
            await self._loop.run_in_executor(self._limits, change)
        except EngineClosed as error:
            raise ServiceError(ErrorKind.UNAVAILABLE, str(error)) from error
        except (ValueError, TypeError) as error:
            raise refused(error) from error
        except (MemoryError, RuntimeError) as error:
            raise ServiceError(ErrorKind.PRECONDITION, str(error)) from error

    # Its life.

    @property
    def live(self) -> bool:
        """Whether the engine runs."""
        return not self._failed and self.engine.alive

    @property
    def ready(self) -> bool:
        """Whether new calls are taken and get on."""
        return self.live and not self._draining and not self.engine.asleep

    @property
    def draining(self) -> bool:
        """Whether no new calls are taken any more."""
        return self._draining

    def on_failure(self, listener: Callable[[], None]) -> None:
        """Has a listener called on the event loop when the engine fails."""
        self._on_failure.append(listener)

    async def drain(self, deadline_s: float) -> int:
        """Takes no more calls and waits until those there are have ended and been read, at most so
        many seconds; the rest then end with an error. How many those were."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._emptied.wait(), deadline_s)
        cut = len(self._streams)
        self.fail_all(stopped())
        return cut

    def fail_all(self, error: ServiceError) -> None:
        """Ends every stream with an error."""
        for stream in list(self._streams):
            self._fail(stream, error)

    async def close(self) -> None:
        """Ends every stream and lets the event loop go; the engine stays."""
        self._draining = True
        self.fail_all(stopped())
        # The engine still says how those ended, to an event loop that has to be there.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_NEWS_S):
                while self._seated and self.engine.alive:
                    await asyncio.sleep(0.01)
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        self._prompts.close()
        self.texts.close()
        self._limits.shutdown(wait=False, cancel_futures=True)

    async def _watch_engine(self) -> None:
        while self.engine.alive:
            await asyncio.sleep(_WATCH_S)
        self._note_failure()

    def _note_if_failed(self) -> None:
        if self.engine.failure is not None:
            self._note_failure()

    def _note_failure(self) -> None:
        if self._failed:
            return
        self._failed = True
        for group in [group for group in self._seated if group.finished]:
            self._tell(group)  # What was whole before stays so.
        self.fail_all(self._engine_failed(ErrorKind.INTERNAL))
        for listener in self._on_failure:
            listener()

    def _engine_failed(self, kind: ErrorKind) -> ServiceError:
        cause = self.engine.failure or "it was closed"
        return ServiceError(kind, f"the engine has failed: {cause}; start the server again")

    def _check_open(self) -> None:
        if not self.live:
            raise self._engine_failed(ErrorKind.UNAVAILABLE)
        if self._draining:
            raise stopped()


def stopped() -> ServiceError:
    """What calls are told when the server ends."""
    return ServiceError(
        ErrorKind.UNAVAILABLE,
        "the server is shutting down; try another, or again later",
        retry_after_s=_RETRY_ELSEWHERE_S,
    )


async def _compiled(grammar: Future[Any]) -> None:
    """Waits until what an output has to be is compiled.

    Raises:
        ServiceError: INVALID: it cannot be; OVERLOADED: not in time.
    """
    try:
        # Shielded: others may wait for the same one; a client that leaves is not to cancel it.
        await asyncio.shield(asyncio.wrap_future(grammar))
    except GrammarsBusy as error:
        raise _busy(error) from error
    except ValueError as error:
        raise ServiceError(ErrorKind.INVALID, str(error), param="structured") from error


def _busy(error: GrammarsBusy) -> ServiceError:
    return ServiceError(
        ErrorKind.OVERLOADED, str(error), param="structured", retry_after_s=_RETRY_GRAMMAR_S
    )
