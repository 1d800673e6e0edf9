import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import EnvironmentFault, InputError
from pipeline.inputs import storage
from pipeline.inputs.retry import environment_faults, retried, with_retries

ROOT = Path(__file__).resolve().parents[3]


class Flaky:
    """Raises the given errors one after the other, then returns how often it was called."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def test_errors_that_pass_are_retried_with_growing_waits() -> None:
    waits: list[float] = []
    action = Flaky(ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.EIO, "input/output error"))
    assert with_retries(action, what="reading", sleep=waits.append) == 4
    assert waits == [0.2, 0.4, 0.8]


def test_the_last_error_is_raised_in_context() -> None:
    waits: list[float] = []
    action = Flaky(*(OSError(errno.EIO, f"try {i}") for i in range(9)))
    with pytest.raises(OSError, match=r"reading x failed 3 times, the last time with OSError.*try 2") as caught:
        with_retries(action, what="reading x", attempts=3, first_wait=1.0, sleep=waits.append)
    assert caught.value.errno == errno.EIO
    assert isinstance(caught.value.__cause__, OSError)
    assert action.calls == 3
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        IsADirectoryError("x"),
        NotADirectoryError("x"),
        OSError(errno.ENOSPC, "disk full"),
        OSError(errno.EROFS, "read-only"),
        ValueError("x"),
        InputError("x"),
    ],
    ids=repr,
)
def test_errors_that_last_are_raised_at_once(error: Exception) -> None:
    action = Flaky(error)
    with pytest.raises(type(error)) as caught:
        with_retries(action, what="reading", sleep=lambda seconds: pytest.fail("waited"))
    assert caught.value is error
    assert action.calls == 1


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "x"), "writing {url}: no space is left on the device of {folder}; free space, then run"),
        (OSError(errno.EDQUOT, "x"), "writing {url}: the disk quota at {folder} is used up; free space or raise it"),
        (OSError(errno.EROFS, "x"), "writing {url}: {folder} is on a read-only file system; mount it writable or"),
        (PermissionError(errno.EACCES, "denied"), "writing {url}: permission denied for user {user} (denied); change"),
        (NotADirectoryError(), "writing {url}: {folder} is a file where a folder is needed; remove it or give"),
        (OSError(errno.ENAMETOOLONG, "x"), "writing {url}: the name is longer than the file system allows; give a sh"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_that_last_are_one_line_with_place_and_cure(tmp_path: Path, error: OSError, text: str) -> None:
    url = str(tmp_path / "none" / "a.bin")
    with pytest.raises(EnvironmentFault) as caught:
        retried(lambda: fail(error), url, "writing", writing=True)
    assert str(caught.value).startswith(text.format(url=url, folder=tmp_path, user=os.getuid()))
    assert len(str(caught.value).splitlines()) == 1


def test_reads_of_what_is_missing_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        retried(lambda: fail(FileNotFoundError("x")), str(tmp_path / "a"), "reading")
    with (
        pytest.raises(OSError, match="input/output error") as caught,
        environment_faults(str(tmp_path / "a"), "reading"),
    ):
        with_retries(Flaky(*[OSError(errno.EIO, "input/output error")] * 5), what="reading", sleep=lambda _: None)
    assert not isinstance(caught.value, EnvironmentFault)


def test_a_write_that_does_not_pass_is_one_line(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    with pytest.raises(EnvironmentFault, match=r"writing .*/a failed 5 times.*; check the disk, then run the same"):
        retried(lambda: fail(OSError(errno.EIO, "input/output error")), url, "writing", writing=True)


def test_credentials_in_a_url_are_left_out_of_the_error() -> None:
    url = "https://user:secret@host/a.tar?signature=5ec7e7"
    with pytest.raises(EnvironmentFault, match=r"writing https://host/a\.tar: access denied") as caught:
        retried(lambda: fail(PermissionError(url)), url, "writing", writing=True)
    assert "5ec7e7" not in str(caught.value)


def test_a_file_larger_than_the_limit_is_an_environment_fault(tmp_path: Path) -> None:
    """The system itself refuses the write, as it does where a quota or a disk ends."""
    code = f"""
import resource, signal
from pipeline.inputs import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
storage.write_atomic({str(tmp_path / "a")!r}, bytes(1000))
storage.write_atomic({str(tmp_path / "a")!r}, bytes(1001))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (
        f"EnvironmentFault: writing {tmp_path}/a: the file is larger than the file system of {tmp_path}" in run.stderr
    )
    assert (tmp_path / "a").read_bytes() == bytes(1000), "the old file stays"
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_below_a_file_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for action in (lambda url: storage.write_atomic(url, b"x"), storage.make_dirs):
        with pytest.raises(EnvironmentFault, match=r"/file is a file where a folder is needed; remove it or give ano"):
            action(str(tmp_path / "file" / "deep" / "a"))


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_an_environment_fault(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match="permission denied for user"):
        storage.write_atomic(str(tmp_path / "a"), b"x")
    tmp_path.chmod(0o700)
