"""What several tests ask engines, what they do to them, and how they wait for what comes of it."""

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

from ellm_jax import Engine, SamplingParams


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    """Exactly so many tokens, the likeliest ones."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def random_requests(
    seed: int, count: int, prompt: tuple[int, int], output: tuple[int, int]
) -> list[tuple[list[int], int]]:
    """Prompts of random tokens with the lengths of their answers, both within bounds."""
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, 512) for _ in range(rng.randint(*prompt))], rng.randint(*output))
        for _ in range(count)
    ]


def check_that_failed_steps_are_run_again(engine: Engine, monkeypatch: Any) -> None:
    """Has steps read past a mapping, which fails on the device; their requests start anew."""
    requests = random_requests(9, 5, prompt=(30, 120), output=(30, 60))
    prompts, params = [p for p, _ in requests], [greedy(n) for _, n in requests]
    expected = [o.token_ids for o in engine.generate(prompts, params)]
    runner = engine._loop.executor._runner
    dispatch = runner.dispatch
    for failing in (0, 3, 20):
        steps = itertools.count()

        def sometimes(
            key: Any, spans: Any, *args: Any, steps: Any = steps, failing: int = failing
        ) -> Any:
            if next(steps) == failing:
                spans = [span._replace(context_tokens=1 << 20) for span in spans]
            return dispatch(key, spans, *args)

        monkeypatch.setattr(runner, "dispatch", sometimes)
        outputs = engine.generate(prompts, params)
        assert next(steps) > failing, f"step {failing} was never run"
        assert [o.token_ids for o in outputs] == expected, f"step {failing} failed"


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Returns when the condition holds; fails when it does not come to."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
