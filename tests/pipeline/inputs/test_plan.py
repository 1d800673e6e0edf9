import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard, UnitKey, make_plan, plan_shard, rows_of


def write_tar(path: Path, keys: list[str], size: int = 10) -> str:
    """A shard with one image member, of ``size`` bytes, and one label member a key."""
    with tarfile.open(path, "w") as tar:
        for key, ext in itertools.product(keys, ("jpg", "cls")):
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size = size if ext == "jpg" else 1
            tar.addfile(info, io.BytesIO(b"7" * info.size))
    return str(path)


def shards_of(counts: list[tuple[int, int]]) -> tuple[PlannedShard, ...]:
    """Shards of (samples in the tar, samples used)."""
    return tuple(
        PlannedShard(f"s3://b/{n}.tar", 100 + n, "t", samples, used, (), "d")
        for n, (samples, used) in enumerate(counts)
    )


USED = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda two: (max(two), min(two))), max_size=12)


@given(USED, st.integers(1, 16))
def test_every_sample_gets_exactly_one_row_of_a_unit_of_its_shard(counts: list[tuple[int, int]], rows: int) -> None:
    plan = Plan(shards_of(counts), rows, "")
    row_of: dict[tuple[int, int], int] = {}
    for number in range(plan.units):
        key = plan.unit(number)
        assert key.unit == number
        assert key.row == number * rows
        assert 1 <= len(key) <= rows
        assert key.start % rows == 0, "a unit begins on a boundary of its shard"
        assert key.stop <= counts[key.shard][1]
        for offset, sample in enumerate(range(key.start, key.stop)):
            assert (key.shard, sample) not in row_of
            row_of[key.shard, sample] = key.row + offset
    wanted = [(shard, sample) for shard, (_, used) in enumerate(counts) for sample in range(used)]
    assert list(row_of) == wanted, "all samples, in the order of the shards"
    assert plan.samples == len(wanted)
    assert [plan.sample(number) for number in range(plan.samples)] == wanted
    assert len(set(row_of.values())) == len(wanted)
    assert all(0 <= row < plan.rows for row in row_of.values())
    assert plan.rows == plan.units * rows
    assert plan.units == sum(-(-used // rows) for _, used in counts)


@given(USED.filter(lambda counts: sum(used for _, used in counts) > 0), st.integers(1, 16), st.data())
def test_rows_follow_from_the_counts_alone(counts: list[tuple[int, int]], rows: int, data: st.DataObject) -> None:
    plan = Plan(shards_of(counts), rows, "")
    other = Plan(
        tuple(
            dataclasses.replace(shard, url=f"x{n}", size=1, stamp="", samples=shard.used, faults=("cut",))
            for n, shard in enumerate(plan.shards)
        ),
        rows,
        "/elsewhere",
    )
    order = data.draw(st.permutations(range(plan.units)))
    assert {n: other.unit(n) for n in order} == {n: plan.unit(n) for n in range(plan.units)}


@given(USED, st.integers(1, 16), st.integers(1, 5))
def test_shards_behind_do_not_move_rows(counts: list[tuple[int, int]], rows: int, more: int) -> None:
    plan, longer = Plan(shards_of(counts), rows, ""), Plan(shards_of([*counts, (more, more)]), rows, "")
    assert [longer.unit(n) for n in range(plan.units)] == [plan.unit(n) for n in range(plan.units)]


@pytest.mark.parametrize("number", [-1, 3])
def test_a_unit_beyond_the_plan_is_refused(number: int) -> None:
    plan = Plan(shards_of([(5, 5), (1, 1)]), 4, "")
    with pytest.raises(InputError, match=f"unit {number} of a plan with 3 units"):
        plan.unit(number)


def test_a_unit_key_is_a_value() -> None:
    key = UnitKey(unit=1, shard=0, start=4, stop=7, row=4)
    assert {key: "a"}[UnitKey(1, 0, 4, 7, 4)] == "a"
    assert len(key) == 3
    assert str(key) == "unit 1 (shard 0, samples 4:7, row 4)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        key.row = 5  # type: ignore[misc]
    later = UnitKey(unit=2, shard=0, start=7, stop=8, row=8)
    assert sorted([later, key]) == [key, later]


@pytest.mark.parametrize(
    "numbers",
    [(-1, 0, 0, 1, 0), (0, -1, 0, 1, 0), (0, 0, -1, 1, 0), (0, 0, 0, 1, -1), (0, 0, 3, 3, 0), (0, 0, 3, 2, 0)],
)
def test_a_unit_key_that_cannot_be_is_refused(numbers: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(InputError, match="numbers are not negative and a unit has at least one sample"):
        UnitKey(*numbers)


def test_planning_counts_the_samples_of_tars(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 0), ("c", 5)):
        write_tar(tmp_path / f"{name}.tar", [f"{n:04d}" for n in range(count)])
    shards = make_plan([f"{tmp_path}/{{a..c}}.tar"], str(tmp_path / "index"))
    assert [(Path(shard.url).name, shard.samples, shard.used) for shard in shards] == [
        ("a.tar", 3, 3), ("b.tar", 0, 0), ("c.tar", 5, 5),
    ]  # fmt: skip
    assert [shard.size for shard in shards] == [os.path.getsize(shard.url) for shard in shards]
    plan = Plan(shards, 2, str(tmp_path / "index"))
    units = [
        (key.shard, [sample.key for sample in plan.unit_samples(key)]) for key in map(plan.unit, range(plan.units))
    ]
    assert units == [
        (0, ["0000", "0001"]), (0, ["0002"]), (2, ["0000", "0001"]), (2, ["0002", "0003"]), (2, ["0004"]),
    ]  # fmt: skip


def test_keys_that_repeat_across_shards_are_different_samples(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", ["same", "other"])
    index_dir = str(tmp_path / "index")
    plan = Plan(make_plan([f"{tmp_path}/*.tar"], index_dir), 4, index_dir)
    assert [plan.unit(n).row for n in range(plan.units)] == [0, 4]
    for number in range(2):
        samples = plan.unit_samples(plan.unit(number))
        assert [(sample.key, sample.problem) for sample in samples] == [("same", None), ("other", None)]


@pytest.mark.parametrize(
    ("limit", "used", "keys"),
    [
        (None, [3, 0, 5], "abc34567"),
        (1, [0, 0, 1], "5"),
        (2, [1, 0, 1], "b5"),
        (4, [1, 0, 3], "b357"),
        (8, [3, 0, 5], "abc34567"),
        (99, [3, 0, 5], "abc34567"),
    ],
)
def test_a_limit_takes_samples_spread_over_all_shards_and_each_of_them(
    tmp_path: Path, limit: int | None, used: list[int], keys: str
) -> None:
    """The first samples were taken: of an input sorted by class, those of one class."""
    for name, members in (("a", "abc"), ("b", ""), ("c", "34567")):
        write_tar(tmp_path / f"{name}.tar", list(members))
    index_dir = str(tmp_path / "index")
    shards = make_plan([f"{tmp_path}/*.tar"], index_dir, limit)
    assert [shard.used for shard in shards] == used
    assert [shard.samples for shard in shards] == [3, 0, 5]
    plan = Plan.from_json(Plan(shards, 2, index_dir).to_json(), index_dir)
    assert plan.samples == len(keys)
    assert "".join(s.key for n in range(plan.units) for s in plan.unit_samples(plan.unit(n))) == keys
    singles = [plan.sample(number) for number in range(plan.samples)]
    assert "".join(plan.index(shard).samples[position].key for shard, position in singles) == keys


def test_a_plan_of_before_limits_were_spread_has_the_first_samples_still(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", list("abcdef"))
    index_dir = str(tmp_path / "index")
    (shard,) = make_plan([url], index_dir)
    plan = json.loads(Plan((dataclasses.replace(shard, used=3),), 2, index_dir).to_json())
    del plan["shards"][0]["spread"]
    old = Plan.from_json(json.dumps(plan).encode(), index_dir)
    assert [sample.key for n in range(old.units) for sample in old.unit_samples(old.unit(n))] == list("abc")
    (limited,) = make_plan([url], index_dir, 3)
    assert Plan((limited,), 2, index_dir).digest != old.digest


def test_what_cuts_the_last_sample_of_a_tar_is_said_of_no_other(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", list("abcdef"))
    data = Path(url).read_bytes()
    Path(url).write_bytes(data[: len(data) - 10240])
    index_dir = str(tmp_path / "index")
    (whole,) = make_plan([url], index_dir)
    assert whole.faults
    for limit, last in ((2, False), (whole.samples - 1, True)):
        plan = Plan(make_plan([url], index_dir, limit), 1, index_dir)
        chosen = plan.index(0)
        assert (chosen.samples[-1].key == "abcdef"[whole.samples - 1]) == last
        assert chosen.faults == (whole.faults if last else ())


def test_many_shards_may_be_indexed_at_once(tmp_path: Path) -> None:
    for n in range(3):
        write_tar(tmp_path / f"{n}.tar", [str(i) for i in range(n + 1)])
    asked: list[list[str]] = []

    def index_all(urls: list[str], index_dir: str) -> Iterator[PlannedShard]:
        asked.append(urls)
        return (plan_shard(url, index_dir) for url in urls)

    pattern, index_dir = [f"{tmp_path}/*.tar"], str(tmp_path / "index")
    assert make_plan(pattern, index_dir, 4, index_all) == make_plan(pattern, index_dir, 4)
    assert asked == [[f"{tmp_path}/{n}.tar" for n in range(3)]]


def test_no_sample_at_all_is_an_error_that_lists_the_faults(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(InputError, match=r"1 shards and not one sample: .*give tars in WebDataset format"):
        make_plan([f"{tmp_path}/a.tar"], str(tmp_path / "index"))
    with pytest.raises(InputError, match=r"2 shards and not one sample: .*none\.tar: .*"):
        make_plan([f"{tmp_path}/a.tar", f"{tmp_path}/none.tar"], str(tmp_path / "index"))


def test_a_missing_shard_among_others_is_a_fault_of_the_plan(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ["x"])
    index_dir = str(tmp_path / "index")
    plan = Plan(make_plan([f"{tmp_path}/{{none,a}}.tar"], index_dir), 2, index_dir)
    assert plan.samples == 1
    (fault,) = plan.faults
    assert fault.startswith(f"{tmp_path}/none.tar: ")


def digest(shards: tuple[PlannedShard, ...], rows: int = 4) -> str:
    return Plan(shards, rows, "").digest


@pytest.mark.parametrize(
    "change",
    [
        lambda s: (dataclasses.replace(s[0], digest="other"), *s[1:]),
        lambda s: (*s[:-1], dataclasses.replace(s[-1], samples=6)),
        lambda s: (*s[:-1], dataclasses.replace(s[-1], used=4)),
        lambda s: (*s[:-1], dataclasses.replace(s[-1], spread=True)),
        lambda s: s[::-1],
        lambda s: s[:-1],
        lambda s: (*s, s[0]),
    ],
    ids=["content", "samples", "used", "spread", "order", "fewer", "more"],
)
def test_the_digest_changes_with_the_input(
    change: Callable[[tuple[PlannedShard, ...]], tuple[PlannedShard, ...]],
) -> None:
    shards = shards_of([(3, 3), (5, 5)])
    assert digest(change(shards)) != digest(shards)


def test_the_digest_is_of_the_content_and_its_rows_only() -> None:
    shards = shards_of([(3, 3), (5, 5)])
    assert digest(shards, 4) != digest(shards, 5)
    touched = tuple(
        dataclasses.replace(shard, url=f"moved{n}", size=n, stamp="later", faults=("cut",), ignored=(("directory", 1),))
        for n, shard in enumerate(shards)
    )
    assert digest(touched) == digest(shards)
    assert len(bytes.fromhex(digest(shards))) == hashlib.sha256().digest_size


TEXTS = st.text(st.characters(exclude_characters="?@#"), max_size=20)
SHARDS = st.builds(
    PlannedShard,
    url=TEXTS,
    size=st.integers(-1, 2**60),
    stamp=st.text(max_size=20),
    samples=st.integers(0, 9),
    used=st.integers(0, 9),
    faults=st.lists(TEXTS).map(tuple),
    digest=TEXTS,
    ignored=st.lists(st.tuples(TEXTS, st.integers(1, 9)), max_size=3).map(tuple),
    spread=st.booleans(),
)


@given(st.lists(SHARDS, max_size=4).map(tuple), st.integers(1, 1024))
def test_a_plan_reads_back_from_json(shards: tuple[PlannedShard, ...], rows: int) -> None:
    plan = Plan(shards, rows, "/index")
    data = plan.to_json()
    assert Plan.from_json(data, "/index") == plan
    assert Plan.from_json(data, "/index").digest == plan.digest
    assert set(json.loads(data)) == {"rows_per_shard", "shards"}, "where the indices lie is not part of the plan"


def test_an_index_is_reused_while_size_and_stamp_of_the_tar_stand(tmp_path: Path) -> None:
    index_dir = str(tmp_path / "index")
    url = write_tar(tmp_path / "a.tar", ["a", "b"])
    first = plan_shard(url, index_dir)
    before = os.stat(url)
    # Other names, the same size: only the time stamp can tell.
    write_tar(tmp_path / "a.tar", ["a", "c"])
    os.utime(url, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plan_shard(url, index_dir) == first
    assert [sample.key for sample in Plan((first,), 4, index_dir).index(0).samples] == ["a", "b"]
    os.utime(url, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    again = plan_shard(url, index_dir)
    assert again == dataclasses.replace(first, stamp=again.stamp, digest=again.digest)
    assert again.digest != first.digest
    assert [sample.key for sample in Plan((again,), 4, index_dir).index(0).samples] == ["a", "c"]


def test_a_tar_planned_anew_in_the_same_process_is_read_by_its_new_index(tmp_path: Path) -> None:
    # The index of the first plan was remembered by its name alone, and the second plan refused it.
    index_dir = str(tmp_path / "index")
    url = write_tar(tmp_path / "a.tar", ["a"])
    old = Plan((plan_shard(url, index_dir),), 4, index_dir)
    assert len(old.index(0).samples) == 1
    write_tar(tmp_path / "a.tar", ["a", "b", "c"], size=3000)
    new = Plan((plan_shard(url, index_dir),), 4, index_dir)
    assert [sample.key for sample in new.unit_samples(new.unit(0))] == ["a", "b", "c"]


def test_no_signature_is_kept_with_a_plan() -> None:
    # The signature of a presigned URL stood in plan.json, in the indices, in attributes and errors.
    secret = "https://user:password@host/a.tar?X-Amz-Signature=5ec7e7"
    shard = PlannedShard(secret, 1, "t", 1, 1, (f"damaged: {secret}",), "d")
    plan = Plan((shard,), 4, "")
    for text in (plan.to_json().decode(), *plan.faults):
        assert "https://host/a.tar" in text
        assert not any(word in text for word in ("password", "user", "5ec7e7", "X-Amz"))
    assert plan.shards[0].url == secret, "workers need it"
    assert Plan.from_json(plan.to_json(), "").digest == plan.digest


def test_ignored_members_are_summed_over_the_shards() -> None:
    first, second = shards_of([(3, 3), (5, 5)])
    first = dataclasses.replace(first, ignored=(("directory", 2), ("no extension", 1)))
    second = dataclasses.replace(second, ignored=(("no extension", 4),))
    assert Plan((first, second), 4, "").ignored == (("no extension", 5), ("directory", 2))


def test_a_plan_refuses_the_index_of_another_version_of_its_shard(tmp_path: Path) -> None:
    index_dir = str(tmp_path / "index")
    url = write_tar(tmp_path / "a.tar", ["a", "b"])
    old = plan_shard(url, index_dir)
    write_tar(tmp_path / "a.tar", ["a"] + [str(n) for n in range(30)])
    new = plan_shard(url, index_dir)
    text = rf"{new.size} bytes with 31 samples now, {old.size} bytes with 2 samples when the plan was made \(digest"
    with pytest.raises(InputChangedError, match=text):
        Plan((old,), 4, index_dir).index(0)


def test_an_index_of_equal_size_and_count_but_other_content_is_refused(tmp_path: Path) -> None:
    index_dir = str(tmp_path / "index")
    url = write_tar(tmp_path / "a.tar", ["a", "b"])
    old = plan_shard(url, index_dir)
    write_tar(tmp_path / "a.tar", ["a", "c"])
    os.utime(url, ns=(0, 1))
    plan_shard(url, index_dir)
    with pytest.raises(InputChangedError, match="put the shard back, or start a new store"):
        Plan((old,), 4, index_dir).index(0)


def remove_indices(index_dir: str) -> None:
    for name in storage.list_files(index_dir):
        storage.remove(storage.join(index_dir, name))


def test_an_index_that_was_removed_is_made_again(tmp_path: Path) -> None:
    index_dir = str(tmp_path / "index")
    plan = Plan((plan_shard(write_tar(tmp_path / "a.tar", ["a", "b"]), index_dir),), 4, index_dir)
    remove_indices(index_dir)
    assert [sample.key for sample in plan.unit_samples(plan.unit(0))] == ["a", "b"]
    assert len(storage.list_files(index_dir)) == 1


def test_a_plan_whose_index_and_shard_are_gone_says_so(tmp_path: Path) -> None:
    index_dir = str(tmp_path / "index")
    shard = plan_shard(write_tar(tmp_path / "a.tar", ["a"]), index_dir)
    remove_indices(index_dir)
    os.unlink(shard.url)
    with pytest.raises(InputError, match=r"no index of .*a\.tar in .*index; run the job again"):
        Plan((shard,), 4, index_dir).index(0)


@settings(max_examples=200)
@given(st.integers(1, 2**40), st.integers(1, 2**31))
def test_rows_are_the_largest_power_of_two_that_keeps_a_shard_small(sample: int, target: int) -> None:
    fits = [2**power for power in range(11) if 2**power * sample <= target]
    assert rows_of(sample, None, 0, target) == (fits[-1] if fits else 1)
    assert rows_of(sample, 7, 0, target) == 7


@given(st.integers(1, 2**30), st.integers(1, 2**30))
def test_rows_keep_the_decoded_bytes_of_a_unit_small_too(sample: int, decoded: int) -> None:
    # A unit of small features and large images was one Ray row of 1.5 GiB.
    rows = rows_of(sample, None, decoded)
    assert rows == 1 or rows * max(sample, decoded) <= 256 << 20
    assert rows == min(rows_of(sample, None), rows_of(decoded, None))


def test_rows_that_make_a_unit_too_large_are_refused() -> None:
    image = 3 * 2048 * 2048
    assert rows_of(1000, (1 << 30) // image, image) == 85
    with pytest.raises(ConfigError, match=r"rows_per_shard 86 makes units of 1\.1 GB .*12\.6 MB each.*give 85 or less"):
        rows_of(1000, 86, image)
