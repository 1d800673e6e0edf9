"""Operations on files that fail: repeated where the error may pass, one clear line where it lasts."""

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import EnvironmentFault
from pipeline.inputs.remote import (
    BucketError,
    CredentialsError,
    error_code,
    is_local,
    is_object_store,
    local_path,
    mapped_errors,
    protocol,
)

__all__ = ["RetriesError", "environment_faults", "retried", "retried_async", "with_retries"]


T = TypeVar("T")
_LASTING_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_ERRNOS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.ELOOP,
        errno.EFBIG,
        errno.ENOTSUP,
    }
)
_AGAIN = "then run the same command again: finished units count"


class RetriesError(OSError):
    """An error that did not pass within the retries; the last one is its cause."""


def with_retries(
    action: Callable[[], T],
    *,
    what: str,
    attempts: int = 5,
    first_wait: float = 0.2,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Do ``action``, again after OSErrors that may pass (connections, time-outs, input/output errors).

    Args:
        action: what to do; it must be fit to be done again from the start.
        what: names the action in the error text.
        attempts: how often at most.
        first_wait: seconds before the second attempt; each further wait is twice as long.
        sleep: waits that many seconds.

    Raises:
        RetriesError: the last attempt's error in context.
        OSError: errors that last (no such file, no permission, disk full), and errors of other types, at once and as
            they are.
    """
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except OSError as error:
            _raise_lasting(error, what, attempt, attempts)
            sleep(first_wait * 2 ** (attempt - 1))
    raise ValueError(f"{what}: attempts must be 1 or more, not {attempts}")


def _raise_lasting(error: OSError, what: str, attempt: int, attempts: int) -> None:
    """Raise an error that lasts, or the last attempt's; return where there should be another attempt."""
    if isinstance(error, _LASTING_ERRORS) or error.errno in _LASTING_ERRNOS:
        raise error
    if attempt == attempts:
        text = f"{what} failed {attempts} times, the last time with {type(error).__name__}: {error}"
        raise (RetriesError(error.errno, text) if error.errno else RetriesError(text)) from error


def retried(action: Callable[[], T], url: str, verb: str, *, writing: bool = False) -> T:
    """Do ``action`` on a file, with retries; ``verb`` ("writing") and the name begin the text of every error.

    Raises:
        EnvironmentFault: an error that lasts until somebody mends it; an error that did not pass within the retries
            where a file is written, or where a remote store did not answer at all.
        FileNotFoundError: there is no such file (where it is read).
        OSError: another error that did not pass within the retries.
    """

    def attempt() -> T:
        with mapped_errors(url):
            return action()

    with environment_faults(url, verb, writing=writing):
        return with_retries(attempt, what=f"{verb} {url}")


async def retried_async(
    action: Callable[[], Awaitable[T]], url: str, verb: str, *, writing: bool = False, attempts: int = 5
) -> T:
    """As :func:`retried`, of an action to be awaited; others on the event loop go on during the waits."""
    with environment_faults(url, verb, writing=writing):
        for attempt in range(1, attempts + 1):
            try:
                with mapped_errors(url):
                    return await action()
            except OSError as error:
                _raise_lasting(error, f"{verb} {url}", attempt, attempts)
                await asyncio.sleep(0.2 * 2 ** (attempt - 1))
    raise ValueError(f"{verb} {url}: attempts must be 1 or more, not {attempts}")


@contextmanager
def environment_faults(url: str, verb: str, *, writing: bool = False) -> Iterator[None]:
    """Turn OSErrors that last until somebody mends the machine or the store into EnvironmentFault.

    Access denied, missing credentials and a store that does not answer always; where a file is written also a full or
    read-only disk, a bucket that does not exist, a name that cannot be a file, and whatever did not pass.
    """
    try:
        yield
    except RetriesError as error:
        if not writing and (is_local(url) or error_code(error)):
            raise
        cure = "check the disk" if is_local(url) else "check the network, the endpoint and the store"
        raise EnvironmentFault(f"{error.strerror or error}; {cure}, {_AGAIN}") from error
    except OSError as error:
        cause = _access_fault(error, url) or (_writing_fault(error, url) if writing else None)
        if cause is None:
            raise
        raise EnvironmentFault(f"{verb} {url}: {cause}") from error


def _access_fault(error: OSError, url: str) -> str | None:
    if isinstance(error, CredentialsError):
        return f"no credentials for {protocol(url)} ({_reason(error)}); log in or set them on every node, {_AGAIN}"
    if isinstance(error, PermissionError):
        if is_local(url):
            user = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
            return f"permission denied for {user} ({error.strerror}); change owner or mode of {_nearest(url)}, {_AGAIN}"
        code = error_code(error)
        return (
            f"access denied{f' ({code})' if code else ''}; the credentials may have expired or lack the right to it: "
            f"renew them or change the policy of the bucket, {_AGAIN}"
        )
    return None


def _writing_fault(error: OSError, url: str) -> str | None:
    if isinstance(error, BucketError) or (isinstance(error, FileNotFoundError) and is_object_store(url)):
        bucket = url.partition("://")[2].partition("/")[0]
        return f"there is no bucket {bucket!r}; check its name, or create it (buckets are never created here)"
    place = _nearest(url) if is_local(url) else url.partition("://")[2].partition("/")[0]
    if error.errno == errno.ENOSPC:
        return f"no space is left on the device of {place}; free space, {_AGAIN}"
    if error.errno == errno.EDQUOT:
        return f"the disk quota at {place} is used up; free space or raise it, {_AGAIN}"
    if error.errno == errno.EROFS:
        return f"{place} is on a read-only file system; mount it writable or give another place"
    if error.errno == errno.EFBIG:
        return f"the file is larger than the file system of {place} or the process's limit allows; give another place"
    if error.errno == errno.ENAMETOOLONG:
        return "the name is longer than the file system allows; give a shorter one"
    if error.errno == errno.ENOTSUP:
        return f"{place} does not support this ({_reason(error)}); give a local folder, s3:// or gs://"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{place} is a file where a folder is needed; remove it or give another place"
    if isinstance(error, IsADirectoryError):
        return "a folder of that name is there; remove it or give another place"
    if isinstance(error, FileNotFoundError):
        return f"no folder can be made below {place}, or it was removed while it was written to; give another place"
    return None


def _nearest(url: str) -> str:
    """The file, or the folder nearest above it, that exists."""
    path = os.path.abspath(local_path(url))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path


def _reason(error: BaseException) -> str:
    """The client's own words, on one line."""
    return " ".join(str(error.__cause__ or error).split())
