"""The main job: shards of images in, a verified feature store out.

python -m jobs.precompute --shards 'train-{0000..0005}.tar' --out out/train --backbone mobilenetv1_100 ...
python -m jobs.precompute --config configs/dinov2_s14.yaml --shards ... --out ... --dry-run
"""

import sys

from jobs import exit_status
from pipeline.config.parser import parse_args
from pipeline.config.precompute import PrecomputeConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: everything is in the store or accounted for; 1: it is not, and the text says why."""
    config, options = parse_args(
        PrecomputeConfig,
        argv,
        description=__doc__,
        extra=lambda parser: parser.add_argument(
            "--dry_run",
            "--dry-run",
            action="store_true",
            help="say what would be done, and what it takes; do nothing",
        ),
    )

    def work() -> bool:
        if options.dry_run:
            from pipeline.compute.estimate import estimate

            print(estimate(config))
        else:
            from pipeline.cluster.precompute import precompute

            precompute(config)
        return True

    return exit_status("precompute", work)


if __name__ == "__main__":
    sys.exit(main())
