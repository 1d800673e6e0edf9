"""Writes that succeed for a single writer: create a file that must not exist, replace the version that was read.

Local files and the stores with conditional puts (S3 and what speaks its protocol, GCS) have them; ``memory://`` has
them within its process.
"""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote

import fsspec.asyn

from pipeline.errors import ConfigError
from pipeline.inputs.local import LOCK, durable_file, read_file, write_file
from pipeline.inputs.remote import error_code, filesystem, is_local, local_path, protocol
from pipeline.inputs.retry import environment_faults, retried

__all__ = ["create_exclusive", "read_with_token", "replace_if"]


_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
# What a store answers where the condition of a put does not hold.
_REFUSED_CODES = frozenset({"PreconditionFailed", "412"})
_memory_lock = threading.Lock()


def create_exclusive(url: str, data: bytes) -> bool:
    """Create a file; of several writers one gets True. False where the file exists, which then stays as it is.

    A local file is whole and durable from the moment it can be seen. A remote put whose answer was lost is recognised
    by its bytes, so ``data`` should differ between writers (name the owner in it).

    Raises:
        EnvironmentFault: access denied, disk full, no such bucket.
        ConfigError: the store has no conditional puts.
    """
    if is_local(url):
        with environment_faults(url, "creating", writing=True):
            return _create_local(os.path.abspath(local_path(url)), data)
    return _put(url, data, None) is not None


def read_with_token(url: str) -> tuple[bytes, str]:
    """A file's bytes, and a token of this version for :func:`replace_if`.

    Raises:
        FileNotFoundError: there is no such file.
        EnvironmentFault: access denied.
        ConfigError: the store has no conditional puts.
    """
    if is_local(url):
        data = retried(lambda: read_file(local_path(url)), url, "reading")
        return data, _content_token(data)
    return _store_of(url)[0](url)


def replace_if(url: str, data: bytes, token: str) -> str | None:
    """Replace a file if it still is the version of ``token``.

    Writers of equal bytes are not told apart: ``data`` should differ between them and from what was there.

    Returns:
        The new version's token; None where the file is another version, or gone.

    Raises:
        EnvironmentFault: access denied, disk full, no such bucket.
        ConfigError: the store has no conditional puts.
    """
    if not is_local(url):
        return _put(url, data, token)
    path = os.path.abspath(local_path(url))
    with environment_faults(url, "replacing", writing=True):
        if not os.path.exists(path):
            return None
        with _locked(path):
            try:
                current = read_file(path)
            except FileNotFoundError:
                return None
            if _content_token(current) != token:
                return None
            write_file(path, data)
    return _content_token(data)


def _content_token(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _create_local(path: str, data: bytes) -> bool:
    with durable_file(path, data) as temporary:
        try:
            # A link appears with all of the bytes, and fails where the name is taken.
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_link(path, data)
    return True


def _create_without_link(path: str, data: bytes) -> bool:
    """For file systems without hard links: others may see the file while it is still being written."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        return False
    return True


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock file beside ``path``; the system frees it when its holder dies."""
    folder, name = os.path.split(path)
    with open(os.path.join(folder, f".{name}{LOCK}"), "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _put(url: str, data: bytes, token: str | None) -> str | None:
    """A conditional put: of a file that does not exist (``token`` None), or over the version of ``token``."""
    read, put = _store_of(url)
    verb = "creating" if token is None else "replacing"

    def attempt() -> str | None:
        try:
            return put(url, data, token)
        except FileExistsError:
            return None
        except FileNotFoundError as error:
            if token is None or error_code(error) == "NoSuchBucket":
                raise
            return None
        except OSError as error:
            if error_code(error) in _REFUSED_CODES:
                return None
            raise

    written = retried(attempt, url, verb, writing=True)
    if written is None:
        # A put that is repeated because its answer was lost meets its own first write.
        with suppress(FileNotFoundError):
            current, now = read(url)
            return now if current == data else None
    return written


_Read = Callable[[str], tuple[bytes, str]]
_Put = Callable[[str, bytes, str | None], str | None]


def _store_of(url: str) -> tuple[_Read, _Put]:
    stores: dict[str, tuple[_Read, _Put]] = {
        "s3": (_read_s3, _put_s3),
        "s3a": (_read_s3, _put_s3),
        "gs": (_read_gcs, _put_gcs),
        "gcs": (_read_gcs, _put_gcs),
        "memory": (_read_memory, _put_memory),
    }
    store = stores.get(protocol(url))
    if store is None or "::" in url:
        raise ConfigError(
            f"{url}: {protocol(url)} has no conditional writes, so two jobs could not be kept apart; "
            "give a local folder, s3:// or gs://"
        )
    return store


def _read_s3(url: str) -> tuple[bytes, str]:
    system, path = filesystem(url)
    bucket, key, _ = system.split_path(path)

    async def get() -> tuple[bytes, str]:
        answer = await system._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return bytes(await body.read()), str(answer["ETag"])

    answer: tuple[bytes, str] = retried(lambda: fsspec.asyn.sync(system.loop, get), url, "reading")
    return answer


def _put_s3(url: str, data: bytes, token: str | None) -> str | None:
    system, path = filesystem(url)
    bucket, key, _ = system.split_path(path)
    condition = {"IfNoneMatch": "*"} if token is None else {"IfMatch": token}
    answer = system.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    return str(answer["ETag"])


def _read_gcs(url: str) -> tuple[bytes, str]:
    system, path = filesystem(url)

    def attempt() -> tuple[bytes, str]:
        before = str(system.info(path)["generation"])
        data = bytes(system.cat_file(path))
        if str(system.info(path)["generation"]) != before:
            raise OSError(errno.EAGAIN, f"{url} was replaced while it was read")
        return data, before

    return retried(attempt, url, "reading")


def _put_gcs(url: str, data: bytes, token: str | None) -> str | None:
    system, path = filesystem(url)
    bucket, key, _ = system.split_path(path)
    place = system.base.replace("/storage/v1/", "/upload/storage/v1/") + f"b/{quote(bucket, safe='')}/o"
    answer = system.call(
        "POST",
        place,
        uploadType="media",
        name=key,
        ifGenerationMatch=token or "0",
        headers={"Content-Type": "application/octet-stream"},
        data=data,
        json_out=True,
    )
    return str(answer["generation"])


def _read_memory(url: str) -> tuple[bytes, str]:
    system, path = filesystem(url)
    data = bytes(system.cat_file(path))
    return data, _content_token(data)


def _put_memory(url: str, data: bytes, token: str | None) -> str | None:
    system, path = filesystem(url)
    with _memory_lock:
        if not system.exists(path):
            if token is not None:
                return None
        elif token is None or _content_token(bytes(system.cat_file(path))) != token:
            return None
        system.pipe_file(path, data)
    return _content_token(data)
