"""What Ray makes of the stages."""

import subprocess
import sys

import pytest

from tests.e2e import support

SCRIPT = """
import sys
import numpy as np
from pipeline.cluster.connect import connect
from pipeline.cluster.precompute import stages
from pipeline.cluster.resources import allot
from pipeline.compute.models import Setup
from pipeline.compute.prepare import layout_of
from pipeline.config.precompute import PrecomputeConfig
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.options import Size

config = PrecomputeConfig(shards=("a.tar",), out="out", size=Size(64, 64))
plan = Plan((PlannedShard("a.tar", 1, "", 8, 8, (), "d"),), 2, "index")
setup = Setup(4, (4, 4), (16, 16), 0, (0.5,) * 3, (0.5,) * 3, {}, "cpu")
options = {"cpus_per_actor": None, "gpus_per_actor": None, "loader_cpus": None}
allotment = allot({"CPU": 2.0}, nodes=1, actors=int(sys.argv[1]), **options)
connect(100)
stages(config, plan, layout_of(config, 2, 4, plan.units), setup, np.arange(plan.units), allotment).explain()
"""


@pytest.mark.parametrize("actors", [1, 2])
def test_loading_does_not_run_inside_the_actor(actors: int) -> None:
    """Ray Data fuses neighbours of equal resources; fused, reading and decoding would hold the accelerator up."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(actors)],
        env=support.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    plan = done.stdout.split("Physical Plan (Optimized)")[-1]
    assert "ActorPoolMapOperator[MapBatches(Featurizer)]\n" in plan, done.stdout + done.stderr
    assert "TaskPoolMapOperator[Map(load_row)]" in plan
