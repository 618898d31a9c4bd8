"""Tests that need a GPU: skipped, with the reason, where there is none."""

import pytest

from ellm_jax.devices import find_cuda, open_devices


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> str:
    """What the tests run on: "cuda", or what --gpu-tests-on says. Opened before anything else uses
    JAX, which then has the allocator that engines need."""
    wanted: str = request.config.getoption("--gpu-tests-on")
    missing = find_cuda().missing
    if wanted == "cuda" and missing is not None:
        pytest.skip(f"needs a GPU: {missing[0]}")
    open_devices(wanted)
    return wanted
