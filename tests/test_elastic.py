"""The elastic engine keeps its promises: the same answers whatever the policy, the limits, what is
shared and what is moved; prefixes computed once; limits that hold while they change."""

import threading
import time

import numpy as np
import pytest
from engine_requests import greedy

from ellm_jax.config import POLICY_NAMES
from ellm_jax.request import Status
from ellm_jax.runtime.failures import StepFailed


def prompts(count, seed, low=8, high=120):
    rng = np.random.default_rng(seed)
    return [
        [int(t) for t in rng.integers(3, 500, size=int(rng.integers(low, high)))]
        for _ in range(count)
    ]


def tokens(outputs):
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(tiny_checkpoint):
    """Answers of requests that run one by one, in plenty of memory, with nothing shared."""
    from ellm_jax import Engine, EngineConfig

    path = tiny_checkpoint("llama", context=1024)
    config = EngineConfig(
        device_memory="256MiB", max_num_seqs=2, prefix_caching=False, progress=False, warm_up=False
    )
    made = {}
    with Engine.from_pretrained(path, config) as engine:

        def answer(prompt, count):
            key = (tuple(prompt), count)
            if key not in made:
                made[key] = engine.generate(prompt, greedy(count))[0].token_ids
            return made[key]

        yield answer


CASES = [(policy, "0") for policy in POLICY_NAMES]
CASES += [("inter", "64MiB"), ("elastic", "2MiB"), ("elastic", "64MiB")]


@pytest.mark.parametrize(("policy", "host_memory"), CASES)
def test_answers_do_not_depend_on_the_policy(
    policy, host_memory, tiny_checkpoint, make_engine, alone
):
    path = tiny_checkpoint("llama", context=1024)
    several = prompts(16, seed=7)
    # What "static" reserves for whole prompts comes on top, so that each has little left for KV.
    memory = {"static": "16MiB", "inter": "16MiB"}.get(policy, "10MiB")
    engine = make_engine(
        path,
        policy=policy,
        device_memory=memory,
        host_memory=host_memory,
        max_num_seqs=12,
        max_batch_tokens=None if policy in ("static", "inter") else 64,
        ttft_ms=20.0,
        tpot_ms=50.0,
    )
    for count in (3, 120):
        outputs = engine.generate(several, greedy(count))
        expected = [alone(prompt, count) for prompt in several]
        assert tokens(outputs) == expected
    stats = engine.stats()
    assert engine.memory().kv_bytes == 0
    assert engine.memory().host_used_bytes == 0 or stats.moves.get("offload")
    if policy in ("static", "static-chunked", "intra"):
        assert not stats.moves.get("offload")


