"""Published checkpoints of upsamplers: downloaded by name, held against a pinned digest, and cached."""

from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch

from featup.errors import WeightsError
from featup.weights import file_digest

__all__ = ["PUBLISHED", "PublishedFile", "checkpoint_file", "fetch"]


@dataclass(frozen=True)
class PublishedFile:
    """A file at a URL.

    Attributes:
        url: Where it is; its last part names it in the cache.
        sha256: Of its bytes, in lower-case hexadecimal.
    """

    url: str
    sha256: str


PUBLISHED = {
    # By Thomas Wimmer and others, CC-BY-4.0; trained on features of five backbones.
    "anyup": PublishedFile(
        "https://github.com/wimmerth/anyup/releases/download/checkpoint_v2/anyup_multi_backbone.pth",
        "b6cc407da8986c7e5c9098e61f7531767a9aca8fff20a1bc6c99d488e61aac59",
    )
}
"""The checkpoint of each upsampler that is published for all backbones."""


def checkpoint_file(upsampler: str, checkpoint: str | Path | None) -> Path | None:
    """The checkpoint that an upsampler is created from: the one given, else the published one.

    Returns:
        A local file; ``None`` where none is given and none is published.

    Raises:
        WeightsError: a published file that cannot be had; see :func:`fetch`.
    """
    if checkpoint is not None:
        return Path(checkpoint)
    return fetch(PUBLISHED[upsampler]) if upsampler in PUBLISHED else None


def fetch(file: PublishedFile, folder: str | Path | None = None) -> Path:
    """A published file, downloaded where the folder does not have it.

    Args:
        file: Which.
        folder: By default torch hub's cache of checkpoints, ``~/.cache/torch/hub/checkpoints`` without ``TORCH_HOME``.

    Raises:
        WeightsError: it cannot be downloaded, or its bytes are not those of the digest, cached or downloaded.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints") if folder is None else Path(folder)
    path = folder / file.url.rpartition("/")[2]
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
        except (URLError, OSError) as error:
            raise WeightsError(
                f"{file.url} cannot be downloaded to {path} ({error}). Likely cause: no network. Get this file "
                f"elsewhere (sha256 {file.sha256}) and put it there, or give it by --checkpoint FILE"
            ) from error
        except RuntimeError as error:
            raise WeightsError(
                f"{file.url} does not have the sha256 {file.sha256} ({error}). Likely cause: a proxy's page, or a "
                "download that was cut off; get the file elsewhere and give it by --checkpoint FILE"
            ) from error
    if (digest := file_digest(path)) != file.sha256:
        raise WeightsError(
            f"{path} has sha256 {digest}, and {file.url} has {file.sha256}. Likely cause: the cached file is damaged "
            "or is another of the same name; remove it, or give a file by --checkpoint FILE"
        )
    return path
