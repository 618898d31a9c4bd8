"""What JAX does with the compiled steps."""

import jax
import jax.monitoring

from ellm_jax import SamplingParams


def test_running_a_compiled_step_compiles_nothing(tiny_checkpoint, make_engine):
    engine = make_engine(tiny_checkpoint("llama"), warm_up=True)
    engine.warm_up()
    params = SamplingParams(temperature=0.7, seed=1, frequency_penalty=0.2, max_tokens=20)
    engine.generate([5, 6, 7], params)
    compiled = []

    def listen(event: str, duration_s: float, **_: object) -> None:
        if "backend_compile" in event:
            compiled.append((event, duration_s))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 17 + 4)(1.0)
        assert compiled, "the listener hears nothing"
        compiled.clear()
        prompts = [[i + 3] * (1 + 9 * i) for i in range(12)]
        engine.generate(prompts, params)
        assert not compiled
    finally:
        jax.monitoring.clear_event_listeners()
