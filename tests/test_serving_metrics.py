"""Metrics against what really ran, read back with Prometheus' own parser."""

import asyncio
from collections import Counter

import numpy as np
import pytest
from engine_requests import greedy
from prometheus_client.parser import text_string_to_metric_families

from ellm_jax.loop_stats import Load, LoopStats
from ellm_jax.memory.report import MemoryReport
from ellm_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from ellm_jax.serving.call import Call
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.latencies import Latencies
from ellm_jax.serving.metrics import Metrics
from ellm_jax.serving.observers import Observers
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant

ANN, BOB = Tenant("ann"), Tenant("bob")


def series(name: str, *labels: str) -> tuple[str, ...]:
    """A sample's name and its labels' values, in an order that does not depend on who wrote it."""
    return name, *sorted(labels)


class Values(dict[tuple[str, ...], float]):
    """Samples; `values["name", "label's value", ...]`."""

    def __getitem__(self, key: tuple[str, ...]) -> float:
        return super().__getitem__(series(*key))


def values(text: bytes) -> Values:
    """Every sample; types and names are checked on the way."""
    found = Values()
    for family in text_string_to_metric_families(text.decode()):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            key = series(sample.name, *sample.labels.values())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


class QuietEngine:
    """Figures of an engine that does nothing."""

    asleep = False

    def memory(self) -> MemoryReport:
        owners = dict.fromkeys(("kv", "cache", "activation", "workspace"), 0)
        return MemoryReport(
            limit_bytes=100,
            free_bytes=60,
            weights_bytes=40,
            **{f"{owner}_bytes": count for owner, count in owners.items()},
            available_bytes=0,
            backed_bytes=0,
            physical_bytes=40,
            peaks={},
        )

    def stats(self) -> LoopStats:
        return LoopStats()

    def load(self) -> Load:
        return Load(running=0, waiting=0, moving=0, offloaded=0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def call(tenant: Tenant = ANN, **more: object) -> Call:
    return Call(prompt=[1, 2], params=greedy(4), tenant=tenant, **more)


def output(reason: str = "stop", tokens: int = 3, tpot_ms: float = 20.0) -> RequestOutput:
    finished_s = 1000.0 + (tokens - 1) * tpot_ms / 1e3
    completion = CompletionOutput(0, "", tuple(range(tokens)), reason)
    metrics = RequestMetrics(
        arrival_s=999.0,
        first_scheduled_s=999.5,
        first_token_s=1000.0,
        finished_s=finished_s,
        cached_tokens=1,
        output_tokens=tokens,
    )
    return RequestOutput("r", None, (1, 2), (completion,), True, metrics)


def test_counters_say_what_ran(tiny_checkpoint, make_engine):
    """Calls that end in every way, in so little memory that it moves."""
    engine = make_engine(
        tiny_checkpoint("llama", context=1024), device_memory="10MiB", max_num_seqs=8
    )
    metrics = Metrics(engine, model_name="small")
    outputs = []

    async def run() -> None:
        service = Service(engine, ServeConfig(max_n=2), metrics)
        calls = [
            Call(list(range(3, 60 + i)), greedy(120 + 5 * i), tenant)
            for i, tenant in enumerate([ANN, BOB] * 6)
        ]
        outputs.extend(await asyncio.gather(*(service.complete(each) for each in calls)))
        with pytest.raises(ServiceError, match="n has 3"):
            await service.complete(Call([5], greedy(3, n=3), ANN))
        stream = service.stream(Call([5], greedy(900), BOB))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(ServiceError, match="deadline"):
            await service.complete(Call([6], greedy(1000), ANN, deadline_s=0.05))
        await service.drain(60)
        await service.close()

    asyncio.run(asyncio.wait_for(run(), 240))
    engine.generate([7], greedy(2))  # settles what was aborted
    found = values(metrics.render())
    assert found["ellm_requests_total", "length"] == 12
    assert found["ellm_requests_total", "abort"] == 1
    assert found["ellm_requests_total", "deadline"] == 1
    assert found["ellm_requests_total", "error"] == 0
    assert found["ellm_requests_refused_total", "too_large"] == 1
    assert found["ellm_requests_open",] == 0
    assert found["ellm_request_seconds_count",] == 12
    assert 13 <= found["ellm_time_to_first_token_seconds_count",] <= 14
    assert found["ellm_queue_seconds_count",] == found["ellm_time_to_first_token_seconds_count",]

    answered = sum(len(each.token_ids) for each in outputs)
    assert answered == sum(120 + 5 * i for i in range(12))
    assert answered < found["ellm_output_tokens_total",] < answered + 1900
    stats = engine.stats()
    assert found["ellm_output_tokens_total",] == stats.output_tokens
    assert found["ellm_prefix_lookups_total",] == stats.started >= 14
    cached = sum(each.metrics.cached_tokens for each in outputs)
    assert found["ellm_cached_prompt_tokens_total",] == stats.cached_tokens == cached
    events = engine.events()
    kinds = Counter(event.kind for event in events)
    assert kinds["inflate"] > 0
    for kind, count in kinds.items():
        assert found["ellm_memory_moves_total", kind] == count
        moved = sum(event.bytes for event in events if event.kind == kind)
        assert found["ellm_memory_moved_bytes_total", kind] == moved
    for queue in ("running", "waiting", "moving", "offloaded"):
        assert found["ellm_engine_requests", queue] == 0

    tenants = values(metrics.render(admin=True))
    of_ann = sum(len(each.token_ids) for each in outputs[::2])
    assert tenants["ellm_tenant_tokens_total", "ann", "output"] == of_ann
    assert tenants["ellm_tenant_requests_total", "bob", "length"] == 6
    assert tenants["ellm_tenant_requests_total", "bob", "abort"] == 1
    assert tenants["ellm_tenant_requests_total", "ann", "refused_too_large"] == 1
    assert set(found) < set(tenants)


def test_owners_add_up_to_the_limit_of_each_tier(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), host_memory="8MiB", policy="elastic")
    metrics = Metrics(engine)
    futures = [engine.submit([5, 6, i], greedy(60)) for i in range(8)]
    for _ in range(50):
        found = values(metrics.render())
        for tier in ("device", "host"):
            owners = [v for k, v in found.items() if k[0] == "ellm_memory_bytes" and tier in k]
            assert len(owners) >= 2
            assert sum(owners) == found["ellm_memory_limit_bytes", tier], tier
    for future in futures:
        future.result(timeout=120)
    engine.resize(device_memory="48MiB")
    found = values(metrics.render())
    assert found["ellm_memory_limit_bytes", "device"] == 48 * 2**20
    assert found["ellm_memory_moves_total", "resize"] == 1


