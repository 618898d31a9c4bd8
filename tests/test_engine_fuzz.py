"""Random load from several threads under pressure: aborts, abandoned streams, all kinds of
parameters. Whoever stays gets the answer it gets alone, and nothing is left behind."""

import random
import threading
import time

import pytest

from ellm_jax import SamplingParams


def random_request(rng):
    prompt = [
        rng.randrange(3, 512) for _ in range(rng.choice([1, 2, 39, 40, 41, rng.randint(3, 120)]))
    ]
    kind = rng.random()
    params = {
        "temperature": 0,
        "max_tokens": rng.choice([rng.randint(1, 30), rng.randint(150, 450)]),
        "ignore_eos": True,
    }
    if kind < 0.25:
        params |= {"temperature": 0.9, "seed": rng.randrange(1 << 40), "top_p": 0.9, "top_k": 40}
    elif kind < 0.45:
        params |= {"frequency_penalty": 0.4, "repetition_penalty": 1.2}
    elif kind < 0.55:
        params |= {"temperature": 1.0, "seed": rng.randrange(1 << 40), "n": 2}
        params["min_tokens"] = min(5, params["max_tokens"])
    return prompt, SamplingParams(**params)


def answer(engine, prompt, params):
    return [c.token_ids for c in engine.generate(prompt, params)[0].outputs]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_load_under_pressure(seed, tiny_checkpoint, make_engine):
    path = tiny_checkpoint("llama", context=1024)
    rng = random.Random(seed)
    limits = {"device_memory": rng.choice(["9MiB", "10MiB", "12MiB"])}
    limits |= {"max_num_seqs": rng.choice([3, 12, 12]), "max_batch_tokens": rng.choice([16, 100])}
    engine = make_engine(path, idle_trim_s=0.01, **limits)
    stayed: list[tuple[list[int], SamplingParams, list[tuple[int, ...]]]] = []
    problems: list[BaseException] = []

    def client(number):
        mine = random.Random(1000 * seed + number)
        try:
            for _ in range(4):
                prompt, params = random_request(mine)
                manner = mine.random()
                if manner < 0.5:
                    stayed.append((prompt, params, answer(engine, prompt, params)))
                elif manner < 0.75:
                    stream = engine.stream(prompt, params)
                    for _, _output in zip(range(mine.randint(0, 20)), stream, strict=False):
                        pass
                    stream.close()
                else:
                    name = f"{number}-{mine.random()}"
                    future = engine.submit(prompt, params, request_id=name)
                    time.sleep(mine.random() * 0.2)
                    engine.abort(name)
                    future.result(timeout=120)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
        assert not thread.is_alive(), f"seed {seed}: a client waits in vain: {engine.stats()}"
    assert not problems, f"seed {seed}: {problems}"
    print(f"seed {seed}: {limits}, {len(stayed)} stayed, {engine.stats()}")
    for prompt, params, tokens in stayed:
        assert answer(engine, prompt, params) == tokens, f"seed {seed}: {len(prompt)}, {params}"
