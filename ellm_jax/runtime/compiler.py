"""Which compiled step a batch runs on: warmed up at start, refined in the background."""

from __future__ import annotations

import logging
import os
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import jax
from tqdm import tqdm

from ellm_jax.runtime.buckets import Buckets
from ellm_jax.runtime.failures import CompileFailed
from ellm_jax.runtime.runner import Runner
from ellm_jax.runtime.shapes import StepKey, StepMode, StepShape

_log = logging.getLogger(__name__)
_PLAIN = StepMode()


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
    which is then compiled in the background. Only a mode never seen before is waited for.

    Attributes:
        waited_s: seconds that `ensure` has spent compiling.
    """

    def __init__(self, runner: Runner, buckets: Buckets, *, progress: bool):
        """`progress` shows what is compiled while somebody waits for it."""
        self._runner = runner
        self._buckets = buckets
        self._progress = progress
        self._background = ThreadPoolExecutor(1, thread_name_prefix="ellm-compile")
        self._pending: dict[StepKey, Future[int]] = {}
        self._failed: set[StepKey] = set()
        self._needs: dict[StepKey, int] = {}
        self.waited_s = 0.0

    def warm_up(self) -> None:
        """Compiles steps that cover every batch in the plain mode, showing progress."""
        self._compile(self._buckets.common())

    def warm_up_all(self) -> None:
        """Compiles every step of the plain mode, so that none is compiled while requests run."""
        for job in list(self._pending.values()):
            job.result()
        self.collect()
        self._compile(self._buckets.every())

    def _compile(self, shapes: Sequence[StepShape]) -> None:
        keys = [key for shape in shapes if (key := StepKey(shape, _PLAIN)) not in self._needs]
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool, self._bar(len(keys), "Compiling steps") as bar:
            jobs = {pool.submit(self._runner.compile, key): key for key in keys}
            try:
                for job in as_completed(jobs):
                    self._needs[jobs[job]] = job.result()
                    bar.update()
            except BaseException:
                # Who interrupts waits for what is being compiled, not for what was still to come.
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def collect(self) -> None:
        """Takes over what the background has finished. Between two calls `choose` gives the same
        answers, unless `ensure` compiles something."""
        for key in [key for key, job in self._pending.items() if job.done()]:
            job = self._pending[key]
            error = job.exception()
            if error is None:
                self._needs[key] = self._pending.pop(key).result()
            elif key not in self._failed:
                # It stays pending, so that it is not tried again; the covering step goes on.
                self._failed.add(key)
                _log.warning("a step could not be compiled in the background: %s", error)

    def choose(self, rows: int, seqs: int, mode: StepMode) -> StepKey:
        """The compiled step to run for so many token rows and sequences, or the one to compile."""
        exact = StepKey(self._buckets.fit(rows, seqs), mode)
        if exact in self._needs:
            return exact
        covering = [
            key
            for key in self._needs
            if key.mode == mode and key.shape.rows >= rows and key.shape.seqs >= seqs
        ]
        return min(covering, key=lambda k: (k.shape.rows, k.shape.seqs), default=exact)

    def refine(self, rows: int, seqs: int, mode: StepMode) -> None:
        """Has the exact step compiled in the background, if it is not there yet."""
        exact = StepKey(self._buckets.fit(rows, seqs), mode)
        if exact not in self._needs and exact not in self._pending:
            self._pending[exact] = self._background.submit(self._runner.compile, exact)

    def ensure(self, key: StepKey) -> int:
        """What the step needs in bytes; compiles it first if it is not.

        Raises:
            CompileFailed: XLA refuses it.
        """
        if key not in self._needs:
            begin = time.perf_counter()
            with self._bar(1, f"Compiling a step of {key.shape.rows} tokens") as bar:
                try:
                    self._needs[key] = self._runner.compile(key)
                except Exception as error:
                    raise CompileFailed(
                        f"a step could not be compiled: {error}", key.mode
                    ) from error
                bar.update()
            self.waited_s += time.perf_counter() - begin
        return self._needs[key]

    def need_bytes(self, rows: int, seqs: int, mode: StepMode, exact: bool) -> int:
        """What the step needs that `choose` gives for this size. With `exact` the smallest bucket
        is compiled for it if it is not yet, where a larger one would do but needs more."""
        if exact:
            return self.ensure(StepKey(self._buckets.fit(rows, seqs), mode))
        return self.ensure(self.choose(rows, seqs, mode))

    def close(self) -> None:
        """Gives up what waits to be compiled; what is being compiled ends on its own."""
        self._background.shutdown(wait=False, cancel_futures=True)

    def _bar(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", disable=not self._progress, leave=False)
