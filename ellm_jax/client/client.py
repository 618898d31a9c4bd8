"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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


class Client:
    """Talks to one server. Methods may be called from any thread. Usable as a context manager.

    All methods raise `ClientError` where the server refuses or cannot be reached. Where they take
    a prompt, that is a text or token ids, and `**options` are `request_id`, `priority`, `ttft_ms`
    and `tpot_ms`.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float | None = None,
        retries: Retries | None = None,
    ):
        """Connects with the first call.

        Args:
            address: "host:port".
            api_key: the key, where the server asks for one.
            tls: how to encrypt; None: not at all.
            timeout_s: most seconds of a call, with all its tries; None: no limit.
            retries: what is tried again; None: the defaults.
        """
        options = channel_options(tls)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options)
        self._stub = ellm_pb2_grpc.EngineServiceStub(self._channel)
        self._metadata = call_metadata(api_key)
        self._timeout_s = timeout_s
        self._retries = retries or Retries()

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Generation:
        """Completes a prompt, and returns when it is done."""
        request = messages.generate_request(prompt, params, **options)
        return messages.generation(self._call(self._stub.Generate, request))

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, **options: Any
    ) -> Iterator[GenerationDelta]:
        """Completes a prompt, and yields what is new as it comes. Leaving the loop cancels."""
        request = messages.generate_request(prompt, params, **options)
        request_id = ""
        for message in self._stream(self._stub.GenerateStream, request):
            request_id = message.request_id or request_id
            yield messages.generation_delta(message, request_id)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Generation | ClientError]]:
        """Completes many prompts, and yields what became of each, with its index, in the order in
        which they are done."""
        each = [messages.generate_request(prompt, params, **options) for prompt in prompts]
        request = pb.GenerateBatchRequest(requests=each)
        for message in self._stream(self._stub.GenerateBatch, request):
            yield message.index, messages.batch_result(message)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return str(self._call(self._stub.Detokenize, request).text)

    def model(self) -> Model:
        """The model that is served."""
        return messages.model(self._call(self._stub.GetModel, pb.GetModelRequest()))

    def memory(self) -> Memory:
        """Where the server's memory is."""
        return messages.memory(self._call(self._stub.GetMemory, pb.GetMemoryRequest()).memory)

    def resize(
        self, *, device_memory_bytes: int | None = None, host_memory_bytes: int | None = None
    ) -> Memory:
        """Changes the engine's limits while requests run. Needs the admin key."""
        request = pb.ResizeRequest(
            device_memory_bytes=device_memory_bytes, host_memory_bytes=host_memory_bytes
        )
        return messages.memory(self._call(self._stub.Resize, request).memory)

    def sleep(self) -> None:
        """Has the engine give nearly all memory back; calls wait until `wake`. Needs the admin
        key."""
        self._call(self._stub.Sleep, pb.SleepRequest())

    def wake(self) -> None:
        """Has the engine go on. Needs the admin key."""
        self._call(self._stub.Wake, pb.WakeRequest())

    def close(self) -> None:
        """Cancels what runs and disconnects."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        attempts = Attempts(self._retries, self._timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.left_s(), metadata=self._metadata)
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error)
            time.sleep(pause_s)

    def _stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        attempts = Attempts(self._retries, self._timeout_s)
        begun = False
        while True:
            call = method(request, timeout=attempts.left_s(), metadata=self._metadata)
            try:
                for message in call:
                    begun = True
                    yield message
                return
            except grpc.RpcError as error:
                if begun:
                    raise ClientError.of(error) from error
                pause_s = attempts.pause_s(error)
            finally:
                call.cancel()
            time.sleep(pause_s)
