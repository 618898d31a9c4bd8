"""Engines whose bookkeeping is looked at after every step."""

from pathlib import Path

from ellm_jax import Engine, EngineConfig


class CheckedEngine:
    """Makes engines that check the ledger after every step, and that nothing is left at the end."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []

    def __call__(self, path: Path, **config: object) -> Engine:
        defaults = {"device_memory": "64MiB", "max_num_seqs": 8, "max_batch_tokens": 64}
        defaults |= {"warm_up": False}
        settings = EngineConfig(**{**defaults, "progress": False, **config})  # type: ignore[arg-type]
        engine = Engine.from_pretrained(path, settings)
        loop = engine._loop
        step = loop.step

        def checked_step() -> bool:
            goes_on = step()
            loop.ledger.check()
            running = {r.slot for r in loop.scheduler.running}
            assert len(running) == len(loop.scheduler.running), "two requests share a slot"
            return goes_on

        loop.step = checked_step  # type: ignore[method-assign]
        self.engines.append(engine)
        return engine

    def finish(self) -> None:
        for engine in self.engines:
            loop = engine._loop
            engine.close()
            usage = loop.ledger.usage()
            assert usage["kv"] == usage["activation"] == usage["cache"] == 0, usage
            assert not loop.lifecycle.steps_of, "a step is still accounted for"
            assert not loop.lifecycle.leaving, "an ended request still holds memory"
            loop.ledger.check()
