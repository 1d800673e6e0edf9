"""The actor that featurizes units."""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featup.errors import FeatupError
from pipeline.compute.load import unpack
from pipeline.compute.models import Setup
from pipeline.compute.outcome import Outcome, failed_unit
from pipeline.compute.unit import UnitProcessor
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import PipelineError
from pipeline.store.layout import Layout

__all__ = ["Featurizer"]


class Featurizer:
    """The actor: rows of loaded units in, rows with receipts out. Features never leave it but for the store."""

    def __init__(self, config: PrecomputeConfig, setup: Setup, layout: Layout, processes: int) -> None:
        """
        Args:
            config, setup, layout, processes: see :class:`UnitProcessor`.
        """
        # While one thread computes and one writes, each asks for Python's lock all the time: hand it over sooner.
        sys.setswitchinterval(0.0005)
        # What keeps this process from working would be raised by Ray with the traceback of every attempt to start it.
        # It is told once, with the first unit.
        self.refusal: Exception | None = None
        try:
            self.processor = UnitProcessor(config, setup, layout, processes)
        except (PipelineError, FeatupError, OSError) as error:
            self.refusal = error

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One unit, as ``pipeline.compute.load.load_row`` made it, to ``{"receipt": [JSON], "fault": [text]}``."""
        outcomes = []
        for key, loaded in unpack(batch):
            if isinstance(loaded, Outcome):
                outcomes.append(loaded)
            elif self.refusal is not None:
                receipt = failed_unit(key, loaded.shard, loaded.records, self.refusal)
                outcomes.append(Outcome(receipt, "environment"))
            else:
                outcomes.append(self.processor.process(key, loaded))
        return {
            "receipt": np.array([outcome.receipt.to_json() for outcome in outcomes], dtype=object),
            "fault": np.array([outcome.fault for outcome in outcomes], dtype=object),
        }
