"""Which compiled step a batch runs on: warmed up at start, refined in the background."""

from __future__ import annotations

import logging
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait

import jax
from tqdm import tqdm

from ellm_jax._native import OutOfMemory, malloc_trim
from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.failures import CompileFailed
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape

_log = logging.getLogger(__name__)
_PLAIN = StepMode()

# A step that takes so long was compiled, not found in the cache. LLVM leaves tens of MB of heap
# behind then, which only a trim gives back, and the next step would take as many beside.
_COMPILED_S = 0.4

# After a step that could not be compiled for want of memory, in the background.
_RETRY_S = 30.0


def default_cache_directory() -> pathlib.Path:
    """Where compiled steps are kept unless an engine is told otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "ellm_jax" / "xla"


def use_compilation_cache(directory: str | None) -> None:
    """Keeps compiled steps in `directory` between runs; None: in the user's cache directory; "":
    nowhere. A cache that the process has set up for JAX already is left as it is."""
    if directory == "" or (directory is None and jax.config.values["jax_compilation_cache_dir"]):
        return
    directory = directory or str(default_cache_directory())
    jax.config.update("jax_compilation_cache_dir", directory)
    # Every step is worth keeping: together they are what a start waits for.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class StepCompiler:
    """Compiles steps, and picks one for a batch.

    A step that is compiled and covers the batch is taken rather than waiting for the exact one,
    which is then compiled in the background. Waited for is a mode never seen before, and, where
    padding costs as much as what is in use, a step of which only far too large ones are there.

    Compiling takes memory of the device where XLA tries out which kernels are fastest. No ledger
    knows how much, so it is asked to make way when there is not enough, and afterwards.

    Attributes:
        waited_s: seconds that `ensure` has spent compiling.
        make_way: gives back what nobody needs of the device's memory; None where compiling takes
            none of it.
    """

    def __init__(self, runner: Runner, buckets: Buckets, *, progress: bool):
        """`progress` shows what is compiled while somebody waits for it."""
        self._runner = runner
        self._buckets = buckets
        self._progress = progress
        self.make_way: Callable[[], object] | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="ellm-compile")
        self._pending: dict[StepKey, Future[int]] = {}
        self._failed: set[StepKey] = set()
        self._short_s: dict[StepKey, float] = {}  # when memory was short for it
        self._needs: dict[StepKey, int] = {}
        self._prepared: dict[StepMode, Future[int]] = {}
        self.waited_s = 0.0

    @property
    def compiled(self) -> int:
        """How many steps are compiled."""
        return len(self._needs)

    def warm_up(self) -> None:
        """Compiles steps that cover every batch in the plain mode, showing progress."""
        self.compile_all(self._buckets.common())

    def warm_up_all(self) -> None:
        """Compiles every step of the plain mode, so that none is compiled while requests run."""
        wait(list(self._pending.values()))
        self.collect()
        self.compile_all(self._buckets.every())

    def compile_all(self, shapes: Sequence[StepShape]) -> None:
        """Compiles steps of these shapes in the plain mode, several at a time."""
        keys = [key for shape in shapes if (key := StepKey(shape, _PLAIN)) not in self._needs]
        workers = min(4, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool, self._bar(len(keys), "Compiling steps") as bar:
            jobs = {pool.submit(self._compile, key): key for key in keys}
            try:
                for job in as_completed(jobs):
                    self._needs[jobs[job]] = job.result()
                    bar.update()
            except BaseException:
                # Who interrupts waits for what is being compiled, not for what was still to come.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._clean_up()

    def collect(self) -> None:
        """Takes over what the background has finished. Between two calls `choose` gives the same
        answers, unless `ensure` compiles something."""
        for key in [key for key, job in self._pending.items() if job.done()]:
            if key in self._failed:
                continue
            error = self._pending[key].exception()
            if error is None:
                self._needs[key] = self._pending.pop(key).result()
            elif _is_short(error):
                self._short_s[key] = time.monotonic()
                del self._pending[key]
            else:
                # It stays pending, so that it is not tried again; the covering step goes on.
                self._failed.add(key)
                _log.warning("a step could not be compiled in the background: %s", error)
            self._clean_up()

    def choose(self, rows: int, seqs: int, mode: StepMode) -> StepKey:
        """The compiled step to run for so many token rows and sequences, or the one to compile."""
        exact = StepKey(self._buckets.fit(rows, seqs), mode)
        if exact in self._needs:
            return exact
        covers = self._buckets.covers
        covering = [k for k in self._needs if k.mode == mode and covers(k.shape, rows, seqs)]
        return min(covering, key=_size, default=exact)

    def refine(self, rows: int, seqs: int, mode: StepMode) -> None:
        """Has the exact step compiled in the background, if it is not there yet."""
        exact = StepKey(self._buckets.fit(rows, seqs), mode)
        if exact in self._needs or exact in self._pending:
            return
        if time.monotonic() - self._short_s.get(exact, -_RETRY_S) >= _RETRY_S:
            self._pending[exact] = self._background.submit(self._runner.compile, exact)

    def prepare(self, mode: StepMode) -> Future[int] | None:
        """Has steps compiled in the background that every batch in this mode can run on. Returns
        what is over when they are, or None when that has been."""
        if mode not in self._prepared:
            # The background compiles one after the other: the last is the one to wait for.
            for shape in self._buckets.enough():
                key = StepKey(shape, mode)
                job = self._background.submit(self._compile, key)
                self._prepared[mode] = self._pending[key] = job
        last = self._prepared[mode]
        return None if last.done() else last

    def ensure(self, key: StepKey) -> int:
        """What the step needs in bytes; compiles it first if it is not.

        Raises:
            CompileFailed: XLA refuses it.
            OutOfMemory: the device has not enough left to compile it.
        """
        if key not in self._needs:
            begin = time.perf_counter()
            with self._bar(1, f"Compiling a step of {key.shape.rows} tokens") as bar:
                try:
                    self._needs[key] = self._compile_in_the_room_there_is(key)
                except Exception as error:
                    if _is_short(error):
                        raise OutOfMemory(f"no memory to compile a step with: {error}") from error
                    raise CompileFailed(
                        f"a step could not be compiled: {error}", key.mode
                    ) from error
                finally:
                    self.waited_s += time.perf_counter() - begin
                bar.update()
            self._clean_up()
        return self._needs[key]

    def _compile_in_the_room_there_is(self, key: StepKey) -> int:
        try:
            return self._compile(key)
        except Exception as error:
            if self.make_way is None or not _is_short(error):
                raise
        self.make_way()
        return self._compile(key)

    def _compile(self, key: StepKey) -> int:
        begin = time.perf_counter()
        need = self._runner.compile(key)
        if time.perf_counter() - begin >= _COMPILED_S:
            malloc_trim()
        return need

    def _clean_up(self) -> None:
        """After compiling: XLA's allocator may still hold what that took."""
        if self.make_way is not None:
            self.make_way()

    def need_bytes(self, rows: int, seqs: int, mode: StepMode, exact: bool) -> int:
        """What the step needs that `choose` gives for this size, or more: nothing is compiled for a
        plan that may come to nothing, as long as some step covers it. With `exact` the smallest
        bucket is compiled if it is not yet, where a larger one would do but needs more."""
        if exact:
            return self.ensure(StepKey(self._buckets.fit(rows, seqs), mode))
        key = self.choose(rows, seqs, mode)
        if key not in self._needs:
            larger = [k for k in self._needs if k.mode == mode and _holds(k.shape, rows, seqs)]
            key = min(larger, key=_size, default=key)
        return self.ensure(key)

    def close(self) -> None:
        """Gives up what waits to be compiled; what is being compiled ends on its own."""
        self._background.shutdown(wait=False, cancel_futures=True)

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", disable=not self._progress, leave=False)


def _size(key: StepKey) -> tuple[int, int]:
    return key.shape.rows, key.shape.seqs


def _holds(shape: StepShape, rows: int, seqs: int) -> bool:
    return shape.rows >= rows and shape.seqs >= seqs


def _is_short(error: BaseException) -> bool:
    """Whether XLA failed because the device has no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error)
