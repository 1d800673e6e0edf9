"""Look at a store: what it is, a sheet of its samples, one sample, or what resembles a pixel.

featup show out/train
featup show out/train --key img_0007
featup show out/train --key img_0007 --pixel 100,120
featup show out/train --failed
featup show out/clips --video clip.mp4 --key clip
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator

from . import CommandParser, add_failed, at_least, print_lines


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: all was printed and written; 1: the store cannot be read, and the text says why."""
    parser = CommandParser("show", __doc__)
    parser.add_argument(
        "store", help="the store: the --out of featup precompute; a path or a URL", type=os.path.expanduser
    )
    parser.add_argument(
        "--out", metavar="FILE.png", type=os.path.expanduser, help="the picture; by default in the working folder"
    )
    parser.add_argument(
        "--key", help="show this sample, large; with --video, those whose keys begin so: KEY/000000 ..."
    )
    parser.add_argument("--shard", help="of the sample: its input shard, or the end of it, where several have the key")
    parser.add_argument(
        "--pixel", metavar="Y,X", type=_pixel, help="of the sample: show what resembles this pixel of the features"
    )
    parser.add_argument(
        "--count",
        metavar="N",
        type=at_least(1),
        help="samples of the sheet (12 by default); with --pixel, other images that are compared (100 by default)",
    )
    parser.add_argument(
        "--video",
        metavar="FILE.mp4",
        type=os.path.expanduser,
        help="write all samples, in the order of their keys, as a video: the image beside its features in colours",
    )
    parser.add_argument("--fps", metavar="N", type=_rate, help="frames a second of the video (25 by default)")
    add_failed(parser)
    args = parser.parse_args(argv)
    if args.video is None and args.fps is not None:
        parser.error("--fps is that of a video: give --video FILE.mp4 as well")
    if args.video is not None and (args.out or args.pixel or args.shard or args.count or args.failed is not None):
        parser.error("--video goes with --key and --fps alone")
    if args.key is None and (args.pixel or args.shard):
        parser.error("--pixel and --shard are those of a sample: give its --key as well")
    return print_lines("show", lambda: _lines(args))


def _lines(args: argparse.Namespace) -> Iterator[str]:
    if args.failed is not None:
        from pipeline.store.status import list_failed
        from pipeline.store.status_text import failed_text

        yield from map(failed_text, list_failed(args.store, args.failed))
        return
    from pipeline import viewing

    if args.video is not None:
        place = viewing.picture_place(args.store, args.video, option="--video", ending=".mp4")
        count, frames = viewing.feature_video(args.store, args.key)
        viewing.save_video(frames, place, args.fps or 25.0)
        yield f"video     {place}, {count} frames"
        return
    words = ("sheet",) if args.key is None else (args.key, *(args.pixel or ()))
    place = viewing.picture_place(args.store, args.out, *words)
    if args.key is None:
        yield from viewing.describe_store(args.store)
        picture = viewing.contact_sheet(args.store, args.count or 12)
    elif args.pixel is None:
        yield from viewing.describe_sample(args.store, args.key, args.shard)
        picture = viewing.sample_picture(args.store, args.key, args.shard)
    else:
        picture, nearest = viewing.similarity_picture(args.store, args.key, args.pixel, args.count or 100, args.shard)
        yield from (f"nearest   {one.similarity:.3f}  {one.key} at {one.pixel[0]},{one.pixel[1]}" for one in nearest)
    viewing.save_picture(picture, place)
    yield f"picture   {place}"


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.1 <= rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0.1 and 1000")
    return rate


def _pixel(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be two whole numbers, Y,X")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
