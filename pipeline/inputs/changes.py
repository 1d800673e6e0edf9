"""Whether an input shard still is what the plan, or the receipts of finished units, say it was."""

from pipeline.errors import InputChangedError
from pipeline.inputs import storage
from pipeline.inputs.plan import PlannedShard

__all__ = ["check_unchanged"]


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
