"""Names of files, and the one place that knows fsspec: file systems by URL, and their errors in one vocabulary.

A name is a local path, a ``file://`` URL, or any URL that fsspec serves (``s3://``, ``gs://``, ``http://``,
``memory://``). Remote credentials and endpoints come from fsspec's own configuration (files in
``~/.config/fsspec`` or ``FSSPEC_*`` variables).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec.core

from pipeline.errors import InputError, PipelineError

__all__ = [
    "BucketError",
    "CredentialsError",
    "error_code",
    "filesystem",
    "is_local",
    "is_object_store",
    "join",
    "local_path",
    "mapped_errors",
    "protocol",
]


_EXTRA_OF_SCHEME = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "b2", "r2", "hf"})
# Error codes of S3 and GCS that say that the same request may be served later.
_PASSING_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "ConditionalRequestConflict"})
_UNSUPPORTED_CODES = frozenset({"NotImplemented", "501", "MethodNotAllowed", "405"})
_FULL_CODES = frozenset({"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"})


class CredentialsError(PermissionError):
    """The client has no credentials, or could not renew them."""


class BucketError(FileNotFoundError):
    """The bucket, not the file in it, does not exist."""


def is_local(url: str) -> bool:
    """Whether the name is a path of this machine (a plain path or a ``file:`` URL)."""
    return url.startswith("file:") or "://" not in url


def local_path(url: str) -> str:
    """The operating system's path of a local name; ValueError for a remote one."""
    if not is_local(url):
        raise ValueError(f"{url} is not a local name")
    return url.removeprefix("file://").removeprefix("file:")


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` below it; empty parts are left out."""
    below = "/".join(part.strip("/") for part in parts if part.strip("/"))
    return f"{url}{below}" if not below or url.endswith("/") else f"{url}/{below}"


def protocol(url: str) -> str:
    """The scheme of a remote URL (``s3``), of chained ones the last (``simplecache::s3://...`` gives ``s3``)."""
    return url.partition("://")[0].rpartition("::")[2].lower()


def is_object_store(url: str) -> bool:
    """Whether a remote URL is of an object store: it has buckets and keys, and no folders that must be created."""
    return protocol(url) in _OBJECT_STORES


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a remote URL, and the file's path in it.

    Raises:
        InputError: no such scheme, or its package is not installed.
    """
    # A listing kept in memory would hide the receipts and shards that other machines have written since.
    try:
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        scheme = protocol(url)
        extra = _EXTRA_OF_SCHEME.get(scheme)
        cure = f"pip install 'featup-datasets[{extra}]'" if extra else "install it"
        raise InputError(f"{url} needs a package that is not installed ({error}); {cure}") from error
    except ValueError as error:
        raise InputError(f"{url} cannot be served: {error}; use a path or a URL that fsspec knows") from error
    return system, path


def error_code(error: BaseException | None) -> str:
    """The code an object store answered with (``NoSuchBucket``, ``412``), '' where none can be found.

    s3fs translates botocore's errors and keeps the original as the cause.
    """
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        # aiohttp calls it status, gcsfs code.
        code = getattr(error, "status", None) or (None if hasattr(error, "status") else getattr(error, "code", None))
        if isinstance(code, int | str) and code:
            return str(code)
        error = error.__cause__
    return ""


@contextmanager
def mapped_errors(url: str) -> Iterator[None]:
    """Turn the errors of remote clients into OSErrors of the right kind.

    Raises:
        BucketError: the bucket does not exist.
        CredentialsError: there are no credentials, or they cannot be renewed.
        PermissionError: access denied.
        OSError: whatever else the client raised, with the errno that says whether it may pass.
    """
    try:
        yield
    except (EOFError, PipelineError):
        raise
    except OSError as error:
        kind = _kind(error, url)
        if kind is None:
            raise
        raise kind from error
    except Exception as error:
        raise (_kind(error, url) or OSError(f"{url}: {type(error).__name__}: {error}")) from error


def _kind(error: Exception, url: str) -> OSError | None:
    """The OSError that a remote client's error stands for; None where it is a fit one already."""
    code = error_code(error)
    text = f"{url}: {error}"
    if code == "NoSuchBucket" and not isinstance(error, BucketError):
        return BucketError(errno.ENOENT, text)
    if _lacks_credentials(error):
        return CredentialsError(errno.EACCES, text)
    if code in _FULL_CODES:
        return OSError(errno.ENOSPC, text)
    if code in ("401", "403") or str(error).startswith("Forbidden:"):
        return PermissionError(errno.EACCES, text)
    if code in _PASSING_CODES:
        return OSError(errno.EAGAIN, text)
    if code in _UNSUPPORTED_CODES or isinstance(error, NotImplementedError):
        return OSError(errno.ENOTSUP, text)
    if isinstance(error, FileNotFoundError) and protocol(url) in ("http", "https"):
        # fsspec says so of a server that is in trouble or does not answer, too.
        cause = error.__cause__
        if cause is not None and code not in ("404", "410"):
            return OSError(errno.EAGAIN, f"{url}: {type(cause).__name__}: {cause}")
    return None


def _lacks_credentials(error: Exception) -> bool:
    """Whether an error of botocore or google.auth is about credentials; neither package needs to be there."""
    kinds = {kind.__name__: kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    words = ("Credential", "SSO", "TokenRetrieval", "ProfileNotFound")
    if any(module in ("botocore", "aiobotocore") and any(w in name for w in words) for name, module in kinds.items()):
        return True
    return kinds.get("GoogleAuthError") == "google"
