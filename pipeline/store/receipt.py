"""What is recorded of a unit of work and its samples."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.inputs.plan import UnitKey
from pipeline.store.fields import read_fields

__all__ = ["Receipt", "SampleRecord"]


@dataclass(frozen=True)
class SampleRecord:
    """What became of one sample. ``status`` is ``"ok"`` or ``"failed"``; a failed one has a ``reason``.

    ``sha256`` is that of the image's bytes, ``label_sha256`` those of its labels' bytes by kind.
    ``explained_variance``, of images that are fitted, is the share of held-out views' variance that the fit explains.
    """

    key: str
    row: int
    status: str
    reason: str = ""
    detail: str = ""
    source_size: tuple[int, int] | None = None
    transform: dict[str, Any] | None = None
    flags: tuple[str, ...] = ()
    orientation: int = 1
    decoder: str = ""
    sha256: str = ""
    label_sha256: dict[str, str] = field(default_factory=dict)
    explained_variance: float | None = None


@dataclass(frozen=True)
class Receipt:
    """Proof of a unit written, or (``error`` set) the record of a unit that failed.

    ``shard`` is the digest of the input shard that the unit was computed from, see
    :attr:`pipeline.inputs.plan.PlannedShard.digest`.

    ``checksums`` holds for each array the crc32c of every row as stored, ``None`` where nothing was written;
    ``seconds`` and ``sizes`` (bytes) count per stage (read, decode, features, upsample, encode_write); ``worker`` names
    the host and process, and when they ``finished`` the unit (seconds since 1970).
    """

    unit: UnitKey
    shard: str
    samples: tuple[SampleRecord, ...]
    checksums: dict[str, list[int | None]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    worker: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> bytes:
        """As stored in the ledger."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> "Receipt":
        """What :meth:`to_json` wrote, also by an older version: fields that it does not have get their defaults.

        Raises:
            StoreFormatError: fields that this version does not have, or lacks.
            ValueError, KeyError, TypeError: the data is no receipt.
        """
        content: dict[str, Any] = json.loads(data)
        content["unit"] = UnitKey(**content["unit"])
        content["samples"] = [read_fields(SampleRecord, one, "a sample's record") for one in content["samples"]]
        return read_fields(Receipt, content, "a receipt")
