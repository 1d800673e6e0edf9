"""Receipts: a unit of work is done when its receipt exists, and not before.

The receipt is written, atomically, after all of the unit's data is durable. It is keyed by the unit (input shard,
samples, rows), never by a worker, so any later run of the same plan finds it.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypeVar

from pipeline.errors import StoreError
from pipeline.inputs import storage
from pipeline.inputs.plan import UnitKey

__all__ = ["Ledger", "Receipt", "SampleRecord"]

T = TypeVar("T")


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
    """Proof of a unit written, or (``error`` set) the account of a unit that failed.

    ``shard`` is the digest of the input shard that the unit was made from, see
    :attr:`pipeline.inputs.plan.PlannedShard.digest`.

    ``checksums`` holds for each array the crc32c of every row as stored, ``None`` where nothing was written;
    ``seconds`` and ``sizes`` (bytes) count per stage (read, decode, features, upsample, encode_write); ``worker`` names
    the host and process.
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
        """As kept in the ledger."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> "Receipt":
        """What :meth:`to_json` wrote."""
        content = json.loads(data)
        content["unit"] = UnitKey(**content["unit"])
        content["samples"] = tuple(
            SampleRecord(
                **{
                    **sample,
                    "flags": tuple(sample["flags"]),
                    "source_size": tuple(sample["source_size"]) if sample["source_size"] else None,
                }
            )
            for sample in content["samples"]
        )
        return Receipt(**content)


class Ledger:
    """The receipts of one store, one object a unit."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _place(self, unit: int) -> str:
        # A thousand to a folder: listing stays fast with millions of units.
        return storage.join(self.url, f"{unit // 1000:06d}", f"{unit:09d}.json")

    def commit(self, receipt: Receipt) -> None:
        """Mark a unit as done. Its data must be durable by now."""
        if receipt.error:
            raise StoreError(f"{receipt.unit} failed ({receipt.error}) and cannot be committed")
        storage.write_atomic(self._place(receipt.unit.unit), receipt.to_json())

    def get(self, key: UnitKey, shard: str) -> Receipt | None:
        """The receipt of a unit that is done, or ``None``.

        Raises:
            StoreError: there is a receipt, and it belongs to another input or another unit, or cannot be read.
        """
        try:
            receipt = Receipt.from_json(storage.read_bytes(self._place(key.unit)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self._place(key.unit)} is no receipt ({type(error).__name__}: {error}): the file is damaged; remove "
                "it and run the job again, which then makes this unit anew"
            ) from error
        if (receipt.unit, receipt.shard) != (key, shard):
            raise StoreError(
                f"{self._place(key.unit)} is the receipt of {receipt.unit} of input {receipt.shard[:12]}, expected "
                f"{key} of input {shard[:12]}; the ledger was mixed up with another store's: restore it, or start anew"
            )
        return receipt

    def done(self) -> set[int]:
        """Numbers of the units that are done."""
        names = (name.rsplit("/", 1)[-1] for name in storage.list_files(self.url))
        return {int(name[:-5]) for name in names if name.endswith(".json")}

    def receipts(
        self, keys: Iterable[tuple[UnitKey, str]], threads: int = 16
    ) -> Iterator[tuple[UnitKey, Receipt | None]]:
        """(key, receipt or ``None``) of units and their shards' digests, in this order, read by several threads."""

        def get(pair: tuple[UnitKey, str]) -> tuple[UnitKey, Receipt | None]:
            return pair[0], self.get(*pair)

        with ThreadPoolExecutor(threads) as pool:
            for batch in _batched(keys, 64 * threads):
                yield from pool.map(get, batch)


def _batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Items in lists of ``count``, the last one shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, count)):
        yield batch
