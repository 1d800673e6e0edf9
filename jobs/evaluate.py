"""Compare upsamplers on labelled images: segmentation, depth and class activation maps, in one table with pictures.

featup evaluate --train 'train-*.tar' --val 'val-*.tar' --classes 23 --out out/eval --backbone ... \\
    --rows nearest bilinear bilateral jbu=out/jbu/best.safetensors
featup evaluate --depth-train 'train-*.tar' --depth-val 'val-*.tar' --cam-shards 'images-*.tar' --out ...
"""

import sys

from . import exit_status, program


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the table is written; 1: it is not, and the text says why."""
    return exit_status("evaluate", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.evaluate import EvaluateConfig
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places

    config, _ = parse_args(EvaluateConfig, argv, description=__doc__ or "", prog=program("evaluate"))
    check_places(config)
    from pipeline.evaluation.evaluate import evaluate

    evaluate(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
