"""How far a store is: what its receipts, index, plan and lease say, while a job runs or after it. Only reads.

Counts of compacted units come from the index, or from the statuses in their segments where the index does not cover
them yet. Single receipts are read of open units, and of the last segment for its times.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.inputs.plan import Plan
from pipeline.redaction import redact
from pipeline.store.lease import LeaseInfo
from pipeline.store.receipt import Receipt
from pipeline.store.snapshot import FailedSample, StoreSnapshot, UnitStatus

__all__ = ["FailedSample", "StoreStatus", "UnitStatus", "collect_status", "list_failed", "list_units"]

_SLOWEST = 5
# The rate is that of the last ten minutes' units, and of eight at least.
_RATE_SECONDS = 600.0
_RATE_UNITS = 8
# Open receipts that are read for their times where the index has their counts.
_TIMED_UNITS = 1000
# Segments whose receipts are read for the reasons of failures where the index does not cover them yet.
_REASON_SEGMENTS = 50


@dataclass(frozen=True)
class StoreStatus:
    """How far a store is.

    ``state`` is ``complete``, ``running`` (a driver holds the lease and renews it), ``stopped`` or ``not started``.
    ``units == units_done + units_failed + units_left`` and ``samples == ok + failed + samples_left``; they are ``None``
    where there is no plan yet. The samples of units that failed for good count as failed; the next run tries them.
    Of ``units_left``, ``units_begun`` are worked on, or were when their process died. ``unread_reasons`` are failed
    samples whose reason was not looked up. ``damaged`` are the errors of receipts and segments that cannot be read;
    their samples count as left.

    ``rate`` is samples per second over the last ``rate_units`` units, ``finished`` when the last of them was done
    (seconds since 1970), ``seconds_left`` the time a running job takes at that rate. ``slowest`` are the slowest of the
    ``timed_units`` units whose times were read.
    """

    url: str
    state: str
    units: int | None = None
    samples: int | None = None
    units_done: int = 0
    units_failed: int = 0
    units_left: int | None = None
    units_begun: int = 0
    ok: int = 0
    failed: int = 0
    samples_left: int | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    unread_reasons: int = 0
    damaged: tuple[str, ...] = ()
    input_faults: tuple[str, ...] = ()
    rate: float | None = None
    rate_units: int = 0
    finished: float | None = None
    seconds_left: float | None = None
    slowest: tuple[UnitStatus, ...] = ()
    timed_units: int = 0
    holder: LeaseInfo | None = None
    holder_lives: bool = False
    heartbeat_age: float | None = None


def collect_status(url: str, clock: Callable[[], float] = time.time) -> StoreStatus:
    """How far the store at a path or URL is; of a place without a store, that nothing was started there.

    Args:
        url: the store.
        clock: seconds since 1970.

    Raises:
        StoreError: there is something else, or a store of a format that this program does not read.
    """
    snapshot = StoreSnapshot(url)
    status = _bare_status(snapshot, clock())
    if snapshot.plan is None:
        return status
    uncovered = snapshot.uncovered_open
    covered = snapshot.done.open[~np.isin(snapshot.done.open, uncovered)].tolist()[-_TIMED_UNITS:]
    units: list[UnitStatus] = []
    damaged: list[str] = []
    for _, receipt in snapshot.open_receipts([*uncovered, *covered]):
        if isinstance(receipt, Receipt):
            units.append(UnitStatus.of(receipt))
        elif receipt is not None:
            damaged.append(str(receipt))
    status = replace(status, damaged=tuple(damaged))
    uncovered_units = set(uncovered)
    counted = _with_counts(status, snapshot, snapshot.plan, [unit for unit in units if unit.unit in uncovered_units])
    return _with_times(counted, snapshot, units)


def list_failed(url: str, reasons: Collection[str] = ()) -> Iterator[FailedSample]:
    """The samples that failed so far, in the order of rows; only those of some ``reasons`` where any are given."""
    return (sample for sample in StoreSnapshot(url).failed_samples() if not reasons or sample.reason in reasons)


def list_units(url: str) -> Iterator[UnitStatus]:
    """All units of the plan, in order. Reads every receipt.

    Raises:
        StoreError: there is no plan.
    """
    return StoreSnapshot(url).units()


def _bare_status(snapshot: StoreSnapshot, now: float) -> StoreStatus:
    """What is known without a plan."""
    lease = snapshot.lease
    lives = lease is not None and lease.lives(now)
    if snapshot.complete:
        state = "complete"
    elif lives:
        state = "running"
    else:
        nothing = snapshot.attributes is None and snapshot.plan is None and not snapshot.done
        state = "not started" if nothing else "stopped"
    return StoreStatus(
        url=redact(snapshot.url),
        state=state,
        units_done=len(snapshot.done),
        holder=lease,
        holder_lives=lives,
        heartbeat_age=None if lease is None else lease.age(now),
    )


def _with_counts(
    status: StoreStatus, snapshot: StoreSnapshot, plan: Plan, open_units: Sequence[UnitStatus]
) -> StoreStatus:
    """Units and samples by what became of them; ``open_units`` are those that neither index nor segments cover."""
    ok = failed = 0
    reasons: Counter[str] = Counter()
    for facts in snapshot.facts.values():
        ok, failed = ok + facts.ok, failed + facts.failed
        reasons.update(facts.reasons)
    with_failures, damaged = {}, list(status.damaged)
    for number, counts in snapshot.segment_counts().items():
        ok, failed = ok + counts.ok, failed + counts.failed
        if counts.failed:
            with_failures[number] = counts.units_with_failures
        if counts.error:
            damaged.append(counts.error)
    for number in list(with_failures)[:_REASON_SEGMENTS]:
        for _, receipt in snapshot.segment_receipts(number, with_failures[number]):
            if isinstance(receipt, Receipt):
                reasons.update(UnitStatus.of(receipt).reasons)
    for unit in open_units:
        ok, failed = ok + unit.samples - unit.failed, failed + unit.failed
        reasons.update(unit.reasons)
    for sample in snapshot.uncovered_lost_samples():
        failed += 1
        reasons[sample.reason] += 1
    units_done = int(snapshot.done.mask(plan.units).sum())
    units_failed = sum(map(len, snapshot.failed_units.values()))
    return replace(
        status,
        units=plan.units,
        samples=plan.samples,
        units_done=units_done,
        units_failed=units_failed,
        units_left=plan.units - units_done - units_failed,
        units_begun=len(snapshot.begun),
        ok=ok,
        failed=failed,
        samples_left=plan.samples - ok - failed,
        reasons=dict(reasons.most_common()),
        unread_reasons=failed - reasons.total(),
        damaged=tuple(damaged),
        input_faults=tuple(map(redact, plan.faults)),
    )


def _with_times(status: StoreStatus, snapshot: StoreSnapshot, units: list[UnitStatus]) -> StoreStatus:
    """The rate and the slowest units, of ``units`` and where those are few of the last segment's."""
    if len(units) < _RATE_UNITS and len(snapshot.done.segments):
        receipts = snapshot.segment_receipts(int(snapshot.done.segments[-1]))
        units = [*units, *(UnitStatus.of(receipt) for _, receipt in receipts if isinstance(receipt, Receipt))]
    since = snapshot.lease.started_epoch if snapshot.lease is not None and status.holder_lives else 0.0
    rate, rate_units = _rate(units, since)
    return replace(
        status,
        rate=rate,
        rate_units=rate_units,
        finished=max((unit.finished for unit in units if unit.finished is not None), default=None),
        seconds_left=(status.samples_left or 0) / rate if rate and status.state == "running" else None,
        slowest=tuple(sorted(units, key=lambda unit: -unit.total_seconds)[:_SLOWEST]),
        timed_units=len(units),
    )


def _rate(units: Sequence[UnitStatus], since: float) -> tuple[float | None, int]:
    """(samples per second, over how many units) of those that were done last, by a run that began at ``since``.

    The first of them begins the time, so its samples do not count.
    """
    ends = sorted(
        (unit.finished, unit.samples) for unit in units if unit.finished is not None and unit.finished >= since
    )
    if not ends:
        return None, 0
    last = ends[-1][0]
    recent = [
        end for place, end in enumerate(ends) if end[0] > last - _RATE_SECONDS or place >= len(ends) - _RATE_UNITS
    ]
    span = last - recent[0][0]
    return (sum(samples for _, samples in recent[1:]) / span, len(recent)) if span > 0 else (None, 0)
