"""Work that may hang or crash, in a child process: one question at a time, with a time limit.

A library written in C can be interrupted neither by a thread nor by a signal handler, and a defect in it ends its
process. A ``ChildProcess`` therefore asks a child, and replaces it when it takes too long or crashes. The child is a
module, run as a program, that calls :func:`serve`. It ends with its parent: when its input is closed, when its parent
process changes, or, in the midst of a question, by its own alarm.
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
from collections.abc import Callable
from typing import IO, Any

from pipeline.errors import EnvironmentFault

__all__ = ["ATTEMPTS", "ChildCrashedError", "ChildProcess", "ChildTimeoutError", "serve"]

ATTEMPTS = 2
"""How often a question is asked whose child ends without an answer."""
_READY = "ready"
_START_SECONDS = 300.0
_ALARM_GRACE = 5.0  # seconds by which the child's own limit is longer than its parent's
_EXIT_SECONDS = 10.0
_PIPE_BYTES = 1 << 20  # the most that Linux allows an ordinary user by default
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    # glibc keeps freed memory for the next sample: returned to the system, it costs page faults, a third of the time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class ChildTimeoutError(Exception):
    """The answer did not come in time; the child was ended."""


class ChildCrashedError(Exception):
    """The child ended without an answer, :data:`ATTEMPTS` times; the text says how, ``signal SIGSEGV``."""


class ChildProcess:
    """A child process that answers questions; it starts with the first one and is replaced when it ends.

    Safe to call from several threads; they are served one after the other.
    """

    def __init__(self, module: str, name: str, python: str = sys.executable) -> None:
        """
        Args:
            module: what is run in the child; it calls :func:`serve`.
            name: of the process, in texts: ``decoder``.
            python: the interpreter of the child.
        """
        self._module, self._name, self._python = module, name, python
        self._child: _Child | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is no child."""
        return self._child.process.pid if self._child else None

    def ask(self, question: Any, seconds: float) -> Any:
        """The child's answer; an exception that its work raised is raised here.

        When the child ends without an answer, a new child gets the question once more: the cause may be an earlier
        question, or a lack of memory.

        Args:
            question: anything that can be pickled.
            seconds: the answer must come within.

        Raises:
            ChildTimeoutError: it did not.
            ChildCrashedError: the child crashes on it.
            EnvironmentFault: the child process cannot be started.
        """
        status = 0
        with self._lock:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    child = self._child = self._child or _Child(self._module, self._name, self._python)
                except EnvironmentFault:
                    # Killed while it started, by a lack of memory for instance: that may pass.
                    if attempt == ATTEMPTS:
                        raise
                    continue
                try:
                    answer = child.ask((question, seconds), seconds)
                except _ChildEndedError:
                    status = self._drop(_EXIT_SECONDS)
                    if status != -signal.SIGALRM:
                        continue
                    answer = None
                except BaseException:
                    self._drop(0)  # or the next question would get the answer to this one
                    raise
                if answer is None:
                    self._drop(0)
                    raise ChildTimeoutError
                (result,) = answer
                if isinstance(result, Exception):
                    raise result
                return result
        raise ChildCrashedError(_describe(status))

    def close(self) -> None:
        """End the child process. A later question starts another one."""
        with self._lock:
            self._drop(_EXIT_SECONDS)

    def _drop(self, patience: float) -> int:
        child, self._child = self._child, None
        return child.end(patience) if child else 0


class _ChildEndedError(Exception):
    """The child process ended instead of answering."""


class _Child:
    """A started child process and its pipes: pickled requests go in, pickled answers come out, in turn."""

    def __init__(self, module: str, name: str, python: str) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self.process = subprocess.Popen(
                [python, "-P", "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pipesize=_PIPE_BYTES,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise EnvironmentFault(
                f"the {name} process cannot be started ({type(error).__name__}: {error}): {python} must be a "
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
                f"the {name} process ended with {_describe(status)} before it was ready; its own message stands above "
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


def serve(work: Callable[[Any], Any]) -> None:
    """The child: answer the questions that come by standard input, until it is closed or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # A library that prints must not print into the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent closed its pipes, or died
        _serve(work, sys.stdin.buffer, answers)
    os._exit(0)  # nothing to clean up, and an answer that nobody reads is not flushed


def _serve(work: Callable[[Any], Any], requests: IO[bytes], answers: IO[bytes]) -> None:
    parent = os.getppid()
    _send(answers, _READY)
    while True:
        while not select.select([requests], [], [], 10.0)[0]:
            # The input may be held open by a process that the parent forked.
            if os.getppid() != parent:
                return
        question, seconds = pickle.load(requests)
        signal.setitimer(signal.ITIMER_REAL, seconds + _ALARM_GRACE)
        answer: Any
        try:
            answer = work(question)
        except Exception as error:  # noqa: BLE001 - raised again by the parent
            error.add_note(traceback.format_exc())
            answer = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, (answer,))
