"""/v1/files: uploads for batches, and their results."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http import replies
from ellm_jax.serving.http.body import bounded
from ellm_jax.serving.http.context import Context, tenant_of
from ellm_jax.serving.http.errors import HttpError
from ellm_jax.serving.http.event_stream import reply
from ellm_jax.serving.http.files import FileStore
from ellm_jax.serving.http.pages import ends, page
from ellm_jax.serving.http.routing import route
from ellm_jax.serving.service import Service
from ellm_jax.serving.tenants import Tenant

UPLOAD_TIMEOUT_S = 300.0
"""Longest time that an upload may take."""
_FORM_BYTES = 64 * 2**10  # what a form may have around its file
_CHUNK_BYTES = 2**18


class FileRoutes:
    """The routes."""

    def __init__(self, context: Context, store: FileStore):
        self._context = context
        self._store = store

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            route("/v1/files", GET=self._files, POST=self._upload),
            route("/v1/files/{id}", GET=self._file, DELETE=self._delete),
            route("/v1/files/{id}/content", GET=self._content),
        ]

    async def _files(self, request: Request) -> Response:
        files = self._store.files(tenant_of(request))
        purpose = request.query_params.get("purpose")
        if purpose is not None:
            files = [file for file in files if file.purpose == purpose]
        data, more = page(files, request)
        return reply(replies.FileList(data, more, *ends(data)))

    async def _upload(self, request: Request) -> Response:
        check_open(self._context.service)
        tenant = tenant_of(request)
        kind, _ = parse_options_header(request.headers.get("content-type", ""))
        if kind != b"multipart/form-data":
            raise HttpError(415, "send the file as multipart/form-data, with its purpose")
        most = self._context.config.max_file_bytes + _FORM_BYTES
        said = request.headers.get("content-length", "")
        coming = min(int(said), most) if said.isascii() and said.isdigit() else most
        with self._store.reserved(tenant, coming):
            form = await self._read_form(request, most)
            try:
                return await self._store_form(tenant, form)
            finally:
                await form.close()

    async def _read_form(self, request: Request, most_bytes: int) -> FormData:
        parser = _FormParser(request.headers, bounded(request, most_bytes), self._store.directory)
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                return await parser.parse()
        except TimeoutError as error:
            raise HttpError(
                408, f"the upload did not come within {UPLOAD_TIMEOUT_S:g} s; send it faster"
            ) from error
        except (MultiPartException, KeyError, ValueError) as error:
            message = getattr(error, "message", None) or "it cannot be read"
            raise HttpError(400, f"no multipart form: {message}") from error

    async def _store_form(self, tenant: Tenant, form: FormData) -> Response:
        purpose, file = form.get("purpose"), form.get("file")
        if purpose != "batch":
            raise HttpError(400, "purpose must be 'batch'", param="purpose")
        if not isinstance(file, UploadFile):
            raise HttpError(400, "the form has no file; add one named 'file'", param="file")
        most = self._context.config.max_file_bytes
        if file.size is not None and file.size > most:
            raise _too_large(file.size, most)
        filename = file.filename or "upload.jsonl"
        if not _is_text(filename):
            raise HttpError(
                400, "the file's name is no Unicode text; send it as UTF-8", param="file"
            )
        stored = self._store.create(tenant, filename, purpose)
        try:
            with self._store.open(stored.id, "wb") as target:
                await asyncio.to_thread(shutil.copyfileobj, file.file, target)
            return reply(self._store.add(tenant, stored))
        except BaseException:
            self._store.discard(stored)
            raise

    async def _file(self, request: Request) -> Response:
        return reply(self._store.get(tenant_of(request), request.path_params["id"]))

    async def _delete(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        self._store.delete(tenant_of(request), file_id)
        return reply(replies.Deleted(file_id))

    async def _content(self, request: Request) -> Response:
        file = self._store.get(tenant_of(request), request.path_params["id"])
        content = self._store.open(file.id, "rb")

        async def chunks() -> AsyncIterator[bytes]:
            with content:
                while chunk := await asyncio.to_thread(content.read, _CHUNK_BYTES):
                    yield chunk

        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(chunks(), headers=headers, media_type="application/octet-stream")


class _FormParser(MultiPartParser):
    """Keeps what does not fit in memory where files are kept."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], directory: Path):
        super().__init__(headers, stream, max_files=1, max_fields=8, max_part_size=_FORM_BYTES)
        self._directory = directory

    def on_headers_finished(self) -> None:
        """A part begins."""
        super().on_headers_finished()
        upload = self._current_part.file
        if upload is not None:
            upload.file.close()
            spool = SpooledTemporaryFile(  # noqa: SIM115 - closed with the form
                self.spool_max_size, "w+b", dir=str(self._directory)
            )
            self._files_to_close_on_error[-1] = spool
            upload.file = spool  # type: ignore[assignment]


def check_open(service: Service) -> None:
    """Returns while the server takes files and batches.

    Raises:
        ServiceError: it ends, or its engine has failed.
    """
    if service.draining or not service.live:
        raise ServiceError(
            ErrorKind.UNAVAILABLE, "the server takes nothing new now; try another, or again later"
        )


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_large(size: int, most: int) -> HttpError:
    return HttpError(
        413, f"the file has {size} bytes and the limit is {most}; split it", code="too_large"
    )
