"""Errors of the pipeline, and the reasons a sample can fail for.

PipelineError
├── ConfigError        (ValueError)     an option, or a combination of options, that cannot be served
├── InputError         (ValueError)     shards that cannot be found, listed or indexed
│   └── InputChangedError               an input shard is not the one the store was made from
├── SampleError        (ValueError)     one sample that cannot be used; carries a Reason
├── UnitError          (RuntimeError)   one unit of work that failed for good; carries its key
├── StoreError         (RuntimeError)   a store that is missing, incomplete, damaged or of another make
│   ├── StoreMismatchError              a store made with another config, model or plan
│   ├── StoreFormatError                a store of a format that this program does not read
│   ├── DamagedReceiptError             the receipt of one unit cannot be used; carries the unit's number
│   ├── IncompleteStoreError            a store whose job has not ended, where a whole one is needed
│   └── LeaseError                      another driver is at work on the store
├── SampleKeyError     (LookupError)    a key that names no good sample of a store, or several
├── EnvironmentFault   (RuntimeError)   disk full, access denied, bucket gone: the job stops, nothing is lost
├── ForkError          (RuntimeError)   a reader inherited through fork(), which would deadlock
└── JobFailedError     (RuntimeError)   the run ended, and what it had to do is not all done
"""

from enum import StrEnum
from typing import Literal

from pipeline.redaction import redact

__all__ = [
    "ConfigError",
    "DamagedReceiptError",
    "EnvironmentFault",
    "Fault",
    "ForkError",
    "IncompleteStoreError",
    "InputChangedError",
    "InputError",
    "JobFailedError",
    "LeaseError",
    "PipelineError",
    "Reason",
    "SampleError",
    "SampleKeyError",
    "StoreError",
    "StoreFormatError",
    "StoreMismatchError",
    "UnitError",
    "fault_of",
]


class Reason(StrEnum):
    """Why a sample is not in the store. The value is what the index holds in ``reason``."""

    IMAGE_MISSING = "image_missing"
    UNDECODABLE = "undecodable"
    TRUNCATED = "truncated"
    UNSUPPORTED = "unsupported_format"
    TOO_LARGE = "too_large"
    TOO_MANY_BYTES = "too_many_bytes"
    DECODE_TIMEOUT = "decode_timeout"
    LABEL_MISSING = "label_missing"
    LABEL_SIZE = "label_size"
    LABEL_UNDECODABLE = "label_undecodable"
    LABEL_RANGE = "label_range"
    REPEATED_KEY = "repeated_key"
    TAR_TRUNCATED = "tar_truncated"
    TAR_DAMAGED = "tar_damaged"
    NOT_FINITE = "features_not_finite"
    UNIT_FAILED = "unit_failed"


class PipelineError(Exception):
    """Base of every error raised by ``pipeline``. Credentials in its text are left out, wherever it is raised."""

    def __init__(self, text: str = "") -> None:
        super().__init__(redact(text))


class ConfigError(PipelineError, ValueError):
    """An option, or a combination of options, that cannot be served."""


class InputError(PipelineError, ValueError):
    """Shards that cannot be found, listed or indexed."""


class InputChangedError(InputError):
    """An input shard whose content is not what the store was made from; the text names it."""


class SampleError(PipelineError, ValueError):
    """One sample that cannot be used. The job goes on; the index lists it with its reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = redact(detail)

    def __reduce__(self) -> tuple[type["SampleError"], tuple[Reason, str]]:
        return (SampleError, (self.reason, self.detail))


class UnitError(PipelineError, RuntimeError):
    """One unit of work that failed for good; the text begins with the unit's key."""


class StoreError(PipelineError, RuntimeError):
    """A store that is missing, incomplete or damaged."""


class StoreMismatchError(StoreError):
    """A store made with another config, model or plan; the text lists the differences."""


class StoreFormatError(StoreError):
    """A store of a format that this program does not read: too old, or made by a newer program."""


class DamagedReceiptError(StoreError):
    """The receipt of one unit is damaged: that unit must be computed anew, the others stand."""

    def __init__(self, unit: int, text: str) -> None:
        super().__init__(text)
        self.unit = unit

    def __reduce__(self) -> tuple[type["DamagedReceiptError"], tuple[int, str]]:
        return (DamagedReceiptError, (self.unit, str(self)))


class IncompleteStoreError(StoreError):
    """A store whose job has not ended, where a whole one is needed."""


class LeaseError(StoreError):
    """Another driver is at work on the store, or took it over; the text names it."""


class SampleKeyError(PipelineError, LookupError):
    """A key that names no good sample of a store, or several; the text says which."""


class EnvironmentFault(PipelineError, RuntimeError):  # noqa: N818 - a fault of the world around, not of the program
    """Disk full, access denied, bucket gone: no unit can be written until somebody mends it. The job stops soon."""


class ForkError(PipelineError, RuntimeError):
    """A reader inherited through ``fork()``, which would deadlock on its first read."""


class JobFailedError(PipelineError, RuntimeError):
    """The run ended and not everything it had to do is done; the text says what is left and why."""


Fault = Literal["", "unit", "input", "environment"]
"""What failed: nothing, a unit alone, the input (it changed), or the surroundings, where no unit can succeed."""


def fault_of(error: Exception) -> Fault:
    """What an error that ended a unit puts at fault."""
    if isinstance(error, InputChangedError):
        return "input"
    return "environment" if isinstance(error, EnvironmentFault) else "unit"
