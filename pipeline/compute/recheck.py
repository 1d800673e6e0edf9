"""Holds shards that moved or were written again against the receipts of the units that were made from them."""

from collections.abc import Callable, Mapping
from math import ceil

from pipeline.config.precompute import PrecomputeConfig
from pipeline.decode.kinds import label_spec
from pipeline.inputs.changes import compare_bytes
from pipeline.inputs.plan import Plan, UnitKey
from pipeline.inputs.plan_update import PlanUpdate
from pipeline.inputs.video import FrameLimits
from pipeline.store.ledger import Ledger, Receipt

__all__ = ["recheck_input"]


def recheck_input(
    config: PrecomputeConfig, old: Plan | None, update: PlanUpdate, ledger: Ledger, report: Callable[[str], None]
) -> None:
    """Compare the bytes of finished samples with their receipts, of shards whose URL or stamp changed since.

    A shard's headers say that names, sizes and times are as they were; whether the bytes are, only they tell. Nothing
    is added to the store before.

    Args:
        config: ``recheck_share`` of the finished units of each such shard are compared, spread over it, at least one.
        old: the plan that the store was made by.
        update: the plan held against the input as it is now.
        ledger: the store's.
        report: prints a line.

    Raises:
        InputChangedError: a sample has other bytes; the text names it.
    """
    if old is None or not update.to_recheck:
        return
    done = ledger.done()
    plan = Plan(update.shards, old.rows_per_shard, old.index_dir)
    finished: dict[int, list[UnitKey]] = {position: [] for position in update.to_recheck}
    for key in map(plan.unit, range(plan.units)):
        if key.shard in finished and key.unit in done:
            finished[key.shard].append(key)
    wanted, limits = _members(config), FrameLimits(config.max_pixels, config.decode_timeout)
    for position, keys in finished.items():
        chosen = _spread(keys, config.recheck_share)
        shard = plan.shards[position]
        hashes: dict[int, list[str]] = {}
        for key, receipt in ledger.receipts((key, shard.digest) for key in chosen):
            if receipt is not None:
                hashes |= _hashes(key, receipt)
        if hashes:
            compare_bytes(plan.index(position), hashes, wanted, limits=limits)
        report(
            f"{shard.url} is at another place or was written again: {len(hashes)} samples of {len(chosen)} of its "
            f"{len(keys)} finished units compared with their receipts, their bytes are the same"
        )


def _spread(keys: list[UnitKey], share: float) -> list[UnitKey]:
    count = ceil(share * len(keys))
    return [keys[number * len(keys) // count] for number in range(count)]


def _hashes(key: UnitKey, receipt: Receipt) -> Mapping[int, list[str]]:
    """By position in the shard, the hashes of the members that a unit's samples were made from."""
    hashes = {
        key.start + offset: [value for value in (record.sha256, *record.label_sha256.values()) if value]
        for offset, record in enumerate(receipt.samples)
    }
    return {position: values for position, values in hashes.items() if values}


def _members(config: PrecomputeConfig) -> Callable[[str], bool]:
    """Whether members of an extension are images or labels of the store."""
    extensions = set(config.image_exts)
    for kind in config.labels:
        extensions.update(label_spec(kind, config.seg_dtype).extensions)
    return extensions.__contains__
