"""Decoding in a child process, so that a time limit can end it and a crash of a decoder harms one sample only.

A decoder written in C can be interrupted neither by a thread nor by a signal handler, and a defect in it ends its
process. ``DecoderProcess`` therefore sends the members of a sample to a child process, one sample at a time, and
replaces the child when it takes too long or crashes. The child is this module, run as a program. It imports only
decoding modules. It ends with its parent: when its input is closed, when its parent process changes, or, in the midst
of decoding, by its own alarm.
"""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import IO, Any

from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample, prepare_sample
from pipeline.errors import EnvironmentFault, Reason, SampleError

__all__ = ["DecoderProcess"]


_READY = "ready"
_START_SECONDS = 300.0
_ALARM_GRACE = 5.0  # seconds by which the child's own limit is longer than its parent's
_EXIT_SECONDS = 10.0
_PIPE_BYTES = 1 << 20  # the most that Linux allows an ordinary user by default
_ATTEMPTS = 2
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    # glibc keeps freed memory for the next sample: returned to the system, it costs page faults, a third of the time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class DecoderProcess:
    """A child process that decodes samples; it starts with the first one and is replaced when it ends.

    Safe to call from several threads; they are served one after the other.
    """

    def __init__(self, python: str = sys.executable) -> None:
        """
        Args:
            python: the interpreter of the child.
        """
        self._python = python
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        return self._child.process.pid if self._child else None

    def prepare(self, members: Mapping[str, bytes], options: DecodeOptions) -> PreparedSample:
        """What :func:`pipeline.decode.sample.prepare_sample` returns, within ``options.decode_timeout`` seconds.

        When the child ends without an answer, a new child gets the sample once more: the cause may be an earlier
        sample, or a lack of memory.

        Raises:
            SampleError: that of ``prepare_sample``; ``DECODE_TIMEOUT``; ``UNDECODABLE`` when the decoder crashed.
            EnvironmentFault: the child process cannot be started.
        """
        status = 0
        with self._lock:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    child = self._child = self._child or _Child(self._python)
                except EnvironmentFault:
                    # Killed while it started, by a lack of memory for instance: that may pass.
                    if attempt == _ATTEMPTS:
                        raise
                    continue
                try:
                    answer = child.ask((dict(members), options), options.decode_timeout)
                except _ChildEndedError:
                    status = self._drop(_EXIT_SECONDS)
                    if status != -signal.SIGALRM:
                        continue
                    answer = None
                except BaseException:
                    self._drop(0)  # or the next sample would get the answer to this one
                    raise
                if answer is None:
                    self._drop(0)
                    raise SampleError(
                        Reason.DECODE_TIMEOUT,
                        f"decoding takes longer than decode_timeout = {options.decode_timeout:g} s; raise "
                        "decode_timeout if such files are meant to be in the data",
                    )
                if isinstance(answer, Exception):
                    raise answer
                sample: PreparedSample = answer
                return sample
        raise SampleError(
            Reason.UNDECODABLE,
            f"the decoder crashed on it {_ATTEMPTS} times, its process ended with {_describe(status)}: the file is "
            "damaged in a way that the decoder does not survive, or memory ran out; encode the file again, or lower "
            "max_pixels",
        )

    def close(self) -> None:
        """End the child process. A later sample starts another one."""
        with self._lock:
            self._drop(_EXIT_SECONDS)

    def _drop(self, patience: float) -> int:
        child, self._child = self._child, None
        return child.end(patience) if child else 0


class _ChildEndedError(Exception):
    """The child process ended instead of answering."""


class _Child:
    """A started child process and its pipes: pickled requests go in, pickled answers come out, in turn."""

    def __init__(self, python: str) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self.process = subprocess.Popen(
                [python, "-P", "-m", "pipeline.decode.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pipesize=_PIPE_BYTES,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise EnvironmentFault(
                f"the decoder process cannot be started ({type(error).__name__}: {error}): {python} must be a "
                "Python that runs, and the machine must have memory and process numbers left"
            ) from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        try:
            ready = self._receive(_START_SECONDS) == _READY
        except _ChildEndedError:
            ready = False
        if not ready:
            status = self.end(_EXIT_SECONDS)
            raise EnvironmentFault(
                f"the decoder process ended with {_describe(status)} before it was ready; its own message stands above "
                f"in the log. Install the project and what it needs for the Python of every node, {python}"
            )

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request; None when it does not come within ``seconds``."""
        try:
            _send(self._requests, request)
        except BrokenPipeError as error:
            raise _ChildEndedError from error
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        if not self._poll.poll(1000 * seconds):
            return None
        try:
            return pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError) as error:
            raise _ChildEndedError from error

    def end(self, patience: float) -> int:
        """Close the pipes, at which the child exits; kill it after ``patience`` seconds. Returns its exit status."""
        with contextlib.suppress(BrokenPipeError):  # a request that a crashed child did not read
            self._requests.close()
        self._answers.close()
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _send(pipe: IO[bytes], message: Any) -> None:
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the input is closed or the parent is gone."""
    parent = os.getppid()
    _send(answers, _READY)
    while True:
        while not select.select([requests], [], [], 10.0)[0]:
            # The input may be held open by a process that the parent forked.
            if os.getppid() != parent:
                return
        members, options = pickle.load(requests)
        signal.setitimer(signal.ITIMER_REAL, options.decode_timeout + _ALARM_GRACE)
        answer: PreparedSample | Exception
        try:
            answer = prepare_sample(members, options)
        except SampleError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - a defect of this program, raised again by the parent
            error.add_note(traceback.format_exc())
            answer = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)


def main() -> None:
    """The child process: decodes what it reads from standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A library that prints must not print into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent closed its pipes, or died
        _serve(sys.stdin.buffer, answers)
    os._exit(0)  # nothing to clean up, and an answer that nobody reads is not flushed


if __name__ == "__main__":
    main()
