"""The logical size of the host tier, step by step against the paper's rules."""

import random
from collections import deque

import pytest

from ellm_jax.scheduler.slo import SloBuffer, SloTargets

OK, TTFT, TPOT = (False, False), (True, False), (False, True)


def feed(buffer, *iterations):
    for each in iterations:
        buffer.observe(*each)
    return buffer.limit_bytes


def test_it_starts_full_and_halves_at_the_third_tpot_violation_in_five():
    buffer = SloBuffer(1000, 100)
    assert feed(buffer, TPOT, OK, TPOT, OK) == 1000
    assert feed(buffer, TPOT) == 500


def test_violations_further_apart_are_no_event():
    buffer = SloBuffer(1000, 100)
    assert feed(buffer, *[TPOT, OK, OK] * 10) == 1000


def test_ttft_doubles_and_the_bounds_hold():
    buffer = SloBuffer(1000, 100)
    assert feed(buffer, *[TPOT] * 30) == 100
    assert feed(buffer, TTFT, TTFT) == 100
    assert feed(buffer, TTFT) == 200
    assert feed(buffer, *[TTFT] * 30) == 1000


def test_tpot_is_judged_first_and_an_event_clears_the_window():
    buffer = SloBuffer(1000, 100)
    both = (True, True)
    assert feed(buffer, both, both, both) == 500
    assert feed(buffer, TTFT, TTFT) == 500, "what came before the event no longer counts"
    assert feed(buffer, TTFT) == 1000


def test_window_count_and_factor_may_differ():
    buffer = SloBuffer(900, 0, window=2, violations=1, factor=3)
    assert feed(buffer, TPOT) == 300
    assert feed(buffer, OK, TTFT) == 900


def test_a_new_physical_size_keeps_the_share():
    buffer = SloBuffer(1000, 100)
    feed(buffer, TPOT, TPOT, TPOT)
    buffer.resize(400)
    assert (buffer.physical_bytes, buffer.limit_bytes) == (400, 200)
    buffer.resize(50)
    assert buffer.limit_bytes == 50, "below the smallest size, the physical one bounds it"
    buffer.resize(0)
    assert feed(buffer, TTFT, TTFT, TTFT) == 0
    buffer.resize(800)
    assert buffer.limit_bytes == 800


def test_against_a_model():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    buffer, size, recent = SloBuffer(1 << 20, 1 << 10), 1 << 20, deque(maxlen=5)
    for _ in range(5000):
        seen = rng.random() < 0.4, rng.random() < 0.4
        recent.append(seen)
        for which, by in ((1, 0.5), (0, 2)):
            if sum(each[which] for each in recent) == 3:
                size = min(1 << 20, max(1 << 10, int(size * by)))
                recent.clear()
        assert feed(buffer, seen) == size


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((10, 1), {"violations": 6}),
        ((10, 1), {"violations": 0}),
        ((10, 1), {"factor": 1.0}),
        ((-1, 1), {}),
        ((1, -1), {}),
    ],
)
def test_nonsense_is_refused(sizes, options):
    with pytest.raises(ValueError, match="give"):
        SloBuffer(*sizes, **options)


@pytest.mark.parametrize("value", [0, -1.5, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms"])
def test_targets_are_positive_times(name, value):
    with pytest.raises(ValueError, match=name):
        SloTargets(**{name: value})
    assert getattr(SloTargets(**{name: 20}), name) == 20


def test_targets_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="ttft_ms"):
        SloTargets(ttft_ms="20")
    with pytest.raises(TypeError, match="tpot_ms"):
        SloTargets(tpot_ms=True)
