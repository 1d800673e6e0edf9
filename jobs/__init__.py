"""Entry points: ``featup NAME``, or ``python -m jobs.NAME`` in a checkout and under ``ray job submit``.

Modules here import nothing heavy before they have read their arguments.
"""

import argparse
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

from featup.errors import FeatupError
from pipeline.errors import PipelineError, Reason
from pipeline.redaction import redact

__all__ = ["CommandParser", "add_failed", "at_least", "exit_status", "print_lines", "program"]


# Extras of the distribution that bring a package; all others come with [make].
_EXTRAS = {"skimage": "demo", "s3fs": "s3", "gcsfs": "gcs", "triton": "gpu", "av": "video", "datasets": "hf"}
_OWN = ("featup", "pipeline", "jobs", "featup_jobs")


def program(name: str) -> str:
    """The command as a user types it."""
    return f"python -m jobs.{name}" if __name__ == "jobs" else f"featup {name}"


def exit_status(name: str, work: Callable[[], bool]) -> int:
    """Do a job's work and say how it ended.

    Errors of the project's own, of files and networks, and packages that are not installed are printed in one line;
    notes of an interruption say how far the work came.

    Returns:
        0 where ``work`` returns true, else 1; 130 on Ctrl-C and 143 on SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal or log that is not UTF-8 shows the letters it lacks by their numbers.
            stream.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            return 0 if work() else 1
    except (PipelineError, FeatupError) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OWN:
            raise
        extra = _EXTRAS.get(package, "make")
        print(
            f"{name}: the package {package!r} is not installed; pip install 'featup-datasets[{extra}]'", file=sys.stderr
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"{name}: {type(error).__name__}: {redact(str(error))}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        return _stopped(name, stop, signal.SIGINT)
    except SystemExit as stop:
        if stop.code != signal.SIGTERM:
            raise
        return _stopped(name, stop, signal.SIGTERM)
    return 1


def print_lines(name: str, lines: Callable[[], Iterable[str]]) -> int:
    """Print the lines that a job gives, as they come. Exit status as that of :func:`exit_status`."""

    def work() -> bool:
        for line in lines():
            print(line)
        sys.stdout.flush()
        return True

    try:
        return exit_status(name, work)
    except BrokenPipeError:
        # The reader of a long list has seen enough; nothing is left to flush at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _stopped(name: str, stop: BaseException, number: int) -> int:
    done = "".join(f": {note}" for note in getattr(stop, "__notes__", [])[:1])
    print(f"{name}: stopped{done}", file=sys.stderr)
    return 128 + number


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the work by ``SystemExit``, as it does in Ray's drivers, so that what is open is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CommandParser(argparse.ArgumentParser):
    """For jobs without a config; what is wrong is said in one line, with the nearest name of an unknown option."""

    def __init__(self, name: str, description: str | None) -> None:
        """
        Args:
            name: of the job.
            description: its help, printed as it is written.
        """
        super().__init__(
            prog=program(name),
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """End the program with exit status 2."""
        known = [name for action in self._actions for name in action.option_strings]
        hints = [
            f"unknown option {name!r}"
            + "".join(f", did you mean {near!r}?" for near in get_close_matches(name, known, 1))
            for name in re.findall(r"--[\w-]+", message)
            if name not in known
        ]
        self.exit(2, f"{self.prog}: error: {'; '.join(hints) or message} (--help lists the options)\n")


def add_failed(parser: argparse.ArgumentParser) -> None:
    """Add the option that lists failed samples."""
    parser.add_argument(
        "--failed",
        nargs="*",
        metavar="REASON",
        choices=[reason.value for reason in Reason],
        help="list the failed samples (key, input shard, reason, detail), only those of these reasons where any are "
        "given: " + ", ".join(Reason),
    )


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number with a least value, for ``argparse``."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {least}")
        return int(text)

    return number
