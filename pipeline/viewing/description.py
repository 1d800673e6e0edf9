"""What a store is, in words: models, sizes, arrays, samples, versions, and what it was made from."""

from collections.abc import Iterator
from typing import Any

from pipeline.config.precompute import PrecomputeConfig
from pipeline.console import human_bytes
from pipeline.inputs import storage
from pipeline.redaction import redact
from pipeline.store.layout import ArraySpec, Layout, store_attributes
from pipeline.store.provenance import stored_config
from pipeline.store.snapshot import StoreSnapshot
from pipeline.store.status import collect_status
from pipeline.store.status_text import account_lines

__all__ = ["describe_store"]

_DIGITS = 12


def describe_store(url: str) -> Iterator[str]:
    """What a store is, a line each, also while its job runs.

    Raises:
        StoreError: there is no store.
        StoreFormatError: this program does not read it.
    """
    attributes = store_attributes(url)
    config, setup = stored_config(url, partial=True)
    status = collect_status(url)
    yield from account_lines(status)
    yield from _models(config, setup)
    layout = Layout.from_dict(attributes["layout"])
    yield from (_array_line(spec, layout, status.ok) for spec in layout.arrays)
    stored = sum(facts.bytes.get("stored", 0) for facts in StoreSnapshot(url).facts.values())
    if stored:
        whole = human_bytes(status.ok * layout.sample_bytes)
        yield f"bytes     {human_bytes(stored)} stored, {whole} before compression"
    yield f"input     {', '.join(map(redact, (*config.shards, *config.images)))}"
    yield from (f"sha256    {digest[:_DIGITS]}... of the {name}" for name, digest in setup["digests"].items())
    yield "versions  " + ", ".join(f"{name} {number}" for name, number in attributes.get("versions", {}).items())
    yield f"options   {storage.join(redact(url), 'plan', 'config.yaml')}"


def _models(config: PrecomputeConfig, setup: dict[str, Any]) -> Iterator[str]:
    weights = redact(config.weights) if config.weights else "timm's weights" if config.pretrained else "random weights"
    yield f"backbone  {config.backbone}, layer {setup['layer']}, norm {config.norm}, {weights}"
    channels = f"{setup['channels']} " + ("principal components" if config.projects else "channels")
    height, width = setup["grid"]
    yield (
        f"features  {height}x{width} to {config.target_size} by {config.upsampler}, {channels}; images at "
        f"{config.size}, {config.geometry}"
    )


def _array_line(spec: ArraySpec, layout: Layout, samples: int) -> str:
    shape = "x".join(map(str, (layout.rows, *spec.row_shape)))
    chunk = f"chunks of {'x'.join(map(str, spec.chunk))}, " if spec.row_shape else ""
    size = human_bytes(samples * spec.row_bytes)
    return f"array     {spec.name:8}  {spec.dtype:7}  {shape}, {chunk}shards of {layout.rows_per_shard} rows, {size}"
