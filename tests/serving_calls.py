"""A `Service` without a transport, calls for it, and what its observer was told."""

import asyncio
from collections import Counter

from grpc_server import WAIT_S, wait_idle

from ellm_jax import SamplingParams
from ellm_jax.outputs import RequestOutput
from ellm_jax.serving.call import Call
from ellm_jax.serving.observer import NullObserver
from ellm_jax.serving.service import Service
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant

ALICE, BOB = Tenant("alice"), Tenant("bob")


class Notes(NullObserver):
    """Writes down what an observer is told."""

    def __init__(self):
        self.said = []

    def on_admitted(self, call, prompt_tokens):
        self.said.append(("admitted", call))

    def on_refused(self, error, tenant):
        self.said.append(("refused", error.kind))

    def on_first_token(self, call, metrics):
        assert metrics.first_token_s is not None
        self.said.append(("first", call))

    def on_finished(self, call, outcome):
        done = isinstance(outcome, RequestOutput)
        self.said.append(("finished", call, "done" if done else outcome.kind))


def serving(engine, test, **config):
    """Runs `await test(service, notes)`, and checks that each admitted call ended exactly once."""
    notes = Notes()

    async def main():
        service = Service(engine, ServeConfig(**config), notes)
        try:
            await asyncio.wait_for(test(service, notes), WAIT_S)
        finally:
            await service.close()

    asyncio.run(main())
    wait_idle(engine)
    admitted = Counter(id(entry[1]) for entry in notes.said if entry[0] == "admitted")
    finished = Counter(id(entry[1]) for entry in notes.said if entry[0] == "finished")
    assert admitted == finished
    return notes


def call(tokens=8, prompt=(5, 6, 7), tenant=ALICE, *, options=None, **sampling):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **sampling)
    return Call(list(prompt), params, tenant, **(options or {}))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)
