"""Ray's errors in one line, wherever a driver waits for what its cluster does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray.exceptions

from featup.errors import FeatupError
from pipeline.errors import JobFailedError, PipelineError

__all__ = ["ray_errors_in_one_line"]


@contextmanager
def ray_errors_in_one_line(progress: Callable[[], str]) -> Iterator[None]:
    """Raise what Ray says as one line, with how far the work came.

    Args:
        progress: how far, and what to do now, as one clause.

    Raises:
        JobFailedError: Ray ended the work, or a file or a network did.
        PipelineError, FeatupError: raised in a worker, as it was raised there.
        Exception: any other that a worker raised, which is a fault of this program: with its traceback.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, (PipelineError, FeatupError)):
            raise cause from None
        if cause is not None and not isinstance(cause, (OSError, ray.exceptions.RayError)):
            raise cause from error
        text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        raise JobFailedError(
            f"Ray ended the run: {first.strip()} ({type(error).__name__}); {progress()}. The log of the process that "
            "died is under /tmp/ray/session_latest/logs"
        ) from error