def test_a_full_pool_moves_requests_to_host_memory(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    several = prompts(16, seed=3, low=90, high=120)
    engine = make_engine(
        path, device_memory="9MiB", host_memory="64MiB", max_num_seqs=16, ttft_ms=1.0
    )
    outputs = engine.generate(several, greedy(200))
    assert tokens(outputs) == [alone(prompt, 200) for prompt in several]
    stats = engine.stats()
    assert stats.moves["offload"] > 0
    assert stats.moves["fetch"] > 0
    assert sum(output.metrics.num_offloads for output in outputs) > 0
    moved = {event.request_id for event in engine.events() if event.kind == "offload"}
    assert moved
    assert all(event.us >= 0 and event.bytes > 0 for event in engine.events())


def test_a_shared_prefix_is_computed_once(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="64MiB", max_num_seqs=32)
    tile = engine._loop.ledger.tile_tokens
    system = prompts(1, seed=5, low=5 * tile, high=5 * tile + 1)[0]
    asked = [[*system, 7, 8, 9, number] for number in range(100)]
    engine.reset_stats()
    outputs = engine.generate(asked, greedy(4))
    stats = engine.stats()
    computed = stats.prompt_tokens - stats.cached_tokens
    assert computed == len(asked[0]) + 99 * (len(asked[0]) - 5 * tile), "the prefix came twice"
    assert sorted(output.metrics.cached_tokens for output in outputs) == [0] + [5 * tile] * 99
    assert tokens(outputs[:10]) == [alone(prompt, 4) for prompt in asked[:10]]


def test_a_chat_goes_on_from_what_was_computed(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="64MiB")
    tile = engine._loop.ledger.tile_tokens
    history = prompts(1, seed=11, low=100, high=101)[0]
    held = 0
    for turn in range(4):
        output = engine.generate(history, greedy(30))[0]
        assert output.token_ids == alone(history, 30)
        # All of the last turn but its last tile, which was not full.
        assert output.metrics.cached_tokens >= (held // tile - 1) * tile
        held = len(history) + 30
        history = [*history, *output.token_ids, 5 + turn]


def test_salts_share_nothing(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024))
    prompt = prompts(1, seed=2, low=200, high=201)[0]

    def cached(salt):
        return engine.generate(prompt, greedy(2), cache_salt=salt)[0].metrics.cached_tokens

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0
    assert cached("") == 0


def test_prefixes_give_way(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="9MiB", max_num_seqs=4)
    several = prompts(40, seed=23, low=200, high=300)
    assert tokens(engine.generate(several, greedy(3))) == [alone(p, 3) for p in several]
    assert engine.stats().moves["evict"] > 0
    assert engine.memory().cache_bytes > 0
    engine.trim()
    assert engine.memory().cache_bytes == 0


@pytest.mark.parametrize("host_memory", ["0", "64MiB"])
def test_limits_change_while_requests_run(host_memory, tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(
        path, device_memory="32MiB", host_memory=host_memory, max_num_seqs=12, max_batch_tokens=64
    )
    several = prompts(16, seed=31)
    futures = [engine.submit(prompt, greedy(250)) for prompt in several]
    for limit in ("9MiB", "24MiB", "8MiB", "9500KiB", "32MiB", "8MiB", "64MiB"):
        time.sleep(0.15)
        engine.resize(device_memory=limit)
        report = engine.memory()
        assert report.physical_bytes <= report.limit_bytes
    for prompt, future in zip(several, futures, strict=True):
        assert future.result(timeout=120).token_ids == alone(prompt, 250)
    assert engine.stats().moves["resize"] == 7


def test_a_request_beyond_a_lower_limit_waits_until_it_is_raised(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024), device_memory="64MiB")
    future = engine.submit([5] * 500, greedy(400))
    short = engine.submit([5] * 10, greedy(2))
    engine.resize(device_memory="7MiB")
    assert short.result(timeout=60).finished
    time.sleep(0.3)
    assert not future.done()
    with pytest.raises(ValueError, match="raise device_memory"):
        engine.submit([5] * 500, greedy(400))
    engine.resize(device_memory="64MiB")
    assert len(future.result(timeout=120).token_ids) == 400


def test_a_limit_that_cannot_be(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))
    before = engine.memory().limit_bytes
    with pytest.raises(ValueError, match="give that or more"):
        engine.resize(device_memory="1MiB")
    assert engine.memory().limit_bytes == before
    static = make_engine(tiny_checkpoint("llama"), policy="static", max_batch_tokens=None)
    with pytest.raises(ValueError, match="no host tier"):
        static.resize(host_memory="1MiB")


@pytest.mark.parametrize("host_memory", ["0", "64MiB"])
def test_sleep_gives_nearly_everything_back(host_memory, tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(path, device_memory="32MiB", host_memory=host_memory, max_num_seqs=12)
    several = prompts(8, seed=41)
    futures = [engine.submit(prompt, greedy(200)) for prompt in several]
    time.sleep(0.3)
    engine.sleep()
    report = engine.memory()
    assert report.weights_bytes == report.kv_bytes == report.cache_bytes == 0
    assert report.physical_bytes == report.workspace_bytes
    late = engine.submit(several[0], greedy(5))
    time.sleep(0.2)
    assert not late.done()
    assert not all(future.done() for future in futures)
    engine.sleep()  # again changes nothing
    engine.wake()
    for prompt, future in zip(several, futures, strict=True):
        assert future.result(timeout=120).token_ids == alone(prompt, 200)
    assert late.result(timeout=60).token_ids == alone(several[0], 5)


def test_host_memory_that_shrinks_loses_no_request(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(
        path, device_memory="9MiB", host_memory="64MiB", max_num_seqs=16, ttft_ms=1.0
    )
    several = prompts(16, seed=3, low=90, high=120)
    futures = [engine.submit(prompt, greedy(200)) for prompt in several]
    end = time.monotonic() + 60
    while engine.memory().host_used_bytes == 0 and time.monotonic() < end:
        time.sleep(0.01)
    engine.resize(host_memory="1MiB")
    assert engine.memory().host_used_bytes <= 2**20
    for prompt, future in zip(several, futures, strict=True):
        assert future.result(timeout=120).token_ids == alone(prompt, 200)


def test_priority_is_worth_waiting_time(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024), max_num_seqs=1)
    over = []
    lock = threading.Lock()

    def note(name):
        def callback(_):
            with lock:
                over.append(name)

        return callback

    for name, priority in (("first", 0), ("low", 5), ("usual", 0), ("high", -5)):
        future = engine.submit([5] * 20, greedy(30), priority=priority)
        future.add_done_callback(note(name))
        while name == "first" and not engine._loop.scheduler.running:
            time.sleep(0.001)
    end = time.monotonic() + 60
    while len(over) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    assert over == ["first", "high", "usual", "low"]


def test_aborting_wherever_a_request_is(tiny_checkpoint, make_engine):
    engine = make_engine(
        tiny_checkpoint("llama", context=1024),
        device_memory="9MiB",
        host_memory="64MiB",
        max_num_seqs=16,
        ttft_ms=1.0,
    )
    seen = set()
    for number in range(12):
        names = [f"{number}-{i}" for i in range(12)]
        futures = [
            engine.submit(prompt, greedy(150), request_id=name)
            for prompt, name in zip(prompts(12, seed=number, low=90), names, strict=True)
        ]
        time.sleep(0.03 * number)
        scheduler = engine._loop.scheduler
        seen |= {r.status for q in (scheduler.offloaded, scheduler.moving) for r in list(q)}
        for name in names:
            engine.abort(name)
        for future in futures:
            assert future.result(timeout=60).finished
    assert Status.OFFLOADED in seen
    assert engine.memory().kv_bytes == 0
    assert engine._loop.host.needed_bytes == 0


def test_who_waits_for_a_higher_limit_holds_nobody_up(tiny_checkpoint, make_engine):
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), device_memory="64MiB", host_memory="64MiB"
    )
    large = engine.submit([5] * 500, greedy(400))
    end = time.monotonic() + 60
    while engine.stats().steps < 20 and time.monotonic() < end:
        time.sleep(0.01)
    engine.resize(device_memory="7MiB")
    assert engine._loop.scheduler.offloaded or engine._loop.scheduler.moving
    plain = engine.submit([5] * 10, greedy(2))
    penalised = engine.submit([5] * 10, greedy(2, presence_penalty=0.5))
    behind = engine.submit([5] * 10, greedy(2))
    for future in (plain, penalised, behind):
        assert future.result(timeout=60).finished
    assert not large.done()
    engine.resize(device_memory="64MiB")
    assert len(large.result(timeout=120).token_ids) == 400


