import numpy as np
import pytest

from pipeline.store.create import create_store
from pipeline.store.layout import FAILED, OK
from pipeline.store.writer import StoreWriter
from tests.pipeline.store.support import finish_store
from tests.pipeline.store.test_layout import IDENTITY, KEYS, LAYOUT, Blocks, unit_blocks

ALL = ("features", "image", "seg", "depth", "cls", "valid")
STATUS = ((OK, FAILED, OK, OK), (OK, OK, FAILED))
GOOD = [0, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Blocks]:
    """A store with failures and holes, and everything that is in it."""
    url = str(tmp_path_factory.mktemp("loader"))
    create_store(url, LAYOUT, IDENTITY)
    units = [unit_blocks(LAYOUT, status, seed) for seed, status in enumerate(STATUS)]
    for number, blocks in enumerate(units):
        StoreWriter(url, LAYOUT).write(KEYS[number], blocks)
    finish_store(url, STATUS)
    return url, {name: np.concatenate([unit[name] for unit in units]) for name in units[0]}
