"""Which members of a sample are its image and its labels, their size limit, and their hashes. Needs no decoder."""

import hashlib
from collections.abc import Collection, Iterable, Mapping

from pipeline.decode.kinds import label_spec
from pipeline.decode.options import DecodeOptions
from pipeline.errors import Reason, SampleError

__all__ = ["IMAGE", "check_bytes", "hash_members", "select_members"]


IMAGE = "image"


def select_members(extensions: Collection[str], options: DecodeOptions) -> dict[str, str]:
    """The extension of the image (``IMAGE``) and of the label of each kind; a member that is missing has no entry.

    Of several accepted extensions the first one in ``options.image_exts`` or ``LabelSpec.extensions`` is used.
    """
    accepted = {IMAGE: options.image_exts}
    accepted.update((kind, label_spec(kind, options.seg_dtype).extensions) for kind in options.labels)
    present = {kind: [ext for ext in choices if ext in extensions] for kind, choices in accepted.items()}
    return {kind: choices[0] for kind, choices in present.items() if choices}


def check_bytes(sizes: Iterable[tuple[str, int]], max_bytes: int) -> None:
    """Refuse a sample with a member, given as (extension, bytes), that is larger than ``max_bytes``.

    Raises:
        SampleError: ``TOO_MANY_BYTES``.
    """
    for ext, size in sizes:
        if size > max_bytes:
            raise SampleError(
                Reason.TOO_MANY_BYTES,
                f"{ext} has {size} bytes, more than max_bytes = {max_bytes}, and is not read; raise max_bytes if such "
                "files are meant to be in the data",
            )


def hash_members(members: Mapping[str, bytes], options: DecodeOptions) -> tuple[str, dict[str, str]]:
    """sha256, in hex, of the image's bytes (empty where there is no image) and of each label's bytes by kind."""
    digests = {kind: hashlib.sha256(members[ext]).hexdigest() for kind, ext in select_members(members, options).items()}
    return digests.pop(IMAGE, ""), digests
