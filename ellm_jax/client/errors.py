"""What a server answered instead of a result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class ClientError(Exception):
    """A call that failed.

    Attributes:
        code: gRPC's status code.
        message: what was asked, what there is, one remedy.
        fields: paths of the fields at fault, such as "sampling.temperature".
        reason: the server's name for it, such as "OVERLOADED"; empty where it gave none.
        retry_after_s: seconds after which trying again makes sense; None where it said none.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        fields: Sequence[str] = (),
        reason: str = "",
        retry_after_s: float | None = None,
    ):
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.fields = tuple(fields)
        self.reason = reason
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: grpc.RpcError) -> ClientError:
        """Reads gRPC's error, with what google.rpc details say."""
        failed = cls(error.code(), error.details() or "")
        for detail in _details(error.trailing_metadata() or ()):
            if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                detail.Unpack(bad)
                failed.fields = tuple(violation.field for violation in bad.field_violations)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                failed.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
            elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                failed.reason = info.reason
        return failed


def _details(metadata: Iterable[tuple[str, str | bytes]]) -> Any:
    for key, value in metadata:
        if key == _DETAILS_KEY:
            return status_pb2.Status.FromString(value).details
    return ()
