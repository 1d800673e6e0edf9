import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import InputChangedError, InputError
from pipeline.inputs import storage
from pipeline.inputs.plan import Plan, PlannedShard, make_plan, plan_shard
from pipeline.inputs.plan_update import PlanUpdate, update_plan
from tests.pipeline.inputs.tars import tar_bytes


class Input:
    """A folder of shards beside an index folder, and the plan as a store keeps it."""

    def __init__(self, folder: str, index_dir: str) -> None:
        self.folder = folder
        self.index_dir = index_dir
        self.indexed: list[str] = []
        self.clock = 0

    def url(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.tar")

    def write(self, name: str, keys: str, data: bytes = b"data") -> None:
        """A shard with an image a letter of ``keys``."""
        storage.write_atomic(self.url(name), tar_bytes([(f"{key}.jpg", data) for key in keys]))
        if storage.is_local(self.folder):
            self.clock += 1
            os.utime(self.url(name), ns=(0, self.clock))

    def move(self, before: str, after: str) -> None:
        storage.write_atomic(self.url(after), storage.read_bytes(self.url(before)))
        storage.remove(self.url(before))

    def stored_plan(self, names: str, limit: int | None = None) -> Plan:
        shards = make_plan([self.url(name) for name in names], self.index_dir, limit)
        return Plan.from_json(Plan(shards, 4, self.index_dir).to_json(), self.index_dir)

    def index_all(self, urls: list[str], index_dir: str) -> Iterator[PlannedShard]:
        self.indexed += [url.removeprefix(self.folder + "/").removesuffix(".tar") for url in urls]
        return (plan_shard(url, index_dir) for url in urls)

    def update(self, old: Plan | None, names: str, limit: int | None = None) -> PlanUpdate:
        return update_plan(old, [self.url(name) for name in names], self.index_dir, limit, self.index_all)

    def names(self, update: PlanUpdate) -> str:
        return "".join(shard.url.removeprefix(self.folder + "/")[0] for shard in update.shards)


@pytest.fixture(params=["path", "memory"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Input:
    folder = {"path": f"{tmp_path}/shards", "memory": f"memory://update{tmp_path}"}[request.param]
    return Input(folder, str(tmp_path / "index"))


def test_a_new_store_gets_the_plan_of_its_input(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    update = shards.update(None, "ab", limit=4)
    assert update.shards == make_plan([shards.url("a"), shards.url("b")], shards.index_dir, 4)
    assert (update.to_recheck, update.appended) == ((), 2)


def test_an_input_that_stands_is_neither_parsed_nor_is_its_index_opened(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    for name in storage.list_files(shards.index_dir):
        Path(shards.index_dir, name).write_bytes(b"what opens this complains")
    update = shards.update(old, "ab")
    assert update == PlanUpdate(old.shards, (), 0)
    assert shards.indexed == []


def test_new_shards_come_behind_the_old_ones_whatever_their_order(shards: Input) -> None:
    for name in "bdf":
        shards.write(name, f"{name}xy")
    old = shards.stored_plan("bdf")
    for name in "ace":
        shards.write(name, f"{name}xyz")
    update = shards.update(old, "abcdef")
    assert shards.names(update) == "bdface"
    assert update.appended == 3
    assert update.to_recheck == ()
    assert shards.indexed == ["a", "c", "e"], "old shards are not parsed again"
    plan, grown = old, Plan(update.shards, 4, shards.index_dir)
    assert [grown.unit(n) for n in range(plan.units)] == [plan.unit(n) for n in range(plan.units)]
    again = shards.update(Plan.from_json(grown.to_json(), shards.index_dir), "fedcba")
    assert (again.shards, again.appended) == (update.shards, 0)


def test_data_that_moved_is_found_by_its_content(shards: Input) -> None:
    for name in "abc":
        shards.write(name, f"{name}xy")
    old = shards.stored_plan("abc")
    shards.move("b", "z")
    update = shards.update(old, "acz")
    assert shards.names(update) == "azc"
    assert update.to_recheck == (1,)
    assert update.appended == 0
    assert Plan(update.shards, 4, "").digest == old.digest


def test_shards_that_swapped_their_names_are_found(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uvw")
    old = shards.stored_plan("ab")
    shards.write("a", "uvw")
    shards.write("b", "xyz")
    update = shards.update(old, "ab")
    assert shards.names(update) == "ba"
    assert update.to_recheck == (0, 1)


def test_a_shard_written_again_with_the_same_headers_is_to_be_rechecked(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    shards.write("b", "uv", b"DATA")
    update = shards.update(old, "ab")
    assert update.to_recheck == (1,)
    assert update.shards[1].stamp != old.shards[1].stamp
    assert update.shards[1].digest == old.shards[1].digest


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        (lambda s: s.write("b", "uw"), r"member 1 is w\.jpg of 4 bytes, v\.jpg of 4 bytes then"),
        (lambda s: s.write("b", "uvw"), r"samples 3, 2 then; member 2 is w\.jpg, missing then"),
        (lambda s: s.write("b", "uv", b"longer"), r"member 0 is u\.jpg of 6 bytes, u\.jpg of 4 bytes then"),
    ],
    ids=["name", "more", "size"],
)
def test_a_shard_of_other_content_is_refused_with_what_differs(
    shards: Input, change: Callable[[Input], None], differences: str
) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    change(shards)
    with pytest.raises(
        InputChangedError, match=rf"b\.tar is not the shard that the store was made from: .*{differences}"
    ):
        shards.update(old, "ab")


def test_a_shard_whose_old_index_is_gone_is_refused_all_the_same(shards: Input) -> None:
    shards.write("a", "xyz")
    old = shards.stored_plan("a")
    for name in storage.list_files(shards.index_dir):
        storage.remove(storage.join(shards.index_dir, name))
    assert shards.update(old, "a") == PlanUpdate(old.shards, (), 0), "the index is made again"
    assert shards.indexed == ["a"]
    for name in storage.list_files(shards.index_dir):
        storage.remove(storage.join(shards.index_dir, name))
    shards.write("a", "xyw")
    with pytest.raises(InputChangedError, match="names, sizes or header checksums of its members differ"):
        shards.update(old, "a")


def test_an_old_shard_that_is_nowhere_is_named(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    with pytest.raises(InputError, match=r"b\.tar, of which the store holds 2 samples, is not among the input shards"):
        shards.update(old, "a")
    storage.remove(shards.url("b"))
    with pytest.raises(InputError, match=r"b\.tar, of which the store holds 2 samples, is missing, and no other shard"):
        shards.update(old, "ab")


def test_a_shard_that_was_missing_is_appended_when_it_is_there(shards: Input) -> None:
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    assert old.faults
    shards.write("a", "xyz")
    update = shards.update(old, "ab")
    assert shards.names(update) == "aba", "the first entry keeps its place, with no samples"
    assert [shard.samples for shard in update.shards] == [0, 2, 3]
    plan = Plan(update.shards, 4, shards.index_dir)
    assert plan.faults == [], "the fault is mended"
    assert shards.update(Plan.from_json(plan.to_json(), shards.index_dir), "ab") == dataclasses.replace(
        update, appended=0
    )


def test_a_shard_that_is_still_missing_stays_a_fault(shards: Input) -> None:
    shards.write("b", "uv")
    old = shards.stored_plan("ab")
    update = shards.update(old, "ab")
    assert Plan(update.shards, 4, "").faults == old.faults
    assert update.appended == 0


def test_a_limit_keeps_what_old_shards_use(shards: Input) -> None:
    for name in "abc":
        shards.write(name, f"{name}xyz")
    old = shards.stored_plan("abc", limit=7)
    shards.write("d", "dxyz")
    update = shards.update(old, "abcd", limit=7)
    assert [(shard.used, shard.spread) for shard in update.shards] == [(2, True), (3, True), (2, True), (0, False)]
    assert update.shards[:3] == old.shards
    update = shards.update(old, "abcd", limit=9)
    assert [(shard.used, shard.spread) for shard in update.shards[2:]] == [(2, True), (2, True)]


def test_a_store_of_before_limits_were_spread_goes_on_with_the_samples_it_has(shards: Input) -> None:
    """It would have gone on with others, in rows that hold the old ones."""
    for name in "ab":
        shards.write(name, f"{name}xyz")
    plan = shards.stored_plan("ab")
    old = Plan(
        (dataclasses.replace(plan.shards[0], used=3), dataclasses.replace(plan.shards[1], used=0)), 4, shards.index_dir
    )
    shards.write("c", "cxyz")
    assert shards.update(old, "abc", limit=3).shards[:2] == old.shards
    update = shards.update(old, "abc", limit=5)
    assert [(shard.used, shard.spread) for shard in update.shards] == [(3, False), (0, False), (2, True)]
    grown = Plan(update.shards, 4, shards.index_dir)
    assert [sample.key for sample in grown.index(0).samples[:3]] == ["a", "x", "y"]
    assert [sample.key for sample in grown.index(2).samples] == ["x", "z"]


def test_an_unused_shard_that_changed_is_appended_once(shards: Input) -> None:
    shards.write("a", "xyz")
    shards.write("b", "uv")
    plan = shards.stored_plan("ab")
    old = Plan((plan.shards[0], dataclasses.replace(plan.shards[1], used=0)), 4, shards.index_dir)
    shards.write("b", "uvw")
    update = shards.update(old, "ab", limit=4)
    assert [shard.used for shard in update.shards] == [3, 0, 1]
    again = shards.update(Plan.from_json(Plan(update.shards, 4, "").to_json(), ""), "ab", limit=4)
    assert (again.shards, again.appended) == (update.shards, 0)


class TarServer:
    """Serves tars by HTTP with byte ranges, whatever the signature, and counts what is read."""

    def __init__(self, tars: dict[str, bytes]) -> None:
        self.gets = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(send=False)

            def do_GET(self) -> None:
                outer.gets += 1
                self._answer(send=True)

            def _answer(self, send: bool) -> None:
                data = tars[self.path.partition("?")[0].lstrip("/")]
                start, stop = 0, len(data)
                if asked := self.headers.get("Range"):
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, stop = int(first), min(int(last) + 1, stop)
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(stop - start))
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", '"version-1"')
                self.end_headers()
                if send:
                    self.wfile.write(data[start:stop])

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


@pytest.fixture
def tar_server() -> Iterator[TarServer]:
    server = TarServer({f"{name}.tar": tar_bytes([(f"{name}{n}.jpg", b"x") for n in range(2)]) for name in "ab"})
    with server.http:
        thread = threading.Thread(target=server.http.serve_forever)
        thread.start()
        yield server
        server.http.shutdown()
        thread.join()


def test_a_new_signature_is_no_change(tar_server: TarServer, tmp_path: Path) -> None:
    # A presigned URL is another one on each run, and the second run was refused.
    index_dir = str(tmp_path / "index")
    urls = [tar_server.url(name) + "?X-Amz-Signature=" for name in ("a.tar", "b.tar")]
    shards = make_plan([url + "first" for url in urls], index_dir)
    assert [shard.samples for shard in shards] == [2, 2]
    old = Plan.from_json(Plan(shards, 4, index_dir).to_json(), index_dir)
    tar_server.gets = 0
    update = update_plan(old, [url + "second" for url in urls], index_dir)
    assert tar_server.gets == 0, "the tars are looked up, not read"
    assert update.to_recheck == ()
    assert [shard.url for shard in update.shards] == [url + "second" for url in urls]
    plan = Plan(update.shards, 4, index_dir)
    assert plan.digest == old.digest
    assert len(plan.unit_samples(plan.unit(1))) == 2
    assert b"second" not in plan.to_json()
