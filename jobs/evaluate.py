"""Compare upsamplers on labelled images: segmentation, depth and class activation maps, in one table with pictures.

python -m jobs.evaluate --train 'train-*.tar' --val 'val-*.tar' --classes 23 --out out/eval --backbone ... \
    --rows nearest bilinear bilateral jbu=out/jbu/best.safetensors
python -m jobs.evaluate --depth-train 'train-*.tar' --depth-val 'val-*.tar' --cam-shards 'images-*.tar' --out ...
"""

import sys

from jobs import exit_status
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.parser import parse_args


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the table is written; 1: it is not, and the text says why."""
    config, _ = parse_args(EvaluateConfig, argv, description=__doc__)

    def work() -> bool:
        from pipeline.evaluation.evaluate import evaluate

        evaluate(config)
        return True

    return exit_status("evaluate", work)


if __name__ == "__main__":
    sys.exit(main())
