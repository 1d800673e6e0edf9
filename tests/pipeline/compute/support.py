"""A store made in this process, without Ray: plan, models, arrays, units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.compute.load import LoadedUnit, decode_options, load_unit
from pipeline.compute.models import Setup
from pipeline.compute.prepare import (
    as_stored,
    check_options,
    complete_plan,
    create_or_grow,
    layout_of,
    load_models,
    plan_store,
    prepare,
)
from pipeline.compute.recheck import recheck_input
from pipeline.compute.unit import UnitProcessor
from pipeline.config.precompute import PrecomputeConfig
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan
from pipeline.options import Size
from pipeline.store.create import declare_complete, withdraw_complete
from pipeline.store.index import Summary, write_index
from pipeline.store.layout import Layout
from pipeline.store.ledger import Ledger, Receipt
from pipeline.store.verification import find_plan


@dataclass
class Store:
    """Everything a run has at hand after its preparation."""

    config: PrecomputeConfig
    plan: Plan
    layout: Layout
    setup: Setup
    ledger: Ledger
    lines: list[str]

    def load(self, unit: int) -> LoadedUnit:
        return load_unit(self.plan, self.plan.unit(unit), decode_options(self.config, self.setup.mean))

    def processor(self, **arguments: Any) -> UnitProcessor:
        return UnitProcessor(self.config, self.setup, self.layout, **arguments)

    def run(self, units: int | None = None) -> Summary:
        """Do the units that are left, or the first so many of them, and end the run where all are done."""
        todo = self.ledger.done().todo(self.plan.units)[:units]
        failures: dict[int, Receipt] = {}
        if len(todo):
            withdraw_complete(self.config.out)
            processor = self.processor()
            for unit in todo.tolist():
                outcome = processor.process(self.plan.unit(unit), self.load(unit))
                if outcome.receipt.error:
                    failures[unit] = outcome.receipt
        if units is not None:
            return Summary()
        summary = write_index(self.config.out, self.plan, self.ledger, failures)
        declare_complete(self.config.out)
        return summary


def make_config(shards: str | Path, out: Path | str, **options: Any) -> PrecomputeConfig:
    """A small store of a random tiny ViT's features, four images in a unit."""
    values = {"backbone": "test_vit", "pretrained": False, "size": Size(64, 64), "rows_per_shard": 4, "threads": 1}
    return PrecomputeConfig(shards=(str(shards),), out=str(out), gpus_per_actor=0.0, **(values | options))


def open_store(config: PrecomputeConfig) -> Store:
    """What the driver does before its first unit: plan, recheck, models, creation or growth."""
    lines: list[str] = []
    config = as_stored(config, lines.append)
    check_options(config)
    ledger = Ledger(storage.join(config.out, "ledger"))
    old = find_plan(config.out)
    update = plan_store(config, old)
    recheck_input(config, old, update, ledger, lines.append)
    setup = prepare(config, update.shards, load_models(config))
    plan = complete_plan(config, update.shards, setup.channels)
    layout = layout_of(config, plan.rows_per_shard, setup.channels, plan.units)
    create_or_grow(config, plan, layout, setup)
    return Store(config, plan, layout, setup, ledger, lines)
