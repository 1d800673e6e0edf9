"""What became of a unit, for the driver: its receipt, and what was at fault where it failed."""

import os
import platform
from dataclasses import dataclass, replace

from pipeline.errors import Fault, Reason
from pipeline.inputs.plan import UnitKey
from pipeline.redaction import redact
from pipeline.store.ledger import Receipt, SampleRecord

__all__ = ["Outcome", "failed_unit"]


@dataclass(frozen=True)
class Outcome:
    """What became of a unit. A receipt with ``error`` is not in the ledger."""

    receipt: Receipt
    fault: Fault = ""


def failed_unit(key: UnitKey, shard: str, records: tuple[SampleRecord, ...], error: Exception) -> Receipt:
    """The receipt of a unit that failed with ``error``, which its text begins with the class of; its samples failed."""
    text = redact(f"{type(error).__name__}: {error}")
    failed = tuple(
        replace(record, status="failed", reason=Reason.UNIT_FAILED.value, detail=text)
        if record.status == "ok"
        else record
        for record in records
    )
    return Receipt(
        unit=key, shard=shard, samples=failed, worker={"host": platform.node(), "pid": os.getpid()}, error=text
    )
