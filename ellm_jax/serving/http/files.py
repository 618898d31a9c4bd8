"""Files of clients on the local disk: each tenant sees its own."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from ellm_jax.serving.errors import ErrorKind, ServiceError
from ellm_jax.serving.http.replies import Batch, FileObject
from ellm_jax.serving.settings import ServeConfig
from ellm_jax.serving.tenants import Tenant

OVER = ("completed", "failed", "cancelled")
"""States of a batch that changes no more."""

_ID = re.compile(r"(file|batch)-[0-9a-f]{32}")


class StoredFile(msgspec.Struct):
    """What is kept about a file, beside its content."""

    tenant: str
    file: FileObject


class StoredBatch(msgspec.Struct):
    """What is kept about a batch; its results are files that are not added until it is over."""

    tenant: str
    admin: bool
    batch: Batch
    output: FileObject
    errors: FileObject


_Stored = TypeVar("_Stored", StoredFile, StoredBatch)


class FileStore:
    """Keeps files and batches in a directory, as `ID.json` and, for files, `ID.data`.

    Used by one process. Everything is small or bounded by `ServeConfig`; the methods touch the disk
    and belong on a thread where contents are large.

    Attributes:
        directory: where they are.
    """

    def __init__(self, config: ServeConfig):
        """Opens `ServeConfig.files_dir`; without one, a directory that `close` removes."""
        self._own: tempfile.TemporaryDirectory[str] | None = None
        if config.files_dir is None:
            self._own = tempfile.TemporaryDirectory(prefix="ellm-files-")
            self.directory = Path(self._own.name)
        else:
            self.directory = Path(config.files_dir)
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._config = config
        self._files = self._load("file", StoredFile)
        self._batches = self._load("batch", StoredBatch)
        self._coming_bytes: Counter[str] = Counter()  # by tenant: of uploads in progress

    def close(self) -> None:
        """Removes a directory of its own."""
        if self._own is not None:
            self._own.cleanup()

    # Room.

    def check_room(self, tenant: Tenant, more_bytes: int = 0) -> None:
        """Returns if a tenant has room for so many bytes more.

        Raises:
            ServiceError: it has not.
        """
        held, most = self._held_bytes(tenant.name), self._config.max_tenant_file_bytes
        if held + more_bytes > most or held == most:
            raise ServiceError(
                ErrorKind.TOO_LARGE,
                f"your files have {held} bytes, {more_bytes} more are asked for, and the limit is "
                f"{most}; delete some",
            )

    @contextlib.contextmanager
    def reserved(self, tenant: Tenant, more_bytes: int) -> Iterator[None]:
        """Keeps room for an upload while it comes.

        Raises:
            ServiceError: the tenant has too much, or too many files.
        """
        self._check_files(tenant)
        self.check_room(tenant, more_bytes)
        self._coming_bytes[tenant.name] += more_bytes
        try:
            yield
        finally:
            self._coming_bytes[tenant.name] -= more_bytes

    def _held_bytes(self, tenant: str) -> int:
        """Of a tenant's files, its uploads that are coming, and its batches that are not over."""
        held = self._coming_bytes[tenant]
        held += sum(each.file.bytes for each in self._files.values() if each.tenant == tenant)
        for each in self._batches.values():
            if each.tenant == tenant and each.batch.status not in OVER:
                for path in (self._data(each.output.id), self._data(each.errors.id)):
                    with contextlib.suppress(FileNotFoundError):
                        held += path.stat().st_size
        return held

    def _check_files(self, tenant: Tenant) -> None:
        mine = sum(stored.tenant == tenant.name for stored in self._files.values())
        most = self._config.max_files
        if mine >= most:
            raise ServiceError(
                ErrorKind.TOO_LARGE, f"you have {mine} files, and the limit is {most}; delete some"
            )

    # Files.

    def create(self, tenant: Tenant, filename: str, purpose: str) -> FileObject:
        """A new, empty file, unknown until `add`; write to it with `open`.

        Raises:
            ServiceError: the tenant has too many.
        """
        self._check_files(tenant)
        file_id = f"file-{uuid.uuid4().hex}"
        self._data(file_id).touch(0o600, exist_ok=False)
        return FileObject(file_id, 0, int(time.time()), filename[:255], purpose)

    def open(self, file_id: str, mode: str) -> BinaryIO:
        """The content of a file that `create` or `get` gave."""
        return self._data(file_id).open(mode)  # type: ignore[return-value]

    def add(self, tenant: Tenant, file: FileObject) -> FileObject:
        """Makes a file known, now that its content is written."""
        file.bytes = self._data(file.id).stat().st_size
        stored = StoredFile(tenant.name, file)
        self._write(file.id, stored)
        self._files[file.id] = stored
        return file

    def discard(self, file: FileObject) -> None:
        """Removes a file that was not added."""
        self._data(file.id).unlink(missing_ok=True)

    def get(self, tenant: Tenant, file_id: str) -> FileObject:
        """A file by its id.

        Raises:
            ServiceError: NOT_FOUND, also for files of others.
        """
        return self._mine(self._files, tenant, file_id).file

    def files(self, tenant: Tenant) -> list[FileObject]:
        """The tenant's files, newest first."""
        mine = [stored.file for stored in self._files.values() if stored.tenant == tenant.name]
        return sorted(mine, key=lambda file: file.created_at, reverse=True)

    def delete(self, tenant: Tenant, file_id: str) -> None:
        """Removes a file.

        Raises:
            ServiceError: NOT_FOUND, also for files of others.
        """
        self.get(tenant, file_id)
        del self._files[file_id]
        self._data(file_id).unlink(missing_ok=True)
        self._json(file_id).unlink(missing_ok=True)

    # Batches.

    def make_room_for_batch(self, tenant: Tenant) -> None:
        """Forgets the tenant's oldest batches that are over, as many as a new one needs; their
        results stay.

        Raises:
            ServiceError: too many are not over.
        """
        mine = [each for each in self._batches.values() if each.tenant == tenant.name]
        most = self._config.max_files
        excess = max(0, len(mine) + 1 - most)
        over = [stored for stored in mine if stored.batch.status in OVER]
        if excess > len(over):
            raise ServiceError(
                ErrorKind.TOO_LARGE,
                f"{len(mine) - len(over)} of your batches are not over, and the limit is {most}; "
                "wait for one, or cancel it",
            )
        for stored in sorted(over, key=lambda stored: stored.batch.created_at)[:excess]:
            del self._batches[stored.batch.id]
            self._json(stored.batch.id).unlink(missing_ok=True)

    def put_batch(self, stored: StoredBatch) -> None:
        """Keeps a batch as it is now."""
        self._write(stored.batch.id, stored)
        self._batches[stored.batch.id] = stored

    def get_batch(self, tenant: Tenant, batch_id: str) -> StoredBatch:
        """A batch by its id.

        Raises:
            ServiceError: NOT_FOUND, also for batches of others.
        """
        return self._mine(self._batches, tenant, batch_id)

    def batches(self, tenant: Tenant | None = None) -> list[StoredBatch]:
        """The tenant's batches, or everybody's, newest first."""
        found = [
            stored
            for stored in self._batches.values()
            if tenant is None or stored.tenant == tenant.name
        ]
        return sorted(found, key=lambda stored: stored.batch.created_at, reverse=True)

    def _mine(self, among: dict[str, _Stored], tenant: Tenant, item_id: str) -> _Stored:
        stored = among.get(item_id)
        if stored is None or stored.tenant != tenant.name:
            raise ServiceError(ErrorKind.NOT_FOUND, f"there is no {item_id[:64]!r}", param="id")
        return stored

    def _data(self, file_id: str) -> Path:
        assert _ID.fullmatch(file_id), "an id that was not made here"
        return self.directory / f"{file_id}.data"

    def _json(self, item_id: str) -> Path:
        assert _ID.fullmatch(item_id), "an id that was not made here"
        return self.directory / f"{item_id}.json"

    def _write(self, item_id: str, value: StoredFile | StoredBatch) -> None:
        """Whole or not at all: a crash must not leave half a record."""
        target = self._json(item_id)
        draft = target.with_suffix(".tmp")
        draft.write_bytes(msgspec.json.encode(value))
        draft.replace(target)

    def _load(self, kind: str, form: type[_Stored]) -> dict[str, _Stored]:
        found = {}
        for path in sorted(self.directory.glob(f"{kind}-*.json")):
            if _ID.fullmatch(path.stem):
                found[path.stem] = msgspec.json.decode(path.read_bytes(), type=form)
        return found
