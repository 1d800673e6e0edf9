"""Fit a linear probe on the features and labels of a store, and evaluate it on another store.

featup train_probe --store out/train --label seg --classes 23 --out out/probe.safetensors --val-store out/val
featup train_probe --store out/train --label depth --out out/depth.safetensors
"""

import sys

from . import exit_status, program


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: the probe is fitted and saved; 1: it is not, and the text says why."""
    return exit_status("train_probe", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places
    from pipeline.config.probe import ProbeConfig

    config, _ = parse_args(ProbeConfig, argv, description=__doc__ or "", prog=program("train_probe"))
    check_places(config)
    from pipeline.training.probes import train_probe

    train_probe(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
