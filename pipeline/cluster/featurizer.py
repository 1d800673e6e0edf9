"""The actor that featurizes units."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compute.load import unpack
from pipeline.compute.models import Setup
from pipeline.compute.unit import UnitProcessor
from pipeline.config.precompute import PrecomputeConfig
from pipeline.store.layout import Layout
from pipeline.store.ledger import Receipt

__all__ = ["Featurizer"]


class Featurizer:
    """The actor: rows of loaded units in, rows with receipts out. Features never leave it but for the store."""

    def __init__(self, config: PrecomputeConfig, setup: Setup, layout: Layout) -> None:
        # While one thread computes and one writes, each asks for Python's lock all the time: hand it over sooner.
        sys.setswitchinterval(0.0005)
        self.processor = UnitProcessor(config, setup, layout)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One unit, as ``pipeline.compute.load.load_row`` made it, to ``{"receipt": [JSON]}``."""
        receipts = []
        for key, loaded in unpack(batch):
            receipt = loaded if isinstance(loaded, Receipt) else self.processor.process(key, loaded)
            receipts.append(receipt.to_json())
        return {"receipt": np.array(receipts, dtype=object)}
