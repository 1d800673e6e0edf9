"""The status of a store as people read it."""

import time
from collections.abc import Iterator

from pipeline.console import human_seconds
from pipeline.store.lease import LeaseInfo
from pipeline.store.snapshot import FailedSample, UnitStatus
from pipeline.store.status import StoreStatus

__all__ = ["account_lines", "failed_text", "status_text", "unit_text"]

_MOST_DAMAGED = 5


def status_text(status: StoreStatus, now: float | None = None) -> str:
    """The status in a few lines; ``now`` is in seconds since 1970."""
    return "\n".join(_lines(status, time.time() if now is None else now))


def account_lines(status: StoreStatus) -> Iterator[str]:
    """State, units, samples and reasons, a line each."""
    yield f"{status.url}: {status.state}"
    if status.units is not None:
        parts = [f"{status.units_done:,} of {status.units:,} done"]
        if status.units_failed:
            parts.append(f"{status.units_failed:,} failed for good (the same command tries them again)")
        left = f"{status.units_left:,} left"
        parts.append(f"{left}, {status.units_begun:,} of them begun" if status.units_begun else left)
        yield "units     " + ", ".join(parts)
        yield (
            f"samples   {status.samples:,} = {status.ok:,} ok + {status.failed:,} failed + {status.samples_left:,} left"
        )
    elif status.units_done:
        yield f"units     {status.units_done:,} done; how many there are is not known: plan/plan.json is missing"
    for reason, count in status.reasons.items():
        yield f"failed    {count:,}  {reason}"
    if status.unread_reasons:
        yield f"failed    {status.unread_reasons:,}  for reasons that the index does not list yet: see --failed"
    for fault in status.input_faults:
        yield f"input     {fault}"
    for error in status.damaged[:_MOST_DAMAGED]:
        yield f"damaged   {error}"
    if len(status.damaged) > _MOST_DAMAGED:
        yield f"damaged   {len(status.damaged) - _MOST_DAMAGED:,} more"


def _lines(status: StoreStatus, now: float) -> Iterator[str]:
    yield from account_lines(status)
    if status.rate is not None:
        rate = f"{status.rate:.1f} samples/s over the last {status.rate_units:,} units"
        left = "" if status.seconds_left is None else f", about {human_seconds(status.seconds_left)} left"
        yield f"rate      {rate}{left}"
    if status.finished is not None and status.state == "running":
        yield f"last      unit done {human_seconds(max(0.0, now - status.finished))} ago"
    for unit in status.slowest:
        yield f"slow      {unit_text(unit)}"
    if status.timed_units > len(status.slowest):
        yield f"          (the slowest of {status.timed_units:,} units)"
    yield f"lease     {_holder_text(status.holder, status.holder_lives, now)}"


def _holder_text(holder: LeaseInfo | None, lives: bool, now: float) -> str:
    if holder is None:
        return "held by nobody"
    if lives:
        return f"{holder.text(now)}: {holder.command}"
    return f"left behind by {holder.text(now)}: the next run takes it over"


def unit_text(unit: UnitStatus) -> str:
    """One unit in one line."""
    text = f"unit {unit.unit}: {unit.state}, {unit.samples} samples"
    if unit.failed:
        text += f", {unit.failed} failed"
    if unit.seconds:
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in unit.seconds.items())
        text += f", {unit.total_seconds:.1f} s ({stages})"
    if unit.worker:
        text += f", pid {unit.worker.get('pid')} on {unit.worker.get('host')}"
    return text


def failed_text(sample: FailedSample) -> str:
    """One failed sample in one line: key, shard, reason, detail, separated by tabs."""
    return "\t".join([sample.key, sample.shard, sample.reason, " ".join(sample.detail.split())])
