"""The asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc

from ellm_jax.client import messages
from ellm_jax.client.connection import Tls, call_metadata, channel_options
from ellm_jax.client.errors import ClientError
from ellm_jax.client.results import Generation, GenerationDelta, Memory, Model
from ellm_jax.client.retries import Attempts, Retries
from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc
from ellm_jax.sampling import SamplingParams


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited. Belongs to one event loop. Cancelling a task
    cancels its call. Usable as an asynchronous context manager."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float | None = None,
        retries: Retries | None = None,
    ):
        """As `Client`; on a running event loop."""
        options = channel_options(tls)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options)
        else:
            self._channel = grpc.aio.secure_channel(address, tls.credentials(), options)
        self._stub = ellm_pb2_grpc.EngineServiceStub(self._channel)
        self._metadata = call_metadata(api_key)
        self._timeout_s = timeout_s
        self._retries = retries or Retries()

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """Completes a prompt, and returns when it is done."""
        request = messages.generate_request(prompt, params, **options)
        return messages.generation(await self._call(self._stub.Generate, request))

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[GenerationDelta, None]:
        """Completes a prompt, and yields what is new as it comes. Closing the iterator cancels."""
        request = messages.generate_request(prompt, params, **options)
        request_id = ""
        async with contextlib.aclosing(self._stream(self._stub.GenerateStream, request)) as stream:
            async for message in stream:
                request_id = message.request_id or request_id
                yield messages.generation_delta(message, request_id)

    async def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncGenerator[tuple[int, Generation | ClientError], None]:
        """Completes many prompts, and yields what became of each, with its index, in the order in
        which they are done."""
        each = [messages.generate_request(prompt, params, **options) for prompt in prompts]
        request = pb.GenerateBatchRequest(requests=each)
        async with contextlib.aclosing(self._stream(self._stub.GenerateBatch, request)) as stream:
            async for message in stream:
                yield message.index, messages.batch_result(message)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str((await self._call(self._stub.Detokenize, request)).text)

    async def model(self) -> Model:
        """The model that is served."""
        return messages.model(await self._call(self._stub.GetModel, pb.GetModelRequest()))

    async def memory(self) -> Memory:
        """Where the server's memory is."""
        answer = await self._call(self._stub.GetMemory, pb.GetMemoryRequest())
        return messages.memory(answer.memory)

    async def resize(
        self, *, device_memory_bytes: int | None = None, host_memory_bytes: int | None = None
    ) -> Memory:
        """Changes the engine's limits while requests run. Needs the admin key."""
        request = pb.ResizeRequest(
            device_memory_bytes=device_memory_bytes, host_memory_bytes=host_memory_bytes
        )
        return messages.memory((await self._call(self._stub.Resize, request)).memory)

    async def sleep(self) -> None:
        """Has the engine give nearly all memory back; calls wait until `wake`. Needs the admin
        key."""
        await self._call(self._stub.Sleep, pb.SleepRequest())

    async def wake(self) -> None:
        """Has the engine go on. Needs the admin key."""
        await self._call(self._stub.Wake, pb.WakeRequest())

    async def close(self) -> None:
        """Cancels what runs and disconnects."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = Attempts(self._retries, self._timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.left_s(), metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                pause_s = attempts.pause_s(error)
            await asyncio.sleep(pause_s)

    async def _stream(self, method: Callable[..., Any], request: Any) -> AsyncGenerator[Any, None]:
        attempts = Attempts(self._retries, self._timeout_s)
        begun = False
        while True:
            call = method(request, timeout=attempts.left_s(), metadata=self._metadata)
            try:
                async for message in call:
                    begun = True
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                if begun:
                    raise ClientError.of(error) from error
                pause_s = attempts.pause_s(error)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)
