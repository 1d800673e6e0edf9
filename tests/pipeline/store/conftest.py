"""Places for stores."""

from pathlib import Path

import pytest

from pipeline.store.create import create_store
from tests.pipeline.store.test_layout import IDENTITY, LAYOUT


@pytest.fixture(params=["path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "path" else f"memory://test_store{tmp_path}"


@pytest.fixture
def local(tmp_path: Path) -> str:
    """A created store, on this machine."""
    create_store(str(tmp_path / "local"), LAYOUT, IDENTITY)
    return str(tmp_path / "local")
