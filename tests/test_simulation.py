"""Random worlds: the real loop, scheduler, ledger and native pool over a fake device and clock.

`scripts/simulate` plays 10,000 of them; here are the first 200, every one that ever failed, and
proof that what the simulator claims to see it does see.
"""

import dataclasses
import logging

import pytest

from ellm_jax._native import KvLayout
from ellm_jax.lifecycle import Lifecycle
from ellm_jax.memory.host_tier import HostTier
from ellm_jax.memory.ledger import Ledger
from ellm_jax.memory.prefix import PrefixCache, TileKeys
from ellm_jax.request import Request
from ellm_jax.sampling import SamplingParams
from ellm_jax.scheduler.batching import Scheduler
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.sim.fuzz import SimulationFailed, run_script, run_seed
from ellm_jax.sim.script import Happening, Script, write_script
from ellm_jax.sim.steps import NeedModel
from ellm_jax.tiering import Tiering

SEEDS = 200
BATCH = 20
LAYOUT = KvLayout.choose(4, 4, 64, 2, 128, 4)
OVERLOADED = {
    "layout": LAYOUT,
    "device_bytes": 16 * LAYOUT.chunk_bytes,
    "weights_bytes": 0,
    "workspace_bytes": 0,
    "need": NeedModel(0, 100, 0),
    "cost": CostModel(1e-2),
    "believed": None,
    "policy": "elastic",
    "host_bytes": 0,
    "max_batch_tokens": None,
    "compile_s": 0.0,
}
PAST_FAILURES = (
    78,  # a chunk mapped ahead is given back, and the ledger still counts it
    145,  # a broken slot holds the memory that a request alone needs
    165,  # a slot is released while it is being copied
    1084,  # nobody runs, and broken slots hold everything
    6970,  # two requests that came at once preempt each other for ever
    8893,  # a request that could rest long rested behind all that came later
    7518,  # the same, with another policy
)


@pytest.fixture(autouse=True)
def quiet():
    """Warnings about the faults that are injected say nothing."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_random_worlds(first):
    for seed in range(first, first + BATCH):
        run_seed(seed)


@pytest.mark.parametrize("seed", PAST_FAILURES)
def test_what_failed_once(seed):
    run_seed(seed)


def test_a_seed_plays_the_same_each_time():
    # In the last two, several requests wait for the same step to leave.
    for seed in (*range(300, 320), 941, 1124):
        first = run_seed(seed)
        for _ in range(3):
            assert run_seed(seed) == first, f"seed {seed}"


def test_with_mapping_on_its_own_thread():
    for seed in range(400, 430):
        run_seed(seed, settle=False)


def test_worlds_are_under_pressure():
    seen = {}
    for seed in range(SEEDS):
        report = run_seed(seed)
        for kind in (*report.moves, *report.endings):
            seen[kind] = seen.get(kind, 0) + 1
    for kind in ("preempt", "offload", "fetch", "evict", "inflate", "deflate", "sleep", "resize"):
        assert seen.get(kind, 0) >= 5, f"{kind} in {seen.get(kind, 0)} of {SEEDS} worlds"
    assert {"length", "stop", "abort", "error"} <= seen.keys()


def leaks_a_slot(self, slot):
    self._taken.pop(slot)


def forgets_to_unpin(self, digests, pinned):
    return None


def names_tiles_by_their_own_tokens_only(self, tokens):
    tile = self._tile_tokens
    pending = [*self._tail, *tokens]
    while len(pending) >= tile:
        self.digests.append(repr(pending[:tile]).encode())
        pending = pending[tile:]
    self._tail = pending


def ignores_the_salt(self, tile_tokens, salt=b"", _init=TileKeys.__init__):
    _init(self, tile_tokens, b"")


def newest_first(self, request):
    self.waiting.insert(0, request)


def loses_a_request(self, request):
    self.remove(request)
    request.restart()


def forgets_the_blocks(self, copy):
    copy.blocks = []
    copy.tokens = 0


def copies_too_little(self, copy, slot, first_tile, _copy_in=HostTier.copy_in):
    _copy_in(self, copy, slot, first_tile + 1)


def takes_no_need(self, need_bytes, slots, tokens, _reserve=Ledger.reserve):
    return _reserve(self, 0, slots, tokens)


def ends_twice(self, request, reason, _finish=Lifecycle.finish):
    _finish(self, request, reason)
    self._on_finish(request)


def does_not_wait(self, request):
    request.host = None


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "said"),
    [
        (Ledger, "release", leaks_a_slot, "active slots"),
        (PrefixCache, "drop", forgets_to_unpin, "requests pin|cached tiles"),
        (TileKeys, "update", names_tiles_by_their_own_tokens_only, "holds something else"),
        (TileKeys, "__init__", ignores_the_salt, "holds something else"),
        (Scheduler, "add", newest_first, "one after the other"),
        (Scheduler, "requeue", loses_a_request, "lost"),
        (HostTier, "drop", forgets_the_blocks, "are taken"),
        (HostTier, "copy_in", copies_too_little, "holds something else"),
        (Ledger, "reserve", takes_no_need, "without its activations"),
        (Lifecycle, "finish", ends_twice, "ended twice"),
        (Tiering, "drop", does_not_wait, "released during a copy|are taken"),
    ],
)
def test_mistakes_are_seen(monkeypatch, owner, name, mistake, said):
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(SimulationFailed, match=said):  # noqa: PT012  # until one shows
        for seed in range(500, 800):
            script = write_script(seed)
            if worth_playing(script, about_host=owner in (HostTier, Tiering)):
                run_script(script, seed)


def worth_playing(script, about_host):
    """Whether a mistake would show for itself, and not behind faults of the driver."""
    if any(happening.kind == "driver_faults" for happening in script.happenings):
        return False
    config = script.config
    has_host = config.policy in ("inter", "elastic") and config.host_bytes > 0
    return has_host or not about_host


def test_nobody_starves_under_overload():
    """Urgent requests come faster than they can be served; one that is not urgent is served too."""
    config = dataclasses.replace(write_script(0).config, **OVERLOADED)
    cost = config.cost
    happenings = []
    for number in range(120):
        request = Request(
            id=f"r{number}",
            prompt_ids=tuple(range(40)),
            params=SamplingParams(temperature=0.0, max_tokens=50),
            seed=number,
            stop_ids=frozenset(),
            arrival_s=number * 20 * cost.fixed_s,
            priority=1 if number == 5 else 0,
        )
        happenings.append(Happening(request.arrival_s, "submit", request))
    report = run_script(Script(config, happenings))
    assert report.endings == {"length": 120}
