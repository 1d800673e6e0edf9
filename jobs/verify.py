"""Re-read a whole store and hold it against its receipts, its plan and its input.

python -m jobs.verify out/train
"""

import argparse
import sys

from jobs import exit_status


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the store is whole; 1: something is wrong, and each finding was printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the store: what was --out")
    parser.add_argument(
        "--check-source", type=int, default=8, help="of so many units, decode the labels again and compare (0: none)"
    )
    parser.add_argument("--object-store-mb", type=int, default=256, help="of the Ray this job starts for itself")
    args = parser.parse_args(argv)
    from pipeline.cluster.verify import verify

    def work() -> bool:
        report = verify(args.out, args.object_store_mb, args.check_source)
        print(report.text(), flush=True)
        return report.clean

    return exit_status("verify", work)


if __name__ == "__main__":
    sys.exit(main())
