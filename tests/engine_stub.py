"""An engine of which only the times are real: for tests of what measures engines."""

import queue
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

from ellm_jax.loop_stats import LoopStats
from ellm_jax.memory.events import MemoryEvent
from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput

LIMIT = 1000
OWNERS = ("free", "kv", "cache", "activation", "weights", "workspace")


class StubEngine:
    """Serves one request after the other: `prefill_s` to its first token, `token_s` for each
    further one. Notes what it was asked, and checks that prompts of different salts and runs are
    never repeated."""

    def __init__(self, prefill_s: float = 0.004, token_s: float = 0.002, max_model_len: int = 4096):
        self.prefill_s, self.token_s = prefill_s, token_s
        self.max_model_len = max_model_len
        self.tokenizer = None
        self.model_config = SimpleNamespace(vocab_size=1000)
        self.config = SimpleNamespace(max_num_seqs=4)
        self.calls: list[str] = []
        self.asked: list[dict[str, object]] = []
        self.closed = False
        self._aborted: set[str] = set()
        self._stats = LoopStats()
        self._events: list[MemoryEvent] = []
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, prompt, params, **options):
        future: Future[RequestOutput] = Future()
        self.asked.append({"prompt": tuple(prompt), "tokens": params.max_tokens, **options})
        self._queue.put((future, prompt, params.max_tokens, options, time.monotonic()))
        return future

    def abort(self, request_id):
        self._aborted.add(request_id)
        return True

    def _serve(self):
        while (work := self._queue.get()) is not None:
            future, prompt, tokens, options, arrival_s = work
            name = options.get("request_id", "")
            if name in self._aborted:
                future.set_result(output(prompt, 0, RequestMetrics(arrival_s), "abort"))
                continue
            time.sleep(self.prefill_s)
            first_s = time.monotonic()
            time.sleep(self.token_s * (tokens - 1))
            now = time.monotonic()
            self._stats.steps += tokens
            self._stats.peak_running = 1
            self._stats.prompt_tokens += len(prompt)
            self._stats.decode_tokens += tokens - 1
            self._stats.decode_s += now - first_s
            self._stats.moves["inflate"] = self._stats.moves.get("inflate", 0) + 1
            self._events.append(MemoryEvent(now, "inflate", 7, "test", 1.0))
            metrics = RequestMetrics(arrival_s, arrival_s, first_s, now, output_tokens=tokens)
            future.set_result(output(prompt, tokens, metrics, "length"))

    def memory(self):
        usage = dict.fromkeys(OWNERS, 100) | {"free": LIMIT - 500, "limit": LIMIT}
        usage |= {"available": 0, "backed_free": 0, "physical": 0}
        usage |= {f"peak_{owner}": 200 for owner in OWNERS}
        return MemoryReport.from_usage(usage)

    def events(self):
        return list(self._events)

    def stats(self):
        return self._stats

    def cost_model(self):
        return {"fixed_s": self.prefill_s}

    def warm_up(self):
        self.calls.append("warm_up")

    def trim(self):
        self.calls.append("trim")

    def reset_stats(self):
        self.calls.append("reset_stats")
        self._stats = LoopStats()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._queue.put(None)
        self._thread.join()
        self.closed = True


def output(prompt, tokens, metrics, reason):
    completion = CompletionOutput(0, "", (1,) * tokens, reason)
    return RequestOutput("r", None, tuple(prompt), (completion,), True, metrics)
