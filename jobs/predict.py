"""Apply a probe to photographs: class or depth maps at their own size, overlays, and a contact sheet.

featup predict --probe out/probe.safetensors --images holiday/ cat.jpg --out out/predictions
featup predict --probe out/probe.safetensors --shards 'val-{00..01}.tar' --out out/predictions
"""

import sys

from . import exit_status, program


def main(argv: list[str] | None = None) -> int:
    """Run the job. Exit status 0: predicted; 1: nothing was, or more images failed than allowed."""
    return exit_status("predict", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    from pipeline.config.parser import parse_args
    from pipeline.config.places import check_places
    from pipeline.config.predict import PredictConfig

    config, _ = parse_args(PredictConfig, argv, description=__doc__ or "", prog=program("predict"))
    check_places(config)
    from pipeline.evaluation.predict import predict

    predict(config)
    return True


if __name__ == "__main__":
    sys.exit(main())
