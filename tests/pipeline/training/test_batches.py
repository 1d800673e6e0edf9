"""The images of each training step: which they are, replacements, decoding ahead of time."""

import re

import numpy as np
import pytest

from pipeline.decode.options import DecodeOptions
from pipeline.errors import InputError
from pipeline.inputs.plan import Plan, make_plan
from pipeline.options import Size
from pipeline.training.batches import load_image, step_batches
from pipeline.training.order import SampleOrder
from tests.e2e import support

OPTIONS = DecodeOptions(size=Size(16, 24))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Samples 0 to 4 and 5 to 8 in two tars; 3, 5 and 6 are not images. Sample n is grey, of the value 20 n."""
    folder = tmp_path_factory.mktemp("shards")
    for tar, numbers in enumerate((range(5), range(5, 9))):
        members = []
        for number in numbers:
            grey = support.encode(np.full((20, 30, 3), 20 * number, np.uint8), "PNG")
            members.append((f"s{number}.png", b"no image" if number in (3, 5, 6) else grey))
        support.write_tar(folder / f"{tar}.tar", members)
    index = str(folder / "index")
    return Plan(make_plan([str(folder / "{0..1}.tar")], index), 1, index)


def test_the_next_sample_replaces_one_that_fails(plan: Plan) -> None:
    loaded = load_image(plan, [5, 3, 8, 0], OPTIONS)
    assert loaded.image.shape == (16, 24, 3)
    assert (loaded.image == 160).all()
    assert list(loaded.failures) == [5, 3]
    assert re.match(r"s5 of .*1\.tar: (undecodable|unsupported_format)", loaded.failures[5])
    assert load_image(plan, [2], OPTIONS).failures == {}
    with pytest.raises(InputError, match=r"not one of 3 samples can be decoded: s6 of .*1\.tar: .*; s3 of .*0\.tar"):
        load_image(plan, [6, 3, 5], OPTIONS)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_batches(plan: Plan, workers: int) -> None:
    order = SampleOrder(9, 2, seed=1)
    batch, steps = 4, 5

    def expected(step: int, place: int) -> int:
        good = (number for number in order.candidates((step - 1) * batch + place) if number not in (3, 5, 6))
        return 20 * next(good)

    each = batch // workers
    found = np.concatenate(
        [
            [
                [int(loaded.image[0, 0, 0]) for loaded in images]
                for images in step_batches(
                    plan, order, OPTIONS, batch, range(rank * each, (rank + 1) * each), range(1, steps + 1), 2
                )
            ]
            for rank in range(workers)
        ],
        1,
    )
    assert found.tolist() == [[expected(step, place) for place in range(batch)] for step in range(1, steps + 1)]


def test_a_run_that_goes_on_sees_what_it_would_have_seen(plan: Plan) -> None:
    order = SampleOrder(9, 2, seed=1)

    def seen(first: int) -> list[list[int]]:
        batches = step_batches(plan, order, OPTIONS, 3, range(3), range(first, 12), 3)
        return [[int(loaded.image[0, 0, 0]) for loaded in batch] for batch in batches]

    assert seen(8) == seen(1)[7:]


def test_batches_may_be_left_before_their_end(plan: Plan) -> None:
    batches = step_batches(plan, SampleOrder(9, 2, 1), OPTIONS, 2, range(2), range(1, 1000), 2)
    assert len(next(batches)) == 2
    batches.close()  # type: ignore[attr-defined]
