"""Whose turn it is: the queue, the shares of tenants, and what they do not share."""

import asyncio
import random
from collections import Counter

import pytest
from grpc_server import checked_engine
from hypothesis import given
from hypothesis import strategies as st
from serving_calls import ALICE, BOB, call, serving

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.fair_queue import FairQueue


@pytest.fixture(scope="module")
def engine():
    with checked_engine() as engine:
        yield engine


def test_a_full_queue_refuses_but_makes_room_for_a_tenant_below_its_share(engine):
    async def test(service, notes):
        seats = 2 * engine.config.max_num_seqs
        streams = [await service.open(call(900, (5, i))) for i in range(seats + 4)]
        assert service.stats().queued == 4
        with pytest.raises(ServiceError) as caught:
            await service.open(call(4))
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert caught.value.retry_after_s >= 1
        bobs = await service.open(call(4, tenant=BOB))
        with pytest.raises(ServiceError) as caught:
            async for _ in streams[-1]:
                pass
        assert caught.value.kind is ErrorKind.OVERLOADED
        assert service.stats().queued_by_tenant == {"alice": 3, "bob": 1}
        streams[0].close()
        async for _ in bobs:
            pass
        assert bobs.output().finished
        assert not streams[-2].group.finished, "the other tenant was served before"
        bobs.close()
        for stream in streams:
            stream.close()

    serving(engine, test, max_queue=4)


def test_completions_above_the_seats_run_alone(engine):
    async def test(service, notes):
        wide = call(4, n=3 * engine.config.max_num_seqs)
        output, other = await asyncio.gather(service.complete(wide), service.complete(call(4)))
        assert len(output.outputs) == 3 * engine.config.max_num_seqs
        assert other.finished

    serving(engine, test, max_n=64, max_queue=1)


class Model:
    """The queue in the simplest words: a clock per tenant, the lowest is next."""

    def __init__(self):
        self.items, self.clocks, self.now = [], {}, 0.0

    def push(self, tenant, number, priority, cost):
        if tenant not in self.clocks:
            self.clocks[tenant] = self.now
        self.items.append((tenant, priority, number, cost))

    def pop(self):
        def first(tenant):
            return min(i[1:3] for i in self.items if i[0] == tenant)

        waiting = {item[0] for item in self.items}
        tenant = min(waiting, key=lambda t: (self.clocks[t], first(t)[1]))
        item = min((i for i in self.items if i[0] == tenant), key=lambda i: i[1:3])
        self.now = max(self.now, self.clocks[tenant])
        self.clocks[tenant] += item[3]
        self.take(item)
        return item[2]

    def take(self, item):
        self.items.remove(item)
        idle = item[0] not in {i[0] for i in self.items}
        if idle and self.clocks[item[0]] <= self.now:
            del self.clocks[item[0]]


@given(st.lists(st.tuples(st.sampled_from("ppprx"), st.integers(0, 99)), max_size=60))
def test_the_queue_does_as_its_model(moves):
    queue, model, number = FairQueue(), Model(), 0
    items = {}
    for move, value in moves:
        if move == "p":
            tenant, priority, cost = "abc"[value % 3], value % 2, 1.0 + value % 7
            items[number] = [number]
            queue.push(tenant, items[number], priority, cost, 1 + value % 3)
            model.push(tenant, number, priority, cost)
            number += 1
        elif move == "r" and model.items:
            victim = model.items[value % len(model.items)]
            model.take(victim)
            assert queue.remove(items[victim[2]])
            assert not queue.remove(items[victim[2]])
        elif move == "x" and model.items:
            assert queue.peek_seats() is not None
            assert queue.pop()[0] == model.pop()
        assert len(queue) == len(model.items)
        assert sum(queue.waiting().values()) == queue.seats
    assert (queue.peek_seats() is None) == (not model.items)


def test_tenants_share_equally_however_much_one_asks():
    queue, rng = FairQueue(), random.Random(5)
    for index in range(500):
        queue.push("greedy", [index], 0, rng.choice([1.0, 10.0]), 1)
    for index in range(100):
        queue.push("modest", [1000 + index], 0, 5.0, 1)
    served = Counter()
    for _ in range(150):
        item = queue.pop()
        served["modest" if item[0] >= 1000 else "greedy"] += 1
    assert served["modest"] >= 70


def test_tenants_share_no_prefixes(engine):
    async def test(service, notes):
        prompt = list(range(100, 400))
        first = await service.complete(call(2, prompt, ALICE))
        others = await service.complete(call(2, prompt, BOB))
        again = await service.complete(call(2, prompt, ALICE))
        assert first.metrics.cached_tokens == others.metrics.cached_tokens == 0
        assert again.metrics.cached_tokens > 0

    serving(engine, test)