def test_nobody_but_the_admin_sees_tenants():
    metrics = Metrics(QuietEngine())
    metrics.on_refused(ServiceError(ErrorKind.OVERLOADED, "full"), Tenant("secret name"))
    assert b"secret name" not in metrics.render()
    assert b"secret name" in metrics.render(admin=True)


def test_two_servers_in_a_process_count_apart():
    one, other = Metrics(QuietEngine()), Metrics(QuietEngine())
    one.on_refused(ServiceError(ErrorKind.OVERLOADED, "full"), ANN)
    assert values(one.render())["ellm_requests_refused_total", "overloaded"] == 1
    assert values(other.render())["ellm_requests_refused_total", "overloaded"] == 0


def test_targets_of_a_call_go_before_those_of_the_engine():
    clock = Clock()
    metrics = Metrics(QuietEngine(), ttft_ms=100, tpot_ms=30, clock=clock)
    for own, seconds, tpot_ms in [({}, 0.09, 20.0), ({}, 0.2, 40.0), ({"ttft_ms": 500}, 0.2, 30.0)]:
        each = call(**own)
        clock.now = 1000.0
        metrics.on_admitted(each, 2)
        clock.now += seconds
        metrics.on_first_token(each, output().metrics)
        metrics.on_finished(each, output(tpot_ms=tpot_ms))
    found = values(metrics.render())
    assert found["ellm_slo_requests_total", "ttft", "true"] == 2
    assert found["ellm_slo_requests_total", "ttft", "false"] == 1
    assert found["ellm_slo_requests_total", "tpot", "true"] == 2
    assert found["ellm_slo_requests_total", "tpot", "false"] == 1
    assert found["ellm_time_to_first_token_seconds_bucket", "0.1"] == 1
    assert found["ellm_time_to_first_token_seconds_bucket", "0.25"] == 3
    assert found["ellm_time_to_first_token_seconds_sum",] == pytest.approx(0.49)
    assert found["ellm_time_per_output_token_seconds_sum",] == pytest.approx(0.09)


@pytest.mark.parametrize("kind", list(ErrorKind))
@pytest.mark.parametrize("begun", [False, True])
def test_a_call_that_gets_nothing_misses_its_targets(kind, begun):
    metrics = Metrics(QuietEngine(), clock=Clock())
    each = call(ttft_ms=100.0, tpot_ms=10.0)
    for some in (each, call()):
        metrics.on_admitted(some, 2)
        if begun:
            metrics.on_first_token(some, output().metrics)
        metrics.on_finished(some, ServiceError(kind, "so it is"))
    found = values(metrics.render())
    ours = kind in (ErrorKind.DEADLINE, ErrorKind.OVERLOADED, ErrorKind.INTERNAL)
    for target in ("ttft", "tpot"):
        missed = found["ellm_slo_requests_total", target, "false"]
        assert missed == (1 if ours and not begun else 0)


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_error_ends_a_call_once(kind):
    metrics = Metrics(QuietEngine())
    each = call()
    metrics.on_admitted(each, 2)
    assert values(metrics.render())["ellm_requests_open",] == 1
    metrics.on_finished(each, ServiceError(kind, "so it is"))
    found = values(metrics.render())
    assert found["ellm_requests_open",] == 0
    ends = {k[1]: v for k, v in found.items() if k[0] == "ellm_requests_total"}
    assert sum(ends.values()) == 1
    assert ends["stop"] == ends["length"] == 0
    assert found["ellm_request_seconds_count",] == 0


def test_latencies_are_those_of_the_last_seconds():
    clock = Clock()
    latencies = Latencies(clock)
    assert latencies.ttft_ms(10) is None
    rng = np.random.default_rng(4)
    old, new = rng.exponential(100, 50), rng.exponential(20, 31)
    for ms in old:
        latencies.add_ttft(ms)
    clock.now += 20
    for ms in new:
        latencies.add_ttft(ms)
    assert latencies.ttft_ms(10) == pytest.approx(tuple(np.percentile(new, [50, 95])))
    both = np.concatenate([old, new])
    assert latencies.ttft_ms(30) == pytest.approx(tuple(np.percentile(both, [50, 95])))
    latencies.add_tpot(7.0)
    assert latencies.tpot_ms(10) == (7.0, 7.0)


def test_an_observer_that_fails_harms_nobody(caplog):
    class Broken(Metrics):
        def on_admitted(self, call: Call, prompt_tokens: int) -> None:
            raise RuntimeError("no room in the counter")

    metrics = Metrics(QuietEngine())
    observers = Observers(Broken(QuietEngine()), metrics)
    each = call()
    observers.on_admitted(each, 2)
    observers.on_finished(each, output())
    assert values(metrics.render())["ellm_requests_total", "stop"] == 1
    assert "no room in the counter" in caplog.text
