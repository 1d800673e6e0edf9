"""Which shards a method's checkpoint was trained on, and whether it is evaluated on the same."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from braceexpand import braceexpand

from featup.checkpoints import read_provenance
from featup.weights import file_digest
from pipeline.config.evaluate import EvaluateConfig
from pipeline.evaluation.methods import Method
from pipeline.inputs import storage

__all__ = ["training_notes"]


def training_notes(
    config: EvaluateConfig, methods: Sequence[Method], data: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """A line for each method with a checkpoint: its training shards, and the evaluated ones that are among them.

    Shards are the same by the digest of the whole input, or by the name of the file: shards that were renamed and of
    which others were left out are not recognised.

    Args:
        config: Names the checkpoints.
        methods: That are compared.
        data: Facts of the image sets, by name.
    """
    files = (row.split("=")[-1] for row in config.rows if "=" in row and row.endswith(".safetensors"))
    by_digest = {file_digest(path): read_provenance(path) for path in map(storage.local_copy, files)}
    for method in methods:
        for digest in method.digests.values():
            provenance = by_digest.get(digest, {})
            trained = provenance.get("config", {})
            patterns = trained.get("shards") or trained.get("images") or []
            if not patterns:
                yield f"{method.name}: its checkpoint does not record what it was trained on."
                continue
            seen = [
                name
                for name, facts in data.items()
                if not name.endswith(" train") and _same(provenance, patterns, facts)
            ]
            line = f"{method.name}: its checkpoint was trained on {', '.join(patterns)}"
            yield f"{line}, **which are also the images of {', '.join(seen)}**." if seen else f"{line}."


def _same(provenance: Mapping[str, Any], patterns: Sequence[str], facts: Mapping[str, Any]) -> bool:
    """Whether an image set has shards that a checkpoint was trained on."""
    if facts.get("digest") is not None and facts["digest"] == provenance.get("identity", {}).get("input digest"):
        return True
    return any(
        fnmatch(_file(shard), _file(pattern)) and fnmatch(_folder(shard), f"*{_folder(pattern)}")
        for shard in facts.get("shards", ())
        for each in patterns
        for pattern in braceexpand(each)
    )


def _file(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _folder(place: str) -> str:
    """The last folder, which moves along with its shards."""
    return _file(place.rstrip("/").rpartition("/")[0])
