"""A typed client of `ellm serve`'s gRPC interface, synchronous and asynchronous.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", SamplingParams(max_tokens=60)).text)
        for delta in client.stream("Once upon a time"):
            print(delta.text, end="")

Imports neither JAX nor the engine; needs `pip install 'ellm-jax[client]'`.
"""

from ellm_jax.client.async_client import AsyncClient
from ellm_jax.client.client import Client
from ellm_jax.client.connection import Tls
from ellm_jax.client.errors import ClientError
from ellm_jax.client.results import Generation, GenerationDelta, Memory, Model, Usage
from ellm_jax.client.retries import Retries

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Generation",
    "GenerationDelta",
    "Memory",
    "Model",
    "Retries",
    "Tls",
    "Usage",
]
