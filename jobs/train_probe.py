"""Fit a linear probe on the features and labels of a store, and evaluate it on another store.

python -m jobs.train_probe --store out/train --label seg --classes 23 --out out/probe.safetensors --val-store out/val
python -m jobs.train_probe --store out/train --label depth --out out/depth.safetensors
"""

import sys

from jobs import exit_status
from pipeline.config.parser import parse_args
from pipeline.config.probe import ProbeConfig


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the probe is fitted and saved; 1: it is not, and the text says why."""
    config, _ = parse_args(ProbeConfig, argv, description=__doc__)

    def work() -> bool:
        from pipeline.training.probes import train_probe

        train_probe(config)
        return True

    return exit_status("train_probe", work)


if __name__ == "__main__":
    sys.exit(main())
