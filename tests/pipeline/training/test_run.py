"""The record of a training run, and runs that cannot be gone on with."""

import json
from pathlib import Path

import pytest

from pipeline.errors import StoreError, StoreFormatError, StoreMismatchError
from pipeline.training.run import check_run, record_run

IDENTITY = {"lr": 0.001, "input digest": "d"}


def test_the_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path)
    check_run(out, IDENTITY)
    record_run(out, {"identity": IDENTITY, "versions": {}})
    check_run(out, IDENTITY)
    check_run(out, {"lr": 0.001})
    with pytest.raises(StoreMismatchError, match=r"begun with other options, input or weights:\n  lr: .*0\.001.*0\.5"):
        check_run(out, {"lr": 0.5})


def test_a_run_of_an_older_program_is_refused(tmp_path: Path) -> None:
    """Its samples came in another order: going on would repeat some and miss others."""
    place = tmp_path / "plan" / "run.json"
    place.parent.mkdir()
    place.write_text(json.dumps({"format": "featup-datasets/1", "identity": IDENTITY}))
    with pytest.raises(
        StoreFormatError, match="finish the run with the program that began it, or start anew"
    ) as caught:
        check_run(str(tmp_path), IDENTITY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    place = tmp_path / "plan" / "run.json"
    place.parent.mkdir()
    place.write_text(text)
    with pytest.raises(StoreError, match=r"run\.json is not the record of a training run .*: it is damaged"):
        check_run(str(tmp_path), IDENTITY)
