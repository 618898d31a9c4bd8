"""One request begins per iteration of the event loop, whoever else comes."""

import asyncio

from ellm_jax.serving.http.turns import Turns


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
