"""The thread that runs the host loop, and the way from callers' threads to it and back."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from ellm_jax.host_loop import HostLoop
from ellm_jax.intake import Group
from ellm_jax.request import Request, Status
from ellm_jax.runtime.shapes import StepMode

Listener = Callable[[Sequence[Group]], None]
"""Is told, on the engine's thread and once per step, which of its groups moved or ended."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_MASKED = StepMode(masked=True)
# How long the thread rests when no request can go on until something changes.
_STUCK_S = 0.05


class EngineClosed(RuntimeError):  # a state, not only an error
    """The engine was closed, or has failed; its message says which."""


class EngineThread:
    """Runs a host loop until it is closed. Its public methods may be called from any thread, but
    for `on_token` and `on_finish`, which the loop calls.

    Attributes:
        failure: what ended it; None while it is well.
    """

    def __init__(self, idle_trim_s: float | None, trim: Callable[[HostLoop], None]):
        """Args:
        idle_trim_s: seconds without work after which `trim` is called; None means never.
        trim: gives memory that nobody uses back.
        """
        self._idle_trim_s = idle_trim_s
        self._trim = trim
        self._loop: HostLoop | None = None
        self._listeners: dict[Group, Listener] = {}
        self._by_id: dict[str, Group] = {}
        self._group_of: dict[Request, Group] = {}
        self._changed: dict[Group, None] = {}
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._stuck = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ellm-engine", daemon=True)

    def start(self, loop: HostLoop) -> None:
        """Begins to run the loop."""
        self._loop = loop
        self._thread.start()

    # From callers' threads.

    def submit(self, group: Group, listener: Listener) -> None:
        """Queues a group's requests, once its grammar is compiled if it has one. The listener is
        called on the engine's thread whenever there is more, and when it is over; one that is given
        for several groups, once for all of them.

        Raises:
            ValueError: its id is in use.
            EngineClosed: closed, or failed.
        """

        with self._wake:
            self._check_open()
            self.check_id(group.id)
            self._by_id[group.id] = group
            self._listeners[group] = listener
            self._group_of |= dict.fromkeys(group.requests, group)
        if group.grammar is None:
            self._post(lambda: self._start_group(group))
        else:
            self._after(group.grammar, lambda: self._start_group(group))

    def _post(self, command: Callable[[], None]) -> None:
        """Has the engine's thread do something between two steps."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def check_id(self, group_id: str) -> None:
        """Raises ValueError if a request that runs has this id."""
        if group_id in self._by_id:
            raise ValueError(
                f"request id {group_id!r} is in use by a request that runs; choose another"
            )

    def abort(self, group_id: str) -> bool:
        """Ends a group by its id; False if there is none."""
        group = self._by_id.get(group_id)
        if group is None or group.finished:
            return False
        self.abort_group(group)
        return True

    def abort_group(self, group: Group) -> None:
        """Ends what is left of a group; does nothing if it is over, was never submitted, or the
        engine is over."""
        if group.finished or self.failure is not None:
            return

        def abort() -> None:
            if group in self._listeners:
                for request in group.requests:
                    self.loop.abort(request)

        self._post(abort)

    def call(self, function: Callable[[], _T]) -> _T:
        """Has the engine's thread do something between two steps, and waits for it; an error
        reaches the caller.

        Raises:
            RuntimeError: called on that thread, as from a future's callback.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "this waits for the engine's thread, and was called on it; call it elsewhere than "
                "in a future's callback"
            )
        done: Future[_T] = Future()

        def command() -> None:
            try:
                result = function()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        with self._wake:
            self._check_open()
            self._commands.append(command)
            self._wake.notify()
        while not wait([done], timeout=1.0).done:
            self.raise_failure()
        return done.result()

    def raise_failure(self) -> None:
        """Raises EngineClosed if the thread has failed."""
        if self.failure is not None:
            raise EngineClosed(f"the engine has failed: {self.failure}") from self.failure

    def _check_open(self) -> None:
        self.raise_failure()
        if self._closing:
            raise EngineClosed("the engine is closed; make a new one")

    def close(self) -> None:
        """Aborts what runs, gives all memory of the KV cache back, and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it runs and has not failed."""
        return self._thread.is_alive() and self.failure is None

    # The engine's thread.

    @property
    def loop(self) -> HostLoop:
        """The loop it runs."""
        assert self._loop is not None
        return self._loop

    def _run(self) -> None:
        try:
            while self._await_work():
                self._run_commands()
                if self.loop.busy:
                    self._stuck = not self.loop.step()
                self._publish()
            self._wind_up()
        except BaseException as failure:
            self._fail(failure)
            self.loop.shut_down()
            raise

    def _await_work(self) -> bool:
        """Returns when there is something to do; False when the engine is to end. Gives unused
        memory back once nothing has come for a while."""

        def called() -> bool:
            return bool(self._commands or self.loop.busy or self._closing)

        with self._wake:
            if self._stuck:
                self._wake.wait_for(lambda: bool(self._commands or self._closing), _STUCK_S)
            idle = not self._wake.wait_for(called, self._idle_trim_s)
        if idle:
            self._trim(self.loop)
            with self._wake:
                self._wake.wait_for(called)
        return not self._closing

    def _start_group(self, group: Group) -> None:
        """Queues what is left of a group, once everything is compiled that it needs."""
        requests = [r for r in group.requests if r.status is not Status.FINISHED]
        if group.grammar is not None and requests:
            error = group.grammar.exception()
            if error is not None:
                for request in requests:
                    self.loop.refuse(request, str(error))
                return
            # Without it, everybody would wait while the first step with masks is compiled.
            compiling = self.loop.compiler.prepare(_MASKED)
            if compiling is not None:
                self._after(compiling, lambda: self._start_group(group))
                return
            for request in requests:
                ends = not request.params.ignore_eos
                request.matcher = group.grammar.result().matcher(ends=ends)
        for request in requests:
            self.loop.submit(request)

    def _after(self, future: Future[Any], command: Callable[[], None]) -> None:
        """Has this thread do something after a future is over."""
        future.add_done_callback(lambda _: self._post(command))

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _wind_up(self) -> None:
        self._run_commands()
        for request in list(self._group_of):
            self.loop.abort(request)
        self.loop.drain()
        self._publish()
        self.loop.shut_down()

    def _fail(self, failure: BaseException) -> None:
        """Tells everybody who waits; nobody can wait afterwards."""
        with self._wake:
            self.failure = failure
            listeners = dict(self._listeners)
        for group in listeners:
            for request in group.requests:
                if request.status is not Status.FINISHED:
                    request.finish_reason = "error"
                    request.error = f"the engine has failed: {failure}"
                    request.status = Status.FINISHED
        self._tell(listeners)

    def _publish(self) -> None:
        """Tells every listener whose requests moved, once per step."""
        changed, self._changed = self._changed, {}
        listeners = {group: self._listeners[group] for group in changed}
        for group in changed:
            if group.finished:
                with self._wake:
                    del self._listeners[group], self._by_id[group.id]
        self._tell(listeners)

    def _tell(self, listeners: Mapping[Group, Listener]) -> None:
        """Calls each listener with all of its groups; one that fails, such as that of an event loop
        that is gone, loses its requests and harms nobody else."""
        groups_of: dict[Listener, list[Group]] = {}
        for group, listener in listeners.items():
            groups_of.setdefault(listener, []).append(group)
        for listener, groups in groups_of.items():
            try:
                listener(groups)
            except Exception:
                names = ", ".join(group.id for group in groups)
                _log.warning("nobody listens to %s any more", names, exc_info=True)
                for group in groups:
                    self.abort_group(group)

    def on_token(self, request: Request) -> str | int | None:
        """Takes a new token's text; returns the stop string it completes, if any."""
        group = self._group_of[request]
        self._changed[group] = None
        text = group.texts[request]
        token = request.output_ids[-1]
        if text is None or (token in request.stop_ids and not _keeps_stop(request)):
            return None
        return text.push(token)

    def on_finish(self, request: Request) -> None:
        """A request is over."""
        with self._wake:
            group = self._group_of.pop(request)
        self._changed[group] = None
        text = group.texts[request]
        if text is not None and not isinstance(request.stop_reason, str):
            text.finish()


def _keeps_stop(request: Request) -> bool:
    """Whether the stop token's text belongs to the output: asked for, or not reached min_tokens."""
    params = request.params
    return params.include_stop_str_in_output or len(request.output_ids) <= params.min_tokens
