"""What Ray makes of the stages."""

import subprocess
import sys

import pytest

from tests.e2e import support

SCRIPT = """
import numpy as np
from pipeline.config import PrecomputeConfig, Size
from pipeline.featurize import Setup
from pipeline.plan import Plan, PlannedShard
from pipeline.run import connect, layout_of, stages

config = PrecomputeConfig(shards=("a.tar",), out="out", size=Size(64, 64))
plan = Plan((PlannedShard("a.tar", 1, "", 8, 8, (), "d"),), 2, "index")
setup = Setup(4, (4, 4), (16, 16), 0, (0.5,) * 3, (0.5,) * 3, {}, "cpu")
connect(100)
stages(config, plan, layout_of(config, 2, 4, plan.units), setup, np.arange(plan.units), 0.0).explain()
"""


@pytest.mark.ray
def test_loading_does_not_run_inside_the_actor() -> None:
    """Ray Data fuses neighbours of equal resources; fused, reading and decoding would hold the accelerator up."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=support.environment(), capture_output=True, text=True, timeout=120
    )
    plan = done.stdout.split("Physical Plan (Optimized)")[-1]
    assert "ActorPoolMapOperator[MapBatches(Featurizer)]\n" in plan, done.stdout + done.stderr
    assert "TaskPoolMapOperator[Map(load_row)]" in plan
