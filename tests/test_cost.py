"""The cost model against machines whose true cost is known."""

import json
import random

import pytest

from ellm_jax.scheduler.cost import CostModel, StepWork, prefill_pairs

TRUE = CostModel(2e-3, 1.5e-4, 3e-8, 5e-8, 3e9)


def random_work(rng, prefill_share=0.3):
    work = StepWork()
    for _ in range(rng.randrange(1, 64)):
        work += StepWork.decode(rng.randrange(1, 8000))
    if rng.random() < prefill_share:
        work += StepWork.prefill(rng.randrange(8000), rng.randrange(1, 2000))
    return work


def scaled(by):
    prior = {name: value * by for name, value in TRUE.to_dict().items()}
    return CostModel.from_dict(prior)


def mean_error(model, rng, steps=200, prefill_share=0.3):
    works = [random_work(rng, prefill_share) for _ in range(steps)]
    return sum(abs(model.step_s(w) / TRUE.step_s(w) - 1) for w in works) / steps


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_pairs_are_counted_as_a_mask_would():
    for begin, count in ((0, 1), (0, 5), (7, 4), (100, 0)):
        mask = [sum(k <= begin + q for k in range(begin + count)) for q in range(count)]
        assert prefill_pairs(begin, count) == sum(mask)
    assert StepWork.prefill(2, 3) + StepWork.decode(9) == StepWork(4, 12, 9)


@pytest.mark.parametrize("scale", [1, 100, 0.01])
@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_it_learns_whatever_it_believed_before(scale, outliers, rng):
    model = scaled(scale)
    for _ in range(600):
        work = random_work(rng)
        seconds = TRUE.step_s(work) * rng.lognormvariate(0, 0.05)
        if rng.random() < outliers:
            seconds *= rng.choice([5, 50])
        model.observe(work, seconds)
    assert mean_error(model, rng) < 0.15


def test_one_outlier_does_little(rng):
    model = scaled(1)
    for _ in range(200):
        work = random_work(rng)
        model.observe(work, TRUE.step_s(work) * rng.lognormvariate(0, 0.05))
    work = random_work(rng)
    before = model.step_s(work)
    model.observe(work, 1000 * TRUE.step_s(work))
    assert model.step_s(work) < 1.5 * before


def test_prefill_is_not_forgotten_while_only_decodes_are_seen(rng):
    model = scaled(10)
    for _ in range(300):
        work = random_work(rng)
        model.observe(work, TRUE.step_s(work))
    for _ in range(5000):
        work = random_work(rng, prefill_share=0)
        model.observe(work, TRUE.step_s(work) * rng.lognormvariate(0, 0.05))
    assert model.prefill_s(4000, 1000) == pytest.approx(TRUE.prefill_s(4000, 1000), rel=0.3)


def test_it_follows_a_machine_that_becomes_slower(rng):
    model = scaled(1)
    for slower in (1, 3):
        for _ in range(600):
            work = random_work(rng)
            model.observe(work, slower * TRUE.step_s(work) * rng.lognormvariate(0, 0.05))
    work = random_work(rng)
    assert model.step_s(work) == pytest.approx(3 * TRUE.step_s(work), rel=0.25)


def test_no_prediction_is_ever_negative_or_falls_with_more_work(rng):
    model = CostModel()
    for _ in range(2000):
        model.observe(random_work(rng), rng.choice([1e-6, 1e-3, 1.0, 100.0]))
        assert all(value > 0 for value in model.to_dict().values())


def test_times_that_are_none_teach_nothing():
    model = scaled(1)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.observe(StepWork(1, 0, 1), seconds)
        model.observe_copy(1000, seconds)
    model.observe_copy(0, 1.0)
    assert model.to_dict() == TRUE.to_dict()


def test_largest_rows_is_the_largest(rng):
    for _ in range(300):
        base, begin = random_work(rng), rng.randrange(100000)
        budget = TRUE.step_s(base) * rng.uniform(0.8, 5)
        rows = TRUE.largest_rows(budget, begin, base)

        def time(n, base=base, begin=begin):
            return TRUE.step_s(base + StepWork.prefill(begin, n))

        slack = 1e-9
        assert rows == 0 or time(rows) <= budget * (1 + slack)
        assert time(rows + 1) > budget * (1 - slack)


def test_largest_rows_at_the_ends():
    assert TRUE.largest_rows(0.0, 0, StepWork()) == 0
    assert TRUE.largest_rows(-1.0, 0, StepWork()) == 0
    assert TRUE.largest_rows(float("inf"), 0, StepWork()) == 2**31 - 1


def test_copies_are_learned_and_outliers_bounded(rng):
    model = scaled(1)
    assert model.copy_s(3 * 10**9) == pytest.approx(1.0)
    for _ in range(200):
        size = rng.randrange(1, 10**8)
        model.observe_copy(size, size / 1e9)
    assert model.copy_s(10**9) == pytest.approx(1.0, rel=0.05)
    model.observe_copy(1000, 1000.0)
    assert model.copy_s(10**9) == pytest.approx(1.0, rel=0.2)


def test_it_goes_through_json():
    model = CostModel(1e-3, 2e-4, 3e-8, 4e-8, 5e9)
    model.observe(StepWork(10, 0, 100), 0.5)
    again = CostModel.from_dict(json.loads(json.dumps(model.to_dict())))
    work = StepWork(100, 20000, 3000)
    assert again.step_s(work) == pytest.approx(model.step_s(work))


@pytest.mark.parametrize(
    "change", [{"fixed_s": 0}, {"row_s": -1}, {"row_s": "1"}, {"more": 1}, {"row_s": float("nan")}]
)
def test_nonsense_is_refused(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=name):
        CostModel.from_dict({**TRUE.to_dict(), **change})
    with pytest.raises(ValueError, match="has fixed_s"):
        CostModel.from_dict({})
