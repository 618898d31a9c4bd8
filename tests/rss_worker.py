"""A process whose memory a test watches from outside: serves a load, tells where it stands."""

import random
import sys
import time

from ellm_jax import Engine, EngineConfig, SamplingParams


def main(path: str, device_memory: str) -> None:
    config = EngineConfig(
        device_memory=device_memory,
        max_num_seqs=32,
        max_batch_tokens=128,
        idle_trim_s=0.2,
        progress=False,
    )
    rng = random.Random(3)
    with Engine.from_pretrained(path, config) as engine:
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        prompts = [[rng.randrange(3, 512) for _ in range(rng.randint(200, 900))] for _ in range(40)]
        # Whatever compiles, and whatever the first load touches, is there before the watch begins.
        engine.warm_up()
        engine.generate(prompts, params)
        for state in ("ready", "loaded"):
            time.sleep(1.5)
            print(state, flush=True)
            sys.stdin.readline()
            if state == "ready":
                engine.generate(prompts, params)
                print(f"peak {engine.memory().peaks['physical']}", flush=True)
        print(f"wanted {engine.memory().limit_bytes}", flush=True)


main(*sys.argv[1:])
