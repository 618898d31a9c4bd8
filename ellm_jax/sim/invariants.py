"""What is true of a world after every step, counted anew from what the requests hold."""

from __future__ import annotations

from collections.abc import Iterable

from ellm_jax.request import Request, Status
from ellm_jax.sim.world import World


def check_memory(world: World, requests: Iterable[Request]) -> None:
    """Looks at everything: `requests` are all that ever were.

    Raises:
        AssertionError: bytes, slots or blocks are not where they should be.
    """
    ledger, kv = world.ledger, world.kv
    ledger.check()
    usage, stats = ledger.usage(), kv.stats()
    assert usage["weights"] == (0 if world.loop.asleep else world.config.weights_bytes)
    assert usage["workspace"] == world.config.workspace_bytes
    assert usage["physical"] <= usage["limit"], f"more is taken than allowed: {usage}"
    needs = [world.steps.ensure(step.key) for step in world.executor.in_flight]
    assert usage["activation"] >= max(needs, default=0), "a step runs without its activations"

    holders = [request for request in requests if request.slot is not None]
    slots = [request.slot for request in holders if request.slot is not None]
    assert len(set(slots)) == len(slots), f"requests share a slot: {sorted(slots)}"
    broken = stats["broken_slots"]
    assert stats["active_slots"] + broken >= len(slots), "a slot of a request is not active"
    assert stats["active_slots"] <= len(slots), f"nobody has {stats['active_slots']} active slots"
    if not broken:
        _check_chunks(world, slots, usage)
    _check_pins(world, holders)
    _check_host(world, requests)


def _check_chunks(world: World, slots: list[int], usage: dict[str, int]) -> None:
    ledger, kv = world.ledger, world.kv
    used: set[int] = set()
    for slot in slots:
        chunks = ledger.chunks_for(kv.mapped_tokens(slot))
        # A mapping ahead that failed is found out by the step that needs it.
        counted = ledger.taken_bytes(slot)
        failed_ahead = slot in ledger._premapped and counted > chunks * ledger.chunk_bytes
        assert failed_ahead or counted == chunks * ledger.chunk_bytes, (
            f"slot {slot} has {chunks} chunks, and the ledger counts {ledger.taken_bytes(slot)} "
            "bytes"
        )
        used.update(kv.slot_chunks(slot, 0, chunks))
    assert usage["kv"] == len(used) * ledger.chunk_bytes, (
        f"slots hold {len(used)} chunks, and KV is {usage['kv']} bytes"
    )
    idle = ledger.prefix.evictable if ledger.prefix is not None else 0
    assert usage["cache"] == idle * ledger.chunk_bytes, (
        f"{idle} cached tiles are unused, and the cache is {usage['cache']} bytes"
    )


def _check_pins(world: World, holders: list[Request]) -> None:
    prefix = world.ledger.prefix
    if prefix is None:
        return
    pinned = {
        digest for r in holders if r.keys is not None for digest in r.keys.digests[: r.pinned]
    }
    assert len(pinned) == prefix.chunks - prefix.evictable, (
        f"requests pin {len(pinned)} tiles, the cache counts {prefix.chunks - prefix.evictable}"
    )


def _check_host(world: World, requests: Iterable[Request]) -> None:
    if world.buffer is None or world.host is None:
        return
    blocks: list[int] = []
    needed = 0
    for request in requests:
        if request.host is not None:
            blocks += request.host.blocks
            needed += len(request.host.blocks) * request.host.needed
    assert len(set(blocks)) == len(blocks), "two requests have the same block"
    assert set(blocks) == world.buffer.taken, (
        f"requests have {len(blocks)} blocks, {len(world.buffer.taken)} are taken"
    )
    assert needed == world.host.needed_blocks, (
        f"{needed} blocks are the only copy, the tier counts {world.host.needed_blocks}"
    )


_WITH_SLOT = {Status.RUNNING, Status.LEAVING, Status.FETCHING}


def check_queues(world: World, requests: Iterable[Request]) -> None:
    """Every request that is not over is in exactly one queue, and holds what that queue says."""
    scheduler = world.loop.scheduler
    queues = (scheduler.running, scheduler.waiting, scheduler.offloaded, scheduler.moving)
    queued = [request for queue in queues for request in queue]
    assert len(set(queued)) == len(queued), "a request is queued twice"
    expected = {request for request in requests if request.status is not Status.FINISHED}
    lost = expected - set(queued)
    assert not lost, f"lost: {sorted(request.id for request in lost)}"
    assert set(queued) == expected, "a request that is over is still queued"
    homes = (
        (scheduler.running, {Status.RUNNING}),
        (scheduler.waiting, {Status.WAITING}),
        (scheduler.offloaded, {Status.OFFLOADED}),
        (scheduler.moving, {Status.LEAVING, Status.FETCHING}),
    )
    for queue, allowed in homes:
        for request in queue:
            assert request.status in allowed, f"{request.id} is {request.status} in a wrong queue"
            has_slot = request.slot is not None
            assert has_slot == (request.status in _WITH_SLOT), (
                f"{request.id} is {request.status.value} and has slot {request.slot}"
            )
            if request.status is Status.OFFLOADED:
                assert request.host is not None, f"{request.id} is nowhere"
                assert request.host.needed, f"{request.id} may lose its only copy"
                assert request.host.tokens >= request.computed, f"{request.id} is not all there"


def check_empty(world: World) -> None:
    """Nothing is left of anybody once every request is over, and unused memory is given up."""
    assert not world.loop.busy, "busy without requests"
    world.ledger.drop_prefixes()
    world.ledger.trim()
    usage = world.ledger.usage()
    assert usage["kv"] == 0, f"KV of nobody: {usage['kv']} bytes"
    assert usage["cache"] == 0, f"tiles stay pinned: {usage['cache']} bytes"
    for owner in ("activation", "weights", "workspace", "free", "limit"):
        was = world.baseline[owner]
        assert usage[owner] == was, f"{owner} was {was} bytes and is {usage[owner]}"
    if world.host is not None and world.buffer is not None:
        assert world.host.needed_blocks == 0, "blocks of nobody are needed"
        world.host.trim()
        assert not world.buffer.taken, f"blocks of nobody: {sorted(world.buffer.taken)}"
    stats = world.kv.stats()
    assert stats["active_slots"] == 0, "slots of nobody"
