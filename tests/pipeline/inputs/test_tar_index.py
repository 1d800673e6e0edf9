import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs import storage
from pipeline.inputs.tar import ShardIndex, index_tar
from pipeline.inputs.tar_index import cached_index, load_index, save_index, saved_index
from tests.pipeline.inputs.tars import (
    index_bytes,
    tar_bytes,
    three,
)


def test_saving_and_loading_give_the_same_index(tmp_path: Path) -> None:
    data = tar_bytes([*three(), ("0001.jpg", b"again"), ("ü.東", b""), ("cut.jpg", bytes(9000))])
    for content in (data, data[:-12000], b"", tar_bytes([("none", b"")])):
        index = index_bytes(tmp_path, content)
        assert load_index(save_index(index)) == index
    missing = index_tar(str(tmp_path / "none.tar"))
    assert load_index(save_index(missing)) == missing


def test_loading_what_is_no_index_is_an_error() -> None:
    with pytest.raises(InputError, match=r"not an index that can be read.*it is made again"):
        load_index(b"garbage" * 10)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"key": ["a"]}), sink)
    with pytest.raises(InputError, match="format None"):
        load_index(bytes(sink.getvalue()))


def test_the_cache_holds_while_size_and_stamp_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, cache = tmp_path / "a.tar", tmp_path / "cache"
    path.write_bytes(tar_bytes(three(4)))
    requests = 0

    def counting(name: str, start: int, stop: int) -> bytes:
        nonlocal requests
        requests += 1
        return storage.read_range(name, start, stop)

    def again() -> tuple[ShardIndex, bool]:
        nonlocal requests
        requests = 0
        index = cached_index(str(path), str(cache), read=counting)
        return index, requests == 0

    first, from_cache = again()
    assert not from_cache
    assert again() == (first, True)
    os.utime(path, ns=(1, first_time := 1_700_000_000_000_000_000))
    assert not again()[1]
    path.write_bytes(tar_bytes(three(40)))
    os.utime(path, ns=(1, first_time))
    changed, from_cache = again()
    assert not from_cache
    assert len(changed.samples) == 40
    (saved,) = cache.iterdir()
    saved.write_bytes(saved.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert again() == (changed, False)
    assert "not an index that can be read" in caplog.text
    assert again() == (changed, True)
    path.unlink()
    assert again()[0].size == -1


def test_a_saved_index_is_read_without_its_tar(tmp_path: Path) -> None:
    url, cache = str(tmp_path / "a.tar"), str(tmp_path / "cache")
    with pytest.raises(InputError, match=r"no index of .*a\.tar in .*cache; run the job again"):
        saved_index(url, cache)
    (tmp_path / "a.tar").write_bytes(tar_bytes(three()))
    made = cached_index(url, cache)
    os.unlink(url)
    assert saved_index(url, cache) == made
    with pytest.raises(InputError, match=r"no index of .*b\.tar in .*cache"):
        saved_index(str(tmp_path / "b.tar"), cache)
    with pytest.raises(InputError, match=r"no index of .*a\.tar in .*elsewhere"):
        saved_index(url, str(tmp_path / "elsewhere"))


def test_a_saved_index_that_is_damaged_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, cache = str(tmp_path / "a.tar"), str(tmp_path / "cache")
    (tmp_path / "a.tar").write_bytes(tar_bytes(three()))
    cached_index(url, cache)
    (name,) = storage.list_files(cache)
    (tmp_path / "cache" / name).write_bytes(b"PAR1 and no more")
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match=r"no index of .*run the job again"):
        saved_index(url, cache)
    assert name in caplog.text, "the log says which file it was"


def test_a_new_signature_meets_the_saved_index(tmp_path: Path, server: str) -> None:
    # The signature was part of the index's name, and stood in the index: each run indexed all shards again.
    cache = tmp_path / "cache"
    secret = f"{server.replace('//', '//user:password@')}/tar.tar?X-Amz-Signature="
    data = tar_bytes(three())
    requests = 0

    def read(url: str, start: int, stop: int) -> bytes:
        nonlocal requests
        requests += 1
        return data[start:stop].ljust(stop - start, b"\0")

    first = cached_index(secret + "5ec7e7", str(cache), read=read)
    assert first.samples
    assert requests
    requests = 0
    again = cached_index(secret + "0ther", str(cache), read=read)
    assert requests == 0
    assert again.samples == first.samples
    assert again.url == secret + "0ther", "what reads the tar needs the new signature"
    assert saved_index(secret + "third", str(cache)).url == secret + "third"
    (saved,) = cache.iterdir()
    content = pq.read_schema(saved).metadata[b"about"].decode() + saved.read_bytes().decode("latin-1")
    assert not any(word in content for word in ("5ec7e7", "password", "Signature"))


def test_an_index_of_an_older_format_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, cache = str(tmp_path / "a.tar"), tmp_path / "cache"
    (tmp_path / "a.tar").write_bytes(tar_bytes(three()))
    index = cached_index(url, str(cache))
    (saved,) = cache.iterdir()
    table = pq.read_table(saved)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"tarindex": b"1"}), saved)
    with caplog.at_level(logging.WARNING):
        assert cached_index(url, str(cache)) == index
    assert "index of format b'1', wanted b'2'" in caplog.text
