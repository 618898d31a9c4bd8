"""The dashboard: a page, the snapshots that it draws, and the control of the limits."""

from __future__ import annotations

import importlib.resources
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ellm_jax import __version__
from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.guard import PAGES_PATH
from ellm_jax.serving.snapshots import Sampler, Snapshot

if TYPE_CHECKING:
    from ellm_jax.serving.service import Service

PATH = PAGES_PATH
"""Where the page is; everything that it needs lies below."""

_BODY_BYTES_MAX = 1024
_NUMBER_DIGITS_MAX = 12
_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/chart.js": ("chart.js", "text/javascript; charset=utf-8"),
    "/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/limits.js": ("limits.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

HEADERS = {
    # Nothing from elsewhere, nothing inline, and no other page may hold this one in a frame.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
"""Of every answer below `PATH`."""


class Status(msgspec.Struct, frozen=True):
    """What the page polls.

    Attributes:
        version: of the server.
        model: what clients call the model.
        started_s: when the server started, in seconds since 1970.
        interval_s: seconds between snapshots.
        kept: most snapshots that the server keeps.
        admin: whether who asks may resize.
        resizable: whether anybody may.
        snapshots: those that were asked for, oldest first.
    """

    version: str
    model: str
    started_s: float
    interval_s: float
    kept: int
    admin: bool
    resizable: bool
    snapshots: list[Snapshot]


class _Resize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device_memory: str | int | None = None
    host_memory: str | int | None = None


class _Limits(msgspec.Struct, frozen=True):
    limit_bytes: int
    host_limit_bytes: int


_resize_decoder = msgspec.json.Decoder(_Resize)


class Dashboard:
    """Answers the page's requests. Who asks has been authenticated: `request.state.tenant`."""

    def __init__(self, service: Service, sampler: Sampler, model_name: str = ""):
        """Args:
        service: whose limits are shown and changed.
        sampler: takes the snapshots.
        model_name: what clients call the model.
        """
        self._service = service
        self._sampler = sampler
        self._model_name = model_name
        self._started_s = time.time()
        self._resizable = service.config.admin_key is not None

    def routes(self) -> list[Route]:
        """All of `PATH`."""
        files = [
            Route(PATH + below, _file(*named), methods=["GET"]) for below, named in _FILES.items()
        ]
        return [
            *files,
            Route(f"{PATH}/snapshots", self.snapshots, methods=["GET"]),
            Route(f"{PATH}/resize", self.resize, methods=["POST"]),
        ]

    async def snapshots(self, request: Request) -> Response:
        """Snapshots with a number above `since`, and only the last `most` of them."""
        since = _whole_number(request, "since", 0)
        most = _whole_number(request, "most", len(self._sampler.ring))
        return _json(
            Status(
                version=__version__,
                model=self._model_name,
                started_s=self._started_s,
                interval_s=self._sampler.interval_s,
                kept=self._sampler.ring.maxlen or 0,
                admin=request.state.tenant.admin,
                resizable=self._resizable,
                snapshots=self._sampler.since(since, most),
            )
        )

    async def resize(self, request: Request) -> Response:
        """Changes the limits; answers when they hold. For the admin."""
        tenant = request.state.tenant
        tenant.require_admin("to resize")
        _refuse_other_sites(request)
        wanted = await _read_resize(request)
        if wanted.device_memory is None and wanted.host_memory is None:
            raise ServiceError(
                ErrorKind.INVALID, "nothing to resize; give device_memory, host_memory or both"
            )
        report = await self._service.resize(
            tenant, device_memory=wanted.device_memory, host_memory=wanted.host_memory
        )
        return _json(_Limits(report.limit_bytes, report.host_limit_bytes))


def _file(name: str, content_type: str):  # type: ignore[no-untyped-def]
    body = importlib.resources.files("ellm_jax.serving").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(body, headers={**HEADERS, "content-type": content_type})

    return answer


def _json(value: msgspec.Struct) -> Response:
    return Response(
        msgspec.json.encode(value), headers={**HEADERS, "content-type": "application/json"}
    )


def _whole_number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > _NUMBER_DIGITS_MAX:
        raise ServiceError(
            ErrorKind.INVALID,
            f"{name} must be a whole number of up to {_NUMBER_DIGITS_MAX} digits",
            param=name,
        )
    return int(text)


def _refuse_other_sites(request: Request) -> None:
    """A browser that has the admin key for this page sends it along with whatever another site
    makes it post; so the request has to be this page's, or of no browser."""
    headers = request.headers
    site = headers.get("sec-fetch-site", "same-origin")
    origin = headers.get("origin")
    foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if site not in ("same-origin", "none") or foreign or kind != "application/json":
        raise ServiceError(
            ErrorKind.FORBIDDEN,
            "resize takes JSON from this server's own page, or from no browser; send "
            "content-type: application/json and no other site's origin",
        )


async def _read_resize(request: Request) -> _Resize:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_BYTES_MAX:
            raise ServiceError(
                ErrorKind.TOO_LARGE, f"the body has more than {_BODY_BYTES_MAX} bytes"
            )
    try:
        return _resize_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServiceError(
            ErrorKind.INVALID, f"the body is not what resize takes: {error}"
        ) from error
