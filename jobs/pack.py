"""Write a folder, a list, a table or a video of images, with labels from parallel folders, as WebDataset shards.

featup pack photos/ shards/photos-%06d.tar
featup pack photos/ more.csv shards/train-%06d.tar --label-dir seg=masks/ depth=depth/
"""

import argparse
import os
import sys

from . import CommandParser, at_least, exit_status


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: every sample is in the shards; 1: one is not, and the text says why."""
    parser = CommandParser("pack", __doc__)
    parser.add_argument(
        "images", nargs="+", type=os.path.expanduser, help="folders, lists (.txt, .csv, .tsv, .parquet), image files, "
        "videos, parquet files of images, or saved Hugging Face data sets"
    )  # fmt: skip
    parser.add_argument(
        "shards", type=os.path.expanduser, help="names of the shards, with their number: out/train-%%06d.tar"
    )
    parser.add_argument(
        "--label-dir", nargs="+", default=[], metavar="KIND=FOLDER", help="labels of kind seg, depth or cls, by the "
        "image's relative name with another extension",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=at_least(1), default=1, metavar="N", help="of a video the first frame, and then every N-th"
    )
    parser.add_argument(
        "--image-column", metavar="NAME", help="the column of images in lists, parquet files and data sets; by default "
        "image, or the only one",
    )  # fmt: skip
    parser.add_argument(
        "--shard-mb", type=at_least(1), default=1024, metavar="N", help="MiB of files in one shard, at most (1024)"
    )
    args = parser.parse_args(argv)
    return exit_status("pack", lambda: _run(args))


def _run(args: argparse.Namespace) -> bool:
    from pipeline.decode.kinds import IMAGE_EXTS, LABEL_EXTENSIONS
    from pipeline.errors import ConfigError, JobFailedError
    from pipeline.inputs.images import list_images
    from pipeline.inputs.pack import pack
    from pipeline.inputs.tar import describe_ignored

    label_dirs = args.label_dir
    folders = dict(text.partition("=")[::2] for text in label_dirs)
    if len(folders) != len(label_dirs):
        raise ConfigError(
            f"--label-dir {' '.join(label_dirs)}: one kind is given two folders; put its labels below one"
        )
    if wrong := [kind for kind, folder in folders.items() if kind not in LABEL_EXTENSIONS or not folder]:
        raise ConfigError(f"--label-dir {wrong[0]!r} must be KIND=FOLDER, with a KIND of {', '.join(LABEL_EXTENSIONS)}")
    listed = list_images(
        args.images, IMAGE_EXTS, LABEL_EXTENSIONS, folders, every=args.every, image_column=args.image_column
    )
    tars, failed = pack(listed, args.shards, args.shard_mb << 20)
    ignored = f"; ignored: {describe_ignored(tuple(listed.ignored.items()))}" if listed.ignored else ""
    count = len(listed.samples)
    print(f"{count - failed} samples in {len(tars)} shards{ignored}")
    if failed:
        raise JobFailedError(
            f"{failed} of {count} samples could not be read and are left out; the reasons stand above. Use the shards "
            "without them, or mend or leave out these files, remove the shards, and run the same command again"
            if tars
            else f"not one of {count} samples could be read, so no shard is written; the reasons stand above. Look at "
            "the files, and run the same command again"
        )
    return True


if __name__ == "__main__":
    sys.exit(main())
