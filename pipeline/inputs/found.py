"""What listing finds: one sample, before it has its key."""

from dataclasses import dataclass

from pipeline.errors import Reason
from pipeline.inputs.tar import Member

__all__ = ["FoundSample"]


@dataclass(frozen=True, slots=True)
class FoundSample:
    """A sample that was found.

    Attributes:
        keys: what it may be called, the preferred first; the first is also the name that its labels have in parallel
            folders.
        image: its image.
        labels: those that are known with it.
        problem: why it cannot be used; None where it can.
    """

    keys: tuple[str, ...]
    image: Member
    labels: tuple[Member, ...] = ()
    problem: tuple[Reason, str] | None = None
