"""Decoding in a child process: same results, a time limit, crashes, and its end with the parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import psutil
import pytest

from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import prepare_sample
from pipeline.decode.worker import DecoderProcess
from pipeline.errors import EnvironmentFault, Reason, SampleError
from pipeline.options import Size
from tests.pipeline.decode.pictures import FILES, many_scans, sample

ROOT = Path(__file__).parents[3]
OPTIONS = DecodeOptions(Size(32, 48), geometry="pad", labels=("seg", "depth", "cls"))
IMAGE = DecodeOptions(Size(8, 8))
# Decodes for about 10 s; its scans are within the limit on them.
SLOW = {"jpg": many_scans(900, 7000)}


@pytest.fixture
def decoder() -> Iterator[DecoderProcess]:
    decoder = DecoderProcess()
    yield decoder
    decoder.close()
    assert decoder.pid is None


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("members", [sample(), sample((90, 60), 6), {**sample(), "jpg": FILES["gif"]}])
def test_the_child_prepares_what_this_process_would(decoder: DecoderProcess, members: dict[str, bytes]) -> None:
    options = replace(OPTIONS, labels=() if members["jpg"] == FILES["gif"] else OPTIONS.labels)
    prepared, expected = decoder.prepare(members, options), prepare_sample(members, options)
    np.testing.assert_array_equal(prepared.image, expected.image)
    np.testing.assert_array_equal(prepared.valid, expected.valid)
    for kind, label in expected.labels.items():
        assert prepared.labels[kind].dtype == label.dtype
        np.testing.assert_array_equal(prepared.labels[kind], label)
    assert replace(prepared, image=expected.image, labels=expected.labels) == expected


def test_errors_of_samples_keep_their_reason(decoder: DecoderProcess) -> None:
    for members, reason in (({**sample(), "seg.png": b""}, Reason.LABEL_UNDECODABLE), ({}, Reason.IMAGE_MISSING)):
        with pytest.raises(SampleError) as expected:
            prepare_sample(members, OPTIONS)
        with pytest.raises(SampleError) as caught:
            decoder.prepare(members, OPTIONS)
        assert (caught.value.reason, caught.value.detail) == (reason, expected.value.detail)


def test_large_members_and_results_pass_through(decoder: DecoderProcess) -> None:
    """More than a pipe holds, both ways."""
    members = {"jpg": FILES["jpeg"] + bytes(5_000_000)}
    prepared = decoder.prepare(members, DecodeOptions(Size(1500, 1700)))
    assert prepared.image.shape == (1500, 1700, 3)


def test_decoding_that_takes_too_long_fails_the_sample_and_no_other(decoder: DecoderProcess) -> None:
    decoder.prepare(sample(), OPTIONS)
    first = decoder.pid
    started = time.monotonic()
    with pytest.raises(SampleError, match=r"longer than decode_timeout = 0\.5 s; raise decode_timeout") as caught:
        decoder.prepare(SLOW, replace(IMAGE, decode_timeout=0.5))
    assert caught.value.reason is Reason.DECODE_TIMEOUT
    assert time.monotonic() - started < 5
    assert first is not None
    assert gone(first, 0)
    assert decoder.prepare(sample(), OPTIONS).image.shape == (32, 48, 3)
    assert decoder.pid != first


def test_a_crash_of_the_decoder_fails_the_sample_and_no_other(decoder: DecoderProcess) -> None:
    """Each child that decodes the sample is ended by the signal that a defect in a decoder raises."""
    decoder.prepare(sample(), OPTIONS)
    done = threading.Event()

    def crash() -> None:
        crashed: set[int] = set()
        while not done.wait(0.5):
            pid = decoder.pid
            if pid is not None and pid not in crashed:
                crashed.add(pid)
                os.kill(pid, signal.SIGSEGV)

    thread = threading.Thread(target=crash)
    thread.start()
    try:
        with pytest.raises(SampleError, match=r"the decoder crashed on it 2 times, its process .* SIGSEGV") as caught:
            decoder.prepare(SLOW, IMAGE)
    finally:
        done.set()
        thread.join()
    assert caught.value.reason is Reason.UNDECODABLE
    assert decoder.prepare(sample(), OPTIONS).image.shape == (32, 48, 3)


def test_a_child_that_died_meanwhile_costs_no_sample(decoder: DecoderProcess) -> None:
    decoder.prepare(sample(), OPTIONS)
    first = decoder.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert gone(first, 5)
    assert decoder.prepare(sample(), OPTIONS).image.shape == (32, 48, 3)
    assert decoder.pid != first


def test_an_interrupted_call_leaves_no_answer_for_the_next(decoder: DecoderProcess) -> None:
    decoder.prepare(sample(), OPTIONS)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            decoder.prepare(SLOW, IMAGE)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert decoder.prepare(sample(), OPTIONS).image.shape == (32, 48, 3)


def test_a_defect_of_the_program_is_raised_with_the_childs_traceback(decoder: DecoderProcess) -> None:
    members: dict[str, bytes] = {"jpg": "text"}  # type: ignore[dict-item]
    with pytest.raises(TypeError) as caught:
        decoder.prepare(members, IMAGE)
    assert "in prepare_sample" in "".join(caught.value.__notes__)
    assert decoder.prepare({"jpg": FILES["png"]}, IMAGE).decoder == "pillow"


@pytest.mark.parametrize(("python", "text"), [("/no/python", "FileNotFoundError"), ("/bin/false", "status 1 before")])
def test_a_child_that_cannot_start_is_a_fault_of_the_environment(python: str, text: str) -> None:
    with pytest.raises(EnvironmentFault, match=text):
        DecoderProcess(python).prepare({"jpg": FILES["png"]}, IMAGE)


PARENT = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from pipeline.decode.options import DecodeOptions
from pipeline.decode.worker import DecoderProcess
from pipeline.errors import SampleError
from pipeline.options import Size

decoder, options = DecoderProcess(), DecodeOptions(Size(8, 8), decode_timeout=float(sys.argv[2]))
image = open("image", "rb").read()
try:
    decoder.prepare({"jpg": b""}, options)
except SampleError:
    print(decoder.pid, flush=True)
if sys.argv[3] == "busy":
    threading.Timer(1, os._exit, [9]).start()
    decoder.prepare({"jpg": image}, options)
os._exit(9)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_child_ends_with_its_parent(state: str, tmp_path: Path) -> None:
    """The parent ends without a word; a child that decodes is ended by its own alarm."""
    (tmp_path / "image").write_bytes(many_scans(900, 9800))
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, str(ROOT), "2", state], cwd=tmp_path, stdout=subprocess.PIPE, timeout=60
    )
    assert parent.returncode == 9
    assert gone(int(parent.stdout), 5 if state == "idle" else 15)


def test_the_child_imports_decoding_modules_only() -> None:
    """It starts in a fraction of a second, and every loading process has one."""
    script = "import sys, pipeline.decode.worker; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stdout.split())
    assert modules.isdisjoint({"torch", "ray", "zarr", "pyarrow", "fsspec", "timm"})
    assert {name for name in modules if name.startswith("pipeline.") and name.count(".") == 1} == {
        "pipeline.child",
        "pipeline.decode",
        "pipeline.errors",
        "pipeline.options",
        "pipeline.redaction",
    }


def test_a_child_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    """It ended the whole job."""
    mark, python = tmp_path / "killed", tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ -e {mark} ] || {{ touch {mark}; kill -9 $$; }}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    decoder = DecoderProcess(str(python))
    try:
        assert decoder.prepare({"jpg": FILES["png"]}, IMAGE).image.shape == (8, 8, 3)
        assert mark.exists()
    finally:
        decoder.close()
