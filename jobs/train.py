"""Train an upsampler: shards of images in, checkpoints for featup precompute out.

featup train --shards 'train-{0000..0005}.tar' --out out/jbu --backbone vit_small_patch14_dinov2.lvd142m
featup train --config configs/train_jbu.yaml --shards ... --out ... --workers 4 --batch-size 8
featup train --upsampler anyup --objective crops --width 64 --shards ... --out ...
"""

import sys

from . import exit_status, program


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: trained to the last step; 1: not, and the text says why."""
    return exit_status("train", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places
    from pipeline.config.train import TrainConfig

    config, _ = parse_args(TrainConfig, argv, description=__doc__ or "", prog=program("train"))
    check_places(config)
    from pipeline.cluster.train import train

    train(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
