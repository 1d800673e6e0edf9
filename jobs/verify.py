"""Re-read a whole store and hold it against its receipts, its plan and its input.

featup verify out/train
"""

import os
import sys

from . import CommandParser, at_least, exit_status


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the store is whole; 1: something is wrong, and each finding was printed."""
    return exit_status("verify", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    parser = CommandParser("verify", __doc__)
    parser.add_argument("out", help="the store: the --out of featup precompute", type=os.path.expanduser)
    parser.add_argument(
        "--check-source",
        type=at_least(0),
        default=8,
        metavar="UNITS",
        help="units of which labels are decoded again and compared, 0 for none (default: 8)",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="set damaged units back, so that the next run of the job computes them anew",
    )
    parser.add_argument(
        "--remove-partial",
        action="store_true",
        help="remove the files that writers began and did not finish, because they were killed",
    )
    parser.add_argument(
        "--object-store-mb",
        type=at_least(75),
        default=256,
        metavar="N",
        help="MiB of Ray's object store, where the job starts its own Ray; at least 75 (default: 256)",
    )
    args = parser.parse_args(argv)
    from pipeline.cluster.verify import verify

    report = verify(args.out, args.object_store_mb, args.check_source, args.repair, args.remove_partial)
    print(report.text(), flush=True)
    return report.clean


if __name__ == "__main__":
    sys.exit(main())
