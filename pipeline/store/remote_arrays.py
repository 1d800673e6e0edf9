"""Zarr's storage on a remote file system, with the retries and the error texts that all other files have.

zarr-python passes on whatever the remote client raises: an answer that was cut short, or an endpoint that could not be
reached for a moment, would end a job.
"""

from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from pipeline.inputs import storage
from pipeline.inputs.retry import retried_async

__all__ = ["RemoteArrays"]


class RemoteArrays(WrapperStore[FsspecStore]):
    """A Zarr store at an fsspec URL.

    Raises, from every method:
        EnvironmentFault: access denied, no such bucket.
        OSError: an error that did not pass within the retries.
    """

    @classmethod
    def at(cls, url: str, *, read_only: bool) -> "RemoteArrays":
        """The storage at a URL, with no listing kept in memory that would hide what other machines write."""
        options = {"use_listings_cache": False}
        return cls(FsspecStore.from_url(url, storage_options=options, read_only=read_only))

    def _url(self, key: str = "") -> str:
        return storage.join(self._store.fs.unstrip_protocol(self._store.path), key)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """One object, or a range of it; ``None`` where there is none."""
        return await retried_async(lambda: self._store.get(key, prototype, byte_range), self._url(key), "reading")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Ranges of several objects."""
        ranges = list(key_ranges)
        return await retried_async(lambda: self._store.get_partial_values(prototype, ranges), self._url(), "reading")

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return await retried_async(lambda: self._store.exists(key), self._url(key), "looking up")

    async def set(self, key: str, value: Buffer) -> None:
        """Write one object."""
        await retried_async(lambda: self._store.set(key, value), self._url(key), "writing", writing=True)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one object where there is none."""
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """Remove one object; one that is not there is fine."""
        await retried_async(lambda: self._store.delete(key), self._url(key), "removing", writing=True)

    async def delete_dir(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        await retried_async(lambda: self._store.delete_dir(prefix), self._url(prefix), "removing", writing=True)

    async def _listed(self, names: AsyncIterator[str]) -> list[str]:
        return [name async for name in names]

    async def list(self) -> AsyncIterator[str]:
        """Names of all objects."""
        for name in await retried_async(lambda: self._listed(self._store.list()), self._url(), "listing"):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Names of all objects below a prefix."""
        for name in await retried_async(
            lambda: self._listed(self._store.list_prefix(prefix)), self._url(prefix), "listing"
        ):
            yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below a prefix."""
        for name in await retried_async(
            lambda: self._listed(self._store.list_dir(prefix)), self._url(prefix), "listing"
        ):
            yield name
