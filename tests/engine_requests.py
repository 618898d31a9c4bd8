"""What several tests ask engines, and how they wait for what comes of it."""

import random
import time
from collections.abc import Callable
from typing import Any

from ellm_jax import SamplingParams


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


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Returns when the condition holds; fails when it does not come to."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
