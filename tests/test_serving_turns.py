"""Few requests begin per iteration of the event loop, whoever else comes."""

import asyncio
import contextlib
import threading
from collections import Counter

import pytest
from engine_requests import wait_until
from http_server import RunningServer, read_reply, request_bytes

from ellm_jax.serving.http import protocol
from ellm_jax.serving.turns import Gradually, Spread, Turns


def test_one_goes_through_per_iteration_in_order():
    async def crowd() -> tuple[list[tuple[int, int]], int]:
        loop = asyncio.get_running_loop()
        iteration = 0
        through: list[tuple[int, int]] = []
        turns = Turns()

        def count() -> None:
            nonlocal iteration
            iteration += 1
            loop.call_soon(count)

        async def come(number: int) -> None:
            await turns.wait()
            through.append((number, iteration))

        loop.call_soon(count)
        tasks = [asyncio.ensure_future(come(number)) for number in range(50)]
        await asyncio.sleep(0)
        # Who gives up takes nobody's turn.
        for task in tasks[10:20]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        first = len(through)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        before = iteration
        await turns.wait()
        assert iteration == before, "alone, nobody waits"
        return through, first

    through, first = asyncio.run(crowd())
    assert first == 40
    assert [number for number, _ in through] == [*range(10), *range(20, 50)]
    iterations = [iteration for _, iteration in through]
    assert len(set(iterations)) == len(iterations), "two in one iteration"


def test_so_many_are_called_per_iteration_in_order():
    async def crowd() -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        iteration = 0
        called: list[tuple[int, int]] = []
        gradually = Gradually(3)

        def count() -> None:
            nonlocal iteration
            iteration += 1
            loop.call_soon(count)

        loop.call_soon(count)
        for number in range(20):
            gradually.call(loop, lambda number=number: called.append((number, iteration)))
        assert len(called) == 3, "those that are few wait"
        while len(called) < 20:
            await asyncio.sleep(0)
        return called

    called = asyncio.run(asyncio.wait_for(crowd(), 30))
    assert [number for number, _ in called] == list(range(20))
    assert max(Counter(iteration for _, iteration in called).values()) == 3


def test_things_are_spread_and_wait_once():
    async def crowd() -> tuple[list[list[int]], int]:
        loop = asyncio.get_running_loop()
        rounds: list[list[int]] = [[]]
        settled = 0

        def count() -> None:
            rounds.append([])
            if len(rounds) < 20:
                loop.call_soon(count)

        def note() -> None:
            nonlocal settled
            settled += 1

        def each(thing: int) -> None:
            if thing == 13:
                raise ValueError("a thing that fails")
            rounds[-1].append(thing)

        errors: list[object] = []
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        spread = Spread(4, each, note)
        loop.call_soon(count)
        spread.add(range(20))
        spread.add([1, 19, 18])  # 1 was done, the others wait
        while len(rounds) < 20:
            await asyncio.sleep(0)
        assert [str(error) for error in errors] == ["a thing that fails"]
        spread.add([7])
        await asyncio.sleep(0)
        return rounds, settled

    rounds, settled = asyncio.run(asyncio.wait_for(crowd(), 30))
    things = [thing for some in rounds for thing in some]
    assert things == [*range(13), *range(14, 20), 1, 7]
    assert max(map(len, rounds)) == 4
    assert settled == 2


def test_heads_that_come_at_once_are_read_in_turns(make_engine, monkeypatch: pytest.MonkeyPatch):
    taken: Counter[int] = Counter()
    iteration = 0
    take = protocol.BoundedProtocol._take

    def counted(self: protocol.BoundedProtocol, data: bytes) -> None:
        taken[iteration] += 1
        take(self, data)

    monkeypatch.setattr(protocol.BoundedProtocol, "_take", counted)
    with RunningServer(make_engine(None)) as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(server.connect()) for _ in range(100)]
        wait_until(lambda: len(server._server.server_state.connections) == 100)

        def count() -> None:
            nonlocal iteration
            iteration += 1
            if not over:
                server.loop.call_soon(count)

        over = False
        server.loop.call_soon_threadsafe(count)
        for _ in range(2):  # again on the same connections
            taken.clear()
            held = threading.Event()
            server.loop.call_soon_threadsafe(held.wait, 30)
            for connection in crowd:
                connection.sendall(request_bytes("GET", "/health"))
            held.set()
            assert all(read_reply(connection)[0] == 200 for connection in crowd)
            assert sum(taken.values()) == 100
            assert max(taken.values()) <= 4
        over = True
