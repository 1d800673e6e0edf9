"""What Ray makes of the stages."""

import numpy as np
import pytest

from pipeline.cluster.connect import connect
from pipeline.cluster.precompute import stages
from pipeline.compute.allotment import allot
from pipeline.compute.models import Setup
from pipeline.compute.prepare import layout_of
from pipeline.config.precompute import PrecomputeConfig
from pipeline.inputs.plan import Plan, PlannedShard
from pipeline.options import Size


@pytest.mark.parametrize("actors", [1, 2])
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_loading_does_not_run_inside_the_actor(actors: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Data fuses neighbours of equal resources; fused, reading and decoding would hold the accelerator up."""
    config = PrecomputeConfig(shards=("a.tar",), out="out", size=Size(64, 64))
    plan = Plan((PlannedShard("a.tar", 1, "", 8, 8, (), "d"),), 2, "index")
    setup = Setup(4, (4, 4), (16, 16), 0, (0.5,) * 3, (0.5,) * 3, {}, "cpu")
    allotment = allot([{"CPU": 2.0}], actors=actors, cpus_per_actor=None, gpus_per_actor=None, loader_cpus=None)
    connect(100)
    stages(config, plan, layout_of(config, 2, 4, plan.units), setup, np.arange(plan.units), allotment).explain()
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[-1]
    assert "ActorPoolMapOperator[MapBatches(Featurizer)]\n" in physical
    assert "TaskPoolMapOperator[Map(load_row)]" in physical
