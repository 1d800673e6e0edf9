"""The main job: shards of images in, a verified feature store out.

featup precompute --shards 'train-{0000..0005}.tar' --out out/train --backbone mobilenetv1_100 ...
featup precompute --config configs/dinov2_s14.yaml --shards ... --out ... --dry-run
"""

import os
import sys
from typing import TYPE_CHECKING

from . import exit_status, program

if TYPE_CHECKING:
    from pipeline.inputs.plan import IndexAll


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: everything is in the store or accounted for; 1: it is not, and the text says why."""
    return exit_status("precompute", lambda: _run(argv))


def index_on_cluster(object_store_mb: int) -> "IndexAll | None":
    """Indexes shards on the cluster that ``RAY_ADDRESS`` names; ``None`` on a machine alone."""
    if not os.environ.get("RAY_ADDRESS"):
        return None
    from pipeline.cluster.connect import connect
    from pipeline.cluster.planning import index_on_ray

    connect(object_store_mb)
    return index_on_ray


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places
    from pipeline.config.precompute import PrecomputeConfig

    config, options = parse_args(
        PrecomputeConfig,
        argv,
        description=__doc__ or "",
        prog=program("precompute"),
        extra=lambda parser: parser.add_argument(
            "--dry_run",
            "--dry-run",
            action="store_true",
            help="say what would be done, and what it takes; do nothing",
        ),
    )
    check_places(config)
    if options.dry_run:
        from pipeline.compute.estimate import estimate

        print(estimate(config, index_on_cluster(config.object_store_mb)))
    else:
        from pipeline.cluster.precompute import precompute

        precompute(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
