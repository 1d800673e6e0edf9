"""Local copies of remote files, in a cache folder that all processes of a node share."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import EnvironmentFault, InputError
from pipeline.inputs.file_stat import stat
from pipeline.inputs.local import TEMPORARY, sync_file
from pipeline.inputs.remote import filesystem, is_local, local_path
from pipeline.inputs.retry import retried
from pipeline.redaction import redact

__all__ = ["cache_folders", "local_copy"]


# What a folder that cannot be written says: the next one is tried.
_UNWRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}
)
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS})


def local_copy(url: str, digest: str | None = None) -> str:
    """A local path with the bytes of ``url``: itself where it is local, else a copy that a node's processes share.

    The copy lies in ``$FEATUP_CACHE``, else ``~/.cache/featup``, else (where that cannot be written) the folder for
    temporary files. It is fetched once, whoever asks, and stays until somebody removes it; a file that was replaced
    (another size or stamp) is fetched again.

    Args:
        url: the file.
        digest: its sha256 in hex, where it is known: a copy of that content is used wherever it came from, and other
            content is refused. A file that is local already is not checked.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file has another digest.
        EnvironmentFault: access denied, or no cache folder can be written.
    """
    if is_local(url):
        return local_path(url)
    name = os.path.basename(redact(url).rstrip("/")) or "file"
    key = digest or _version(url)
    roots = cache_folders()
    for root in roots:
        if key and os.path.exists(path := os.path.join(root, key, name)):
            return path
    problems = []
    for root in roots:
        try:
            return _fetch_once(url, root, key, name, digest)
        except OSError as error:
            if error.errno not in _UNWRITABLE:
                raise
            problems.append(f"{root}: {error.strerror}")
    raise EnvironmentFault(
        f"no folder for a local copy of {url} can be written ({'; '.join(problems)}); set FEATUP_CACHE to one that can"
    )


def cache_folders() -> list[str]:
    """Where copies may lie, the preferred folder first."""
    chosen = os.environ.get("FEATUP_CACHE")
    if chosen:
        return [os.path.abspath(os.path.expanduser(chosen))]
    folders = [os.path.join(os.path.expanduser("~"), ".cache", "featup")]
    folders.append(os.path.join(tempfile.gettempdir(), f"featup-{os.getuid()}"))
    # Of a user without a home folder "~" stays as it is, and a folder of that name is not meant.
    return [folder for folder in folders if os.path.isabs(folder)]


def _version(url: str) -> str:
    """A name for this version of a remote file, '' where its store has no stamp that would tell versions apart."""
    state = stat(url)
    return hashlib.sha256(repr((redact(url), state.size, state.stamp)).encode()).hexdigest() if state.stamp else ""


def _fetch_once(url: str, root: str, key: str, name: str, digest: str | None) -> str:
    """The copy below ``root``, fetched unless another process did so; OSError where it cannot be written."""
    os.makedirs(root, mode=0o700, exist_ok=True)
    if os.stat(root).st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "it belongs to another user")
    with _locked(os.path.join(root, f".{key or 'unversioned'}.lock")):
        path = os.path.join(root, key, name)
        if key and os.path.exists(path):
            return path
        folder = os.path.join(root, f".{uuid.uuid4().hex}{TEMPORARY}")
        os.mkdir(folder)
        try:
            temporary = os.path.join(folder, name)
            _download(url, temporary)
            content = _file_digest(temporary)
            if digest is not None and content != digest:
                raise InputError(
                    f"{url} is not the file that was expected: its sha256 is {content}, wanted {digest}; it was "
                    "probably replaced, so put it back"
                )
            path = os.path.join(root, key or content, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.replace(temporary, path)
            sync_file(os.path.dirname(path))
        finally:
            shutil.rmtree(folder)
    return path


def _download(url: str, path: str) -> None:
    def attempt() -> None:
        system, source = filesystem(url)
        size = system.info(source).get("size")
        system.get_file(source, path)
        received = os.path.getsize(path)
        if size is not None and received != size:
            raise OSError(errno.EAGAIN, f"{received} bytes of {size} came")

    retried(attempt, url, "fetching")
    sync_file(path)


def _file_digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock file. Where the file system has no locks, two processes may fetch the same file: no harm."""
    with open(path, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
