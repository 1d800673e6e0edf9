"""Tests of whole jobs carry the marker ``ray``, so that ``pytest -m 'not ray'`` leaves them out."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("ray")


@pytest.fixture(scope="session", autouse=True)
def _one_ray() -> Iterator[None]:
    """Jobs in the tests' own process share one Ray: the first starts it, the others find it and its warm workers."""
    yield
    if ray := sys.modules.get("ray"):
        ray.shutdown()
