"""Entry points: ``python -m jobs.NAME``, in a shell and under ``ray job submit`` alike."""

import sys
from collections.abc import Callable

from featup.errors import FeatupError
from pipeline.errors import PipelineError

__all__ = ["exit_status"]


def exit_status(name: str, work: Callable[[], bool]) -> int:
    """Do a job's work: 0 where it returns true, else 1; errors of the project's own are printed and give 1 as well."""
    try:
        return 0 if work() else 1
    except (PipelineError, FeatupError) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
