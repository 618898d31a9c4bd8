"""What every request passes before a route sees it: an id, a key or a page of this machine, and
errors as OpenAI shapes them.

One middleware around all routes, so that a new route cannot forget any of it.
"""

from __future__ import annotations

import logging
import re
import uuid

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.errors import HttpError, answer_of, as_service_error
from ellm_jax.serving.http.origins import Origins
from ellm_jax.serving.logs import request_context
from ellm_jax.serving.observer import Observer, tell_refused
from ellm_jax.serving.tenants import ANONYMOUS, Keys, Tenant, basic_password, bearer_token
from ellm_jax.serving.turns import Turns

LIVENESS_PATH = "/health"
"""The one path that needs no key."""
PAGES_PATH = "/dashboard"
"""What lies here is looked at in browsers, which ask a person for the key as a password."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_NO_RIGHT = (ErrorKind.UNAUTHENTICATED, ErrorKind.FORBIDDEN)
_log = logging.getLogger(__name__)


class Guard:
    """Wraps the router."""

    def __init__(self, app: ASGIApp, keys: Keys, origins: Origins, observer: Observer):
        """Args:
        app: what is guarded.
        keys: who may come in.
        origins: which pages may, where there are no keys.
        observer: is told of refusals.
        """
        self._app = app
        self._keys = keys
        self._origins = origins
        self._observer = observer
        self._turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request. `scope["state"]` gets `tenant`, `request_id`, and `call_id`, which is
        the same but unique: clients may use an id again."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else b"req_" + uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state["request_id"] = state["call_id"] = request_id.decode()
        if request_id is given:
            state["call_id"] = f"{given[:64].decode()}-{uuid.uuid4().hex[:12]}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            if scope["path"] != LIVENESS_PATH:
                self._origins.check(headers)
                authorization = headers.get(b"authorization", b"").decode("latin-1")
                token = bearer_token(authorization)
                if token is None and _is_page(scope):
                    token = basic_password(authorization)
                state["tenant"] = self._keys.authenticate(token)
                await self._turns.wait()
            with request_context(state["request_id"]):
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            _log.debug("request %s: the client has gone", state["request_id"])
        except (ServiceError, HttpError) as error:
            self._tell(error, scope)
            await _say(_for_browsers(error, scope), started, send_with_id)
        except HTTPException as error:
            shaped = HttpError(error.status_code, error.detail, headers=dict(error.headers or {}))
            await _say(shaped, started, send_with_id)
        except Exception:
            _log.exception("request %s failed", state["request_id"])
            shaped = HttpError(500, "the server failed; its log says why, by the request's id")
            await _say(shaped, started, send_with_id)

    def _tell(self, error: ServiceError | HttpError, scope: Scope) -> None:
        """Tells the observer of a refusal. Questions, such as whether the server is ready, are no
        calls; who asks them without a right to is told of all the same."""
        refused = error if isinstance(error, ServiceError) else as_service_error(error)
        if scope["method"] == "POST" or refused.kind in _NO_RIGHT:
            state = scope["state"]
            with request_context(state["request_id"]):
                tell_refused(self._observer, refused, state.get("tenant") or Tenant(ANONYMOUS))


def _is_page(scope: Scope) -> bool:
    path: str = scope["path"]
    return path == PAGES_PATH or path.startswith(f"{PAGES_PATH}/")


def _for_browsers(error: ServiceError | HttpError, scope: Scope) -> ServiceError | HttpError:
    """Has a browser ask for a key where a page needs one. Not for what a page posts: a key that was
    typed into it is then wrong, and it says so itself."""
    unknown = isinstance(error, ServiceError) and error.kind is ErrorKind.UNAUTHENTICATED
    if not unknown or scope["method"] != "GET" or not _is_page(scope):
        return error
    challenge = {"www-authenticate": 'Basic realm="ellm: the key is the password"'}
    return HttpError(401, str(error), code="invalid_api_key", headers=challenge)


async def _say(error: ServiceError | HttpError, started: bool, send: Send) -> None:
    if started:
        # Half an answer is out: only cutting it off can say that it is not whole.
        raise error
    answer = answer_of(error)
    body = answer.body
    headers = [(name.encode(), value.encode()) for name, value in answer.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
