"""Whether an input shard still is what the plan, or the receipts of finished units, say it was."""

import hashlib
from collections.abc import Callable, Collection, Mapping

from pipeline.errors import InputChangedError, SampleError
from pipeline.inputs import storage
from pipeline.inputs.plan import PlannedShard
from pipeline.inputs.read import iter_samples
from pipeline.inputs.storage import RangeReader
from pipeline.inputs.tar import ShardIndex
from pipeline.inputs.video import USUAL_LIMITS, FrameLimits

__all__ = ["check_unchanged", "compare_bytes"]


def check_unchanged(shard: PlannedShard) -> None:
    """Look the shard up (one request) and hold size and stamp against the plan.

    Called before and after a unit is read, it finds a shard that is rewritten while a job runs. A store that has no
    stamps shows a change of size only.

    Raises:
        InputChangedError: the shard is gone, or its size or stamp is another.
        EnvironmentFault: access denied.
        OSError: it cannot be looked up, after retries.
    """
    try:
        state = storage.stat(shard.url)
    except FileNotFoundError as error:
        raise InputChangedError(
            f"{shard.url} is gone since the plan was made; put it back and run the same command again"
        ) from error
    if state.size != shard.size:
        difference = f"{state.size} bytes now, {shard.size} when the plan was made"
    elif state.stamp != shard.stamp:
        difference = f"written again: stamp {state.stamp} now, {shard.stamp} when the plan was made"
    else:
        return
    raise InputChangedError(
        f"{shard.url} changed while the job ran ({difference}); units of it would mix two versions. Put the old one "
        "back, or let its writer finish, and run the same command again: it compares the bytes of finished units first"
    )


def compare_bytes(
    index: ShardIndex,
    hashes: Mapping[int, Collection[str]],
    wanted: Callable[[str], bool] | None = None,
    *,
    read: RangeReader = storage.read_range,
    limits: FrameLimits = USUAL_LIMITS,
) -> None:
    """Hold the bytes of samples against the hashes in the receipts of finished units.

    Names, sizes and header times of a rewritten tar may be as they were: only the bytes tell.

    Args:
        index: of the shard as it is now.
        hashes: by position in the shard, the sha256 (hex) of each member that the store was made from: image and
            labels. Samples without hashes (failed ones) are not read.
        wanted: whether members of an extension are read; all are where it is None. It must cover the hashed ones.
        read: reads byte ranges.
        limits: of reading a frame of a video.

    Raises:
        InputChangedError: a sample has other bytes, or cannot be read any more; the text names it.
        OSError: the shard cannot be read, after retries.
    """
    positions = sorted(position for position, expected in hashes.items() if expected)
    for start, stop in _runs(positions):
        if stop > len(index.samples):
            raise InputChangedError(
                f"{index.url} holds {len(index.samples)} samples, and the store was made from {stop} of it; put the "
                "old one back, or start a new store with another --out"
            )
        for position, sample in enumerate(iter_samples(index, start, stop, wanted, read=read, limits=limits), start):
            if isinstance(sample, SampleError):
                difference = f"cannot be read any more ({sample}), as it could be when the store was made from it"
            elif missing := set(hashes[position]) - {hashlib.sha256(data).hexdigest() for data in sample.values()}:
                difference = (
                    "has other bytes than when the store was made from it "
                    f"(no member hashes to {min(missing)[:12]}... any more)"
                )
            else:
                continue
            raise InputChangedError(
                f"{index.url}: sample {index.samples[position].key} {difference}; put "
                "the old file back, or start a new store with another --out"
            )


def _runs(positions: list[int], longest: int = 64) -> list[tuple[int, int]]:
    """Ranges of neighbours, so that their bytes come by few requests and fit in memory."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position and position - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
