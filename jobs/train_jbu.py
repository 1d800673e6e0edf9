"""Train a learned upsampler for a backbone: shards of images in, checkpoints for jobs.precompute out.

python -m jobs.train_jbu --shards 'train-{0000..0005}.tar' --out out/jbu --backbone vit_small_patch14_dinov2.lvd142m
python -m jobs.train_jbu --config configs/train_jbu.yaml --shards ... --out ... --workers 4 --batch-size 8
"""

import sys

from jobs import exit_status
from pipeline.config.parser import parse_args
from pipeline.config.train import TrainConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: trained to the last step; 1: not, and the text says why."""
    config, _ = parse_args(TrainConfig, argv, description=__doc__)

    def work() -> bool:
        from pipeline.cluster.train import train

        train(config)
        return True

    return exit_status("train_jbu", work)


if __name__ == "__main__":
    sys.exit(main())
