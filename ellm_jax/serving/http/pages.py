"""Lists in pages, as OpenAI's API gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from starlette.requests import Request

from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.replies import Batch, FileObject

_LIMIT_MAX = 1000
_LIMIT_DEFAULT = 20

_Item = TypeVar("_Item", FileObject, Batch)


def page(items: Sequence[_Item], request: Request) -> tuple[list[_Item], bool]:
    """The items that `after`, `limit` and `order` of the query ask for, and whether there are more.

    Args:
        items: all, newest first.
        request: with the query.

    Raises:
        HttpError: the query makes no sense.
    """
    query = request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise HttpError(400, f"order={order[:20]!r}: must be asc or desc", param="order")
    limit = query.get("limit", str(_LIMIT_DEFAULT))
    if not (limit.isascii() and limit.isdigit() and 1 <= len(limit) <= 4):
        limit = "0"
    if not 1 <= int(limit) <= _LIMIT_MAX:
        raise HttpError(400, f"limit must be from 1 to {_LIMIT_MAX}", param="limit")
    found = list(items) if order == "desc" else list(reversed(items))
    after = query.get("after")
    if after is not None:
        places = [i for i, item in enumerate(found) if item.id == after]
        if not places:
            raise HttpError(400, f"after={after[:64]!r}: there is no such item", param="after")
        found = found[places[0] + 1 :]
    return found[: int(limit)], len(found) > int(limit)


def ends(items: Sequence[_Item]) -> tuple[str | None, str | None]:
    """The ids of the first and the last item."""
    return (items[0].id, items[-1].id) if items else (None, None)
