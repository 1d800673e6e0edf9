"""The dry run's remarks on its input."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.compute.estimate import estimate
from pipeline.config.precompute import PrecomputeConfig
from pipeline.options import Size
from tests.pipeline.decode.pictures import sample


def test_groups_of_rows_that_are_large_are_remarked_on(tmp_path: Path) -> None:
    """Of a group of 645 MB nothing was said, and each process read it from its start."""
    jpg = sample()["jpg"]
    heavy = pa.table({"image": [jpg + bytes(9 << 20)] * 33})
    pq.write_table(heavy, tmp_path / "t.parquet", use_dictionary=False)
    config = PrecomputeConfig(
        images=(str(tmp_path / "t.parquet"),),
        out=str(tmp_path / "out"),
        backbone="test_vit",
        pretrained=False,
        size=Size(64, 64),
        rows_per_shard=4,
        threads=1,
        gpus_per_actor=0.0,
    )
    text = estimate(config)
    assert "          groups of rows of up to 311." in text
    pq.write_table(heavy, tmp_path / "t.parquet", use_dictionary=False, row_group_size=3)
    assert "groups of rows" not in estimate(config)
