"""Train a learned upsampler for a backbone: shards of images in, checkpoints for featup precompute out.

featup train_jbu --shards 'train-{0000..0005}.tar' --out out/jbu --backbone vit_small_patch14_dinov2.lvd142m
featup train_jbu --config configs/train_jbu.yaml --shards ... --out ... --workers 4 --batch-size 8
"""

import sys

from . import exit_status, program


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: trained to the last step; 1: not, and the text says why."""
    return exit_status("train_jbu", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places
    from pipeline.config.train import TrainConfig

    config, _ = parse_args(TrainConfig, argv, description=__doc__ or "", prog=program("train_jbu"))
    check_places(config)
    from pipeline.cluster.train import train

    train(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
