"""Random worlds and what happens in them, all of it from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from ellm_jax._native import KvLayout
from ellm_jax.request import Request
from ellm_jax.sampling import SamplingParams
from ellm_jax.scheduler.cost import CostModel
from ellm_jax.scheduler.policy import POLICIES, Sizes
from ellm_jax.sim.steps import NeedModel
from ellm_jax.sim.world import WorldConfig

_VOCAB_SIZE = 50
# Layers, heads, width, bytes: chunks of 16, 32 and 64 tokens.
_MODELS = ((4, 4, 64, 2), (2, 4, 64, 2), (2, 2, 8, 2))


@dataclass(frozen=True)
class Happening:
    """Something that happens to a world.

    Attributes:
        time_s: when.
        kind: "submit", "abort", "resize", "resize_host", "sleep", "wake", "driver_faults",
            "step_faults", "copy_faults".
        request: whom it is about.
        amount: bytes of a limit, or rate of faults.
    """

    time_s: float
    kind: str
    request: Request | None = None
    amount: float = 0.0


@dataclass(frozen=True)
class Script:
    """A world and its story.

    Attributes:
        config: what the world is made of.
        happenings: in order of time. After the last, nothing goes wrong any more.
        poisoned: requests with which every step fails.
        spoiled: requests whose scores are not finite from some token on.
    """

    config: WorldConfig
    happenings: list[Happening]
    poisoned: set[Request] = field(default_factory=set)
    spoiled: dict[Request, int] = field(default_factory=dict)


def write_script(seed: int) -> Script:
    """The script of a seed; the same each time."""
    rng = random.Random(seed)
    config = _config(rng)
    requests = _requests(rng, config)
    happenings = [Happening(request.arrival_s, "submit", request) for request in requests]
    horizon_s = max(request.arrival_s for request in requests) + rng.uniform(0, 1)
    happenings += _aborts(rng, requests)
    happenings += _limits(rng, config, horizon_s)
    happenings += _faults(rng, horizon_s)
    poisoned = {r for r in requests if rng.random() < 0.03} if rng.random() < 0.3 else set()
    spoiled = {}
    if rng.random() < 0.1:
        victim = rng.choice(requests)
        spoiled[victim] = rng.randrange(victim.max_tokens)
    happenings.sort(key=lambda happening: happening.time_s)
    # In the end nothing fails, and everything is as it was.
    end_s = happenings[-1].time_s
    happenings.append(Happening(end_s, "resize", amount=config.device_bytes))
    happenings.append(Happening(end_s, "wake"))
    return Script(config, happenings, poisoned, spoiled)


def _config(rng: random.Random) -> WorldConfig:
    layers, heads, width, element = rng.choice(_MODELS)
    max_tokens = rng.choice((128, 300, 1000))
    slots = rng.choice((2, 3, 5, 8, 16, 16))
    layout = KvLayout.choose(layers, heads, width, element, max_tokens, slots)
    chunk = layout.chunk_bytes
    policy = rng.choice(tuple(POLICIES))
    batch_tokens = rng.choice((None, None, 32, 64, 200))
    row_bytes = int(chunk * rng.choice((0.002, 0.01, 0.05)))
    need = NeedModel(rng.randrange(2 * chunk), row_bytes, rng.randrange(chunk // 8))
    rules = POLICIES[policy](Sizes(max_tokens, slots, batch_tokens))
    # What one request of the greatest length takes, and then some.
    rows = max(rules.reserved_rows, 32, slots)
    alone = layout.chunks_for(max_tokens) * chunk + need.fixed_bytes
    alone += need.row_bytes * rows + need.seq_bytes * slots
    weights = rng.randrange(8 * chunk)
    workspace = rng.randrange(chunk)
    device = weights + workspace + int(alone * rng.choice((1.0, 1.0, 1.2, 1.5, 2, 4)))
    host = rng.choice((0, 0.3, 1, 3)) * layout.chunks_for(max_tokens) * chunk
    cost = CostModel(
        10 ** rng.uniform(-4, -2),
        10 ** rng.uniform(-6, -4),
        10 ** rng.uniform(-9, -7),
        10 ** rng.uniform(-9, -7),
        chunk / 10 ** rng.uniform(-4.5, -2),
    )
    believed = None
    if rng.random() < 0.5:
        believed = CostModel.from_dict(
            {name: value * rng.lognormvariate(0, 1) for name, value in cost.to_dict().items()}
        )
    return WorldConfig(
        layout=layout,
        device_bytes=device,
        weights_bytes=weights,
        need=need,
        cost=cost,
        policy=policy,
        host_bytes=int(host),
        workspace_bytes=workspace,
        max_batch_tokens=batch_tokens,
        retained_bytes=rng.choice((0, chunk, 100 * chunk)),
        prefix_caching=rng.random() < 0.75,
        believed=believed,
        vocab_size=_VOCAB_SIZE,
        state_rows=rng.choice((1, 2, 8)),
        compile_s=rng.choice((0.0, 0.0, 0.05)),
    )


def _requests(rng: random.Random, config: WorldConfig) -> list[Request]:
    limit = config.layout.max_tokens
    roots = [[rng.randrange(_VOCAB_SIZE) for _ in range(rng.randrange(1, limit))] for _ in range(3)]
    # From all at once to hardly ever two together.
    gap_s = rng.choice((0.0, 0.0, 0.001, 0.01, 0.3))
    ttft_ms, tpot_ms = rng.choice((None, 50.0, 500.0)), rng.choice((None, 10.0, 100.0))
    now = 0.0
    requests = []
    for number in range(rng.randrange(1, rng.choice((5, 20, 40)))):
        now += rng.expovariate(1 / gap_s) if gap_s else 0.0
        prompt = _prompt(rng, roots, limit)
        most = min(limit - len(prompt), rng.choice((1, 8, 60, 300, 1000)))
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=rng.randrange(1, most + 1),
            repetition_penalty=1.1 if rng.random() < 0.1 else 1.0,
        )
        requests.append(
            Request(
                id=f"r{number}",
                prompt_ids=tuple(prompt),
                params=sampling,
                seed=rng.randrange(2**32),
                stop_ids=frozenset(rng.sample(range(_VOCAB_SIZE), rng.choice((0, 0, 1, 2)))),
                arrival_s=now,
                priority=rng.choice((0, 0, 0, -1, 1)),
                ttft_ms=ttft_ms,
                tpot_ms=tpot_ms if rng.random() < 0.8 else None,
                salt=rng.choice((b"", b"", b"tenant")),
            )
        )
    return requests


def _prompt(rng: random.Random, roots: list[list[int]], limit: int) -> list[int]:
    prompt: list[int] = []
    if rng.random() < 0.6:
        root = rng.choice(roots)
        prompt = root[: rng.randrange(len(root) + 1)]
    longest = rng.choice((8, limit // 4, limit - 1))
    prompt = prompt + [rng.randrange(_VOCAB_SIZE) for _ in range(rng.randrange(longest))]
    return prompt[: limit - 1] or [rng.randrange(_VOCAB_SIZE)]


def _aborts(rng: random.Random, requests: list[Request]) -> list[Happening]:
    rate = rng.choice((0.0, 0.1, 0.5))
    return [
        Happening(request.arrival_s + rng.expovariate(2), "abort", request)
        for request in requests
        if rng.random() < rate
    ]


def _limits(rng: random.Random, config: WorldConfig, horizon_s: float) -> list[Happening]:
    """Limits that go down and up; sleep, and waking up."""
    happenings = []
    if rng.random() < 0.4:
        for _ in range(rng.randrange(1, 6)):
            amount = int(config.device_bytes * rng.uniform(0.3, 1.5))
            happenings.append(Happening(rng.uniform(0, horizon_s), "resize", amount=amount))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            amount = int(config.host_bytes * rng.uniform(0, 1.5))
            happenings.append(Happening(rng.uniform(0, horizon_s), "resize_host", amount=amount))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 3)):
            at = rng.uniform(0, horizon_s)
            happenings.append(Happening(at, "sleep"))
            happenings.append(Happening(at + rng.uniform(0, 0.3), "wake"))
    return happenings


def _faults(rng: random.Random, horizon_s: float) -> list[Happening]:
    happenings = []
    for kind, share in (("driver_faults", 0.25), ("step_faults", 0.2), ("copy_faults", 0.2)):
        if rng.random() < share:
            begin = rng.uniform(0, horizon_s)
            rate = rng.choice((0.01, 0.1, 0.5))
            happenings.append(Happening(begin, kind, amount=rate))
            happenings.append(Happening(begin + rng.expovariate(3), kind, amount=0.0))
    return happenings
