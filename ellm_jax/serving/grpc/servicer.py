"""The methods of `ellm.v1.EngineService`."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from ellm_jax.protocol.v1 import ellm_pb2 as pb
from ellm_jax.protocol.v1 import ellm_pb2_grpc
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.grpc import convert
from ellm_jax.serving.grpc.keys import tenant_of
from ellm_jax.serving.grpc.malformed import Malformed
from ellm_jax.serving.grpc.stalls import Stalls
from ellm_jax.serving.grpc.status import abort, code_of, field_of, message_of
from ellm_jax.serving.observer import tell_refused
from ellm_jax.serving.service import Service
from ellm_jax.serving.tenants import Keys, Tenant
from ellm_jax.serving.turns import Turns

_log = logging.getLogger(__name__)
_M = TypeVar("_M", bound=Callable[..., Awaitable[Any]])

_MAX_DEADLINE_S = 86400.0


def _method(method: _M) -> _M:
    """Answers errors of a method with their status, and refuses fields that nobody knows. Calls
    that come at once begin in turns."""

    @functools.wraps(method)
    async def guarded(self: EngineServicer, request: Any, context: Any) -> Any:
        try:
            if isinstance(request, Malformed):
                raise request.error
            await self._turns.wait()
            convert.refuse_unknown_fields(request)
            return await method(self, request, context)
        except ServiceError as error:
            self._tell(error, context)
            failed = error
        except grpc.aio.BaseError:
            raise  # the connection is gone, and with it whoever could be told
        except Exception:
            _log.exception("%s failed", method.__name__)
            failed = _our_fault()
        await abort(context, failed)

    return guarded  # type: ignore[return-value]


class EngineServicer(ellm_pb2_grpc.EngineServiceServicer):
    """Answers calls with the core. A call that is cancelled, or whose deadline passes, ends its
    request in the engine, because its task is cancelled."""

    def __init__(self, service: Service, keys: Keys, stalls: Stalls):
        """Takes the core, who may ask it, and what sends the messages of streams."""
        self._service = service
        self._keys = keys
        self._stalls = stalls
        self._turns = Turns()

    @_method
    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """Completes a prompt."""
        return convert.response(await self._service.complete(self._call(request, context)))

    @_method
    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Completes a prompt, part by part."""
        tokens, first = 0, True
        async with await self._service.open(self._call(request, context)) as stream:
            async for update in stream:
                message = pb.GenerateStreamResponse(
                    deltas=[convert.delta(each) for each in update.deltas]
                )
                tokens += sum(len(each.token_ids) for each in update.deltas)
                if first:
                    first = False
                    message.MergeFrom(convert.first_response(stream.output()))
                if update.finished:
                    count = len(stream.prompt_token_ids)
                    message.usage.CopyFrom(convert.usage(count, tokens, stream.metrics))
                await self._stalls.write(context, message)

    @_method
    async def GenerateBatch(  # noqa: N802
        self, request: pb.GenerateBatchRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Completes many prompts."""
        count, most = len(request.requests), self._service.config.max_prompts
        if not 1 <= count <= most:
            raise ServiceError(
                ErrorKind.INVALID,
                f"requests has {count} entries, and this server takes 1 to {most}",
                param="requests",
            )
        seats = asyncio.Semaphore(2 * self._service.model.max_num_seqs)
        done: asyncio.Queue[pb.GenerateBatchResponse] = asyncio.Queue()

        async def complete(index: int) -> None:
            async with seats:
                answer = await self._answer(request.requests[index], context)
            answer.index = index
            done.put_nowait(answer)

        tasks = [asyncio.create_task(complete(index)) for index in range(count)]
        try:
            for _ in range(count):
                await self._stalls.write(context, await done.get())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @_method
    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """Token ids of a text."""
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        ids = await self._service.texts.tokenize(
            request.text, self._tenant(context), add_special_tokens=special
        )
        return pb.TokenizeResponse(token_ids=ids)

    @_method
    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        """The text of token ids."""
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        ids = list(request.token_ids)
        return pb.DetokenizeResponse(
            text=await self._service.texts.detokenize(
                ids, self._tenant(context), skip_special_tokens=skip
            )
        )

    @_method
    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelResponse:
        """What is served."""
        return convert.model(self._service.model_info())

    @_method
    async def GetMemory(  # noqa: N802
        self, request: pb.GetMemoryRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetMemoryResponse:
        """Bytes by owner, and how many requests there are."""
        return convert.memory_response(self._service.memory(), self._service.stats())

    @_method
    async def Resize(  # noqa: N802
        self, request: pb.ResizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResizeResponse:
        """Changes the limits."""
        report = await self._service.resize(
            self._tenant(context),
            device_memory=(
                request.device_memory_bytes if request.HasField("device_memory_bytes") else None
            ),
            host_memory=(
                request.host_memory_bytes if request.HasField("host_memory_bytes") else None
            ),
        )
        return pb.ResizeResponse(memory=convert.memory(report))

    @_method
    async def Sleep(  # noqa: N802
        self, request: pb.SleepRequest, context: grpc.aio.ServicerContext
    ) -> pb.SleepResponse:
        """Gives memory back."""
        await self._service.sleep(self._tenant(context))
        return pb.SleepResponse()

    @_method
    async def Wake(  # noqa: N802
        self, request: pb.WakeRequest, context: grpc.aio.ServicerContext
    ) -> pb.WakeResponse:
        """Goes on."""
        await self._service.wake(self._tenant(context))
        return pb.WakeResponse()

    async def _answer(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateBatchResponse:
        """What becomes of one request of a batch, whatever that is."""
        try:
            output = await self._service.complete(self._call(request, context))
            return pb.GenerateBatchResponse(response=convert.response(output))
        except ServiceError as error:
            self._tell(error, context)
            return pb.GenerateBatchResponse(error=_error(error))
        except Exception:
            _log.exception("a request of a batch failed")
            return pb.GenerateBatchResponse(error=_error(_our_fault()))

    def _tenant(self, context: grpc.aio.ServicerContext) -> Tenant:
        return tenant_of(self._keys, context.invocation_metadata())

    def _tell(self, error: ServiceError, context: grpc.aio.ServicerContext) -> None:
        tell_refused(self._service.observer, error, self._tenant(context))

    def _call(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> Any:
        left_s = context.time_remaining()
        deadline_s = None if left_s is None or left_s > _MAX_DEADLINE_S else left_s
        return convert.call_of(request, self._tenant(context), deadline_s)


def _our_fault() -> ServiceError:
    return ServiceError(ErrorKind.INTERNAL, "the server has failed; see its log")


def _error(error: ServiceError) -> pb.Error:
    return pb.Error(
        code=code_of(error),
        message=message_of(error),
        field=field_of(error),
        retry_after_s=error.retry_after_s,
    )