def test_limits_set_while_asleep_count_the_weights(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama", context=1024), device_memory="64MiB")
    engine.sleep()
    with pytest.raises(ValueError, match="give that or more"):
        engine.resize(device_memory="2MiB")
    engine.resize(device_memory="7MiB")
    room = engine._intake.room_bytes
    engine.wake()
    engine.resize(device_memory="7MiB")
    assert engine._intake.room_bytes == room
    assert len(engine.generate([5] * 10, greedy(3))[0].token_ids) == 3


class FailingBuffer:
    """A host buffer for which the system has no memory at every third call."""

    def __init__(self, buffer):
        self.buffer = buffer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.buffer, name)

    def take(self, n):
        self.calls += 1
        if self.calls % 3 == 2:
            raise RuntimeError("injected: no memory from the system")
        return self.buffer.take(n)


class Unwrapping:
    """A copier that takes the buffer out of its wrapping."""

    def __init__(self, copier):
        self.copier = copier

    def __getattr__(self, name):
        return getattr(self.copier, name)

    def offload(self, kv, slot, first_tile, buffer, blocks):
        return self.copier.offload(kv, slot, first_tile, buffer.buffer, blocks)

    def fetch(self, kv, slot, first_tile, buffer, blocks):
        return self.copier.fetch(kv, slot, first_tile, buffer.buffer, blocks)


def test_a_host_buffer_that_fails_costs_no_request(tiny_checkpoint, make_engine, alone):
    path = tiny_checkpoint("llama", context=1024)
    engine = make_engine(
        path, device_memory="9MiB", host_memory="64MiB", max_num_seqs=16, ttft_ms=1.0
    )
    host = engine._loop.host
    host._buffer = failing = FailingBuffer(host._buffer)
    host._copier = Unwrapping(host._copier)
    several = prompts(16, seed=3, low=90, high=120)
    assert tokens(engine.generate(several, greedy(150))) == [alone(p, 150) for p in several]
    assert failing.calls > 3, "nothing was refused"


def test_steps_that_do_not_start_are_planned_again(tiny_checkpoint, make_engine, monkeypatch):
    engine = make_engine(tiny_checkpoint("llama"))
    expected = tokens(engine.generate(prompts(4, seed=1), greedy(20)))
    dispatch, calls = engine._loop.executor.dispatch, iter(range(10000))

    def sometimes(plan, key):
        if next(calls) % 4 == 2:
            raise StepFailed("injected")
        return dispatch(plan, key)

    monkeypatch.setattr(engine._loop.executor, "dispatch", sometimes)
    assert tokens(engine.generate(prompts(4, seed=1), greedy(20))) == expected


def test_calls_that_wait_for_the_engine_are_refused_on_its_thread(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"))
    seen = []

    def callback(_):
        try:
            engine.trim()
        except RuntimeError as error:
            seen.append(str(error))

    future = engine.submit([5] * 5, greedy(200))
    future.add_done_callback(callback)
    engine.generate([5] * 5, greedy(400))
    assert "engine's thread" in seen[0]
