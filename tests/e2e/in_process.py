"""Runs jobs in the tests' own process, on one Ray for all jobs of a module."""

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module

from tests.e2e import support


def run(name: str, *args: object, status: int = 0, says: str = "") -> str:
    """Run a job and return what it printed; the exit status must be ``status``.

    The first job starts Ray, as it does in a process of its own, and the others find it: the module's tests shut it
    down. What its workers print comes a little later, so that ``says`` is waited for.
    """
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(text), warnings.catch_warnings():
        # Ray warns of itself, which stops no job in a process of its own.
        warnings.simplefilter("ignore")
        found = import_module(f"jobs.{name}").main([str(argument) for argument in args])
        support.wait_for(lambda: says in text.getvalue(), repr(says), 30)
    assert found == status, f"exit status {found}, expected {status}:\n{text.getvalue()[-6000:]}"
    return text.getvalue()
