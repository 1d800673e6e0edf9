"""How far a store is, while its job runs or after: units, samples, failures, rate, time left, who works on it.

featup status out/train
featup status s3://bucket/train --failed undecodable truncated
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

from . import CommandParser, add_failed, print_lines


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the status was printed; 1: it cannot be read, and the text says why."""
    parser = CommandParser("status", __doc__)
    parser.add_argument(
        "store", help="the store: the --out of featup precompute; a path or a URL", type=os.path.expanduser
    )
    add_failed(parser)
    parser.add_argument("--units", action="store_true", help="list all units with state, seconds and worker")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the same content")
    args = parser.parse_args(argv)
    return print_lines("status", lambda: _json_lines(args) if args.json else _text_lines(args))


def _text_lines(args: argparse.Namespace) -> Iterator[str]:
    from pipeline.store.status import collect_status, list_failed, list_units
    from pipeline.store.status_text import failed_text, status_text, unit_text

    yield status_text(collect_status(args.store))
    if args.failed is not None:
        yield from map(failed_text, list_failed(args.store, args.failed))
    if args.units:
        yield from map(unit_text, list_units(args.store))


def _json_lines(args: argparse.Namespace) -> Iterator[str]:
    from pipeline.store.status import collect_status, list_failed, list_units

    content = asdict(collect_status(args.store))
    if args.failed is not None:
        content["failed_samples"] = [asdict(sample) for sample in list_failed(args.store, args.failed)]
    if args.units:
        content["unit_list"] = [asdict(unit) for unit in list_units(args.store)]
    yield json.dumps(content)


if __name__ == "__main__":
    sys.exit(main())
