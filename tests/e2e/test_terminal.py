"""Jobs on a terminal: one live line, lines above it, and the terminal given back, whatever ends the job."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.e2e import support

COLUMNS = 100


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [support.good_sample(f"k{n:02d}", n) for n in range(12)]
    samples[5] = [("k05.jpg", b"no image"), samples[5][1]]
    members = [member for sample in samples for member in sample]
    return support.write_tar(tmp_path_factory.mktemp("shards") / "s.tar", members)


def on_terminal(*words: object, interrupt: str = "", status: int = 0) -> str:
    """What a job writes on a terminal of its own; Ctrl-C is typed once ``interrupt``, a pattern, is there."""
    driver, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    job = subprocess.Popen(
        [sys.executable, "-m", f"jobs.{words[0]}", *map(str, words[1:])],
        cwd=support.ROOT,
        env=support.environment() | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    data = b""
    try:
        while True:
            assert select.select([driver], [], [], 120)[0], f"silence for two minutes after {data[-2000:]!r}"
            try:
                piece = os.read(driver, 1 << 16)
            except OSError:  # the last process that had the terminal is gone
                break
            data += piece
            if interrupt and re.search(interrupt.encode(), data):
                job.send_signal(signal.SIGINT)
                interrupt = ""
        assert job.wait(timeout=30) == status, data[-4000:]
    finally:
        job.kill()
        job.wait()
        os.close(driver)
    return data.decode()


def frames(text: str) -> list[str]:
    """The live line as it was drawn, time after time."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [part.strip() for part in plain.split("\r") if part.startswith(("━", "╸", "╺"))]


def check_given_back(text: str) -> None:
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor stays hidden"


def test_the_main_job_and_verify_show_one_live_line(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("--shards", shards, "--out", out, *support.TINY, "--rows-per-shard", 1, "--max-failed-fraction", 0.5)
    text = on_terminal("precompute", *command)
    check_given_back(text)
    drawn = frames(text)
    assert re.search(r" 0/12 units  processes start and load the models, \d+ s$", drawn[0].partition("[20")[0])
    assert re.fullmatch(r"━+ 12/12 units  [\d.]+ samples/s  1 failed  0 s left", drawn[-1].splitlines()[0]), drawn[-1]
    assert all(len(frame.splitlines()[0].partition("[20")[0]) <= COLUMNS for frame in drawn)
    # What comes after the work stands below, as it does in a log.
    assert text.index("12/12 units") < text.index("\ninput 12 = ok 11 + failed 1")
    text = on_terminal("verify", out)
    check_given_back(text)
    assert re.fullmatch(r"━+ 12/12 units  0 problems  [\d.]+ units/s  0 s left", frames(text)[-1].splitlines()[0])
    assert "clean: " in text


def test_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    # Many units: the line is drawn four times a second, and shows not every one.
    members = [member for n in range(200) for member in support.good_sample(f"k{n:03d}", n)]
    shards = support.write_tar(tmp_path / "s.tar", members)
    command = ("--shards", shards, "--out", tmp_path / "out", *support.TINY, "--rows-per-shard", 1)
    text = on_terminal("precompute", *command, interrupt=r" [1-9]\d*/200 units", status=130)
    check_given_back(text)
    # Ray may say in between that the actor was ended.
    after = text[text.rindex("\x1b[?25h") :]
    assert re.search(
        r"(?:\x1b\[\?25h|\n)precompute: stopped: \d+ of 200 units done; the same command goes on\r\n", after
    )


def test_training_shows_its_steps(shards: Path, tmp_path: Path) -> None:
    words = ("--backbone", "test_vit", "--pretrained", "false", "--size", "32x48", "--stride", 16, "--steps", 12)
    words = (*words, "--jitters", 1, "--evaluate-every", 6, "--object-store-mb", 100, "--max-failed-fraction", 0.5)
    text = on_terminal("train", "--shards", shards, "--out", tmp_path / "out", *words)
    check_given_back(text)
    last = frames(text)[-1].splitlines()[0]
    assert re.fullmatch(r"━+ 12/12 steps  loss -?[\d.]+  [\d.]+ steps/s  0 s left", last), last
    assert "step 12  held-out loss " in text
    assert "steps/s  0 s gone" not in text, "the lines of a log"
