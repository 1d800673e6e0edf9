import io
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.progress import Progress
from pipeline.console import human_bytes, human_seconds
from pipeline.inputs.plan import UnitKey
from pipeline.progress import CountProgress
from pipeline.store.ledger import Receipt, SampleRecord


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def receipt_of(unit: int, ok: int, failed: int = 0, size: int = 0, error: str = "") -> Receipt:
    records = [SampleRecord(str(n), n, "ok" if n < ok else "failed") for n in range(ok + failed)]
    return Receipt(
        UnitKey(unit, 0, 0, ok + failed, 0), "plan", tuple(records), sizes={"encode_write": size}, error=error
    )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (999.6, "1.0 kB"), (1000, "1.0 kB"), (1500, "1.5 kB"),
        (999_949, "999.9 kB"), (999_951, "1.0 MB"), (2_340_000_000, "2.3 GB"), (5e12, "5.0 TB"), (1.25e15, "1.2 PB"),
        (5e18, "5000.0 PB"),
    ],
)  # fmt: skip
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@given(st.floats(0, 9e17))
def test_bytes_for_people_are_right_to_their_last_digit(count: float) -> None:
    number, unit = human_bytes(count).split()
    scale = 1000 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(number) < 1000
    assert abs(float(number) * scale - count) <= (0.5 if unit == "B" else 0.05) * scale * (1 + 1e-9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (12.4, "12 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"), (360_000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_counts_of_all_kinds() -> None:
    progress = Progress(units=4, samples=20, stream=io.StringIO())
    progress.add(receipt_of(0, ok=5, size=1000))
    progress.add(receipt_of(1, ok=3, failed=2, size=500))
    progress.add(receipt_of(2, ok=0, failed=5, error="out of memory"))
    assert (progress.done, progress.failed_units) == (3, 1)
    assert (progress.done_samples, progress.failed_samples, progress.bytes) == (15, 7, 1500)
    line = progress.line(now=0.0)
    assert line.startswith("3/4 units  15/20 samples  ")
    assert "  7 samples failed, 1 units failed  " in line


def test_the_time_left_follows_from_the_pace_since_the_first_unit() -> None:
    clock = Clock()
    progress = Progress(units=5, samples=50, stream=io.StringIO(), clock=clock)
    clock.now += 30
    assert progress.line(clock.now).endswith(
        "0/50 samples  0.0 samples/s  0 B/s  0 samples failed  30 s gone, unknown left"
    )
    clock.now += 20
    progress.add(receipt_of(0, ok=10, size=10_000))
    # One unit tells no pace but that of the whole time: 10 samples in 50 s, 40 to go.
    assert progress.line(clock.now).endswith("  0.2 samples/s  200 B/s  0 samples failed  50 s gone, 3 min 20 s left")
    clock.now += 10
    progress.add(receipt_of(1, ok=20, size=2000))
    # 20 samples in the 10 s since the first unit, 20 to go; the bytes are those of the whole time.
    assert progress.line(clock.now).endswith("  2.0 samples/s  200 B/s  0 samples failed  1 min 00 s gone, 10 s left")
    clock.now += 10
    progress.add(receipt_of(2, ok=20))
    assert progress.line(clock.now).endswith(" 1 min 10 s gone, 0 s left")


def lines_of(stream: io.StringIO, every: float, waits: list[float]) -> str:
    """What a run of as many units as there are waits, in seconds, prints."""
    clock = Clock()
    progress = Progress(units=len(waits), samples=len(waits), stream=stream, every=every, clock=clock)
    for unit, wait in enumerate(waits):
        clock.now += wait
        progress.add(receipt_of(unit, ok=1))
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    text = lines_of(io.StringIO(), 10, [4, 4, 4, 4, 8, 1])
    assert [line[:9] for line in text.splitlines()] == ["3/6 units", "5/6 units", "6/6 units"]
    assert text.endswith("\n")
    assert not re.search(r"[\r\x1b]", text)


def test_a_terminal_gets_one_live_line_and_what_is_printed_goes_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    with Progress(2, 10) as progress:
        progress.add(receipt_of(0, ok=4, failed=1))
        print("unit 1 failed: [/] disk full")  # no markup of rich
        progress.add(receipt_of(1, ok=0, failed=5, error="disk full"))
    text = stream.getvalue()
    hidden, shown = text.rindex("\x1b[?25l"), text.rindex("\x1b[?25h")
    assert hidden < shown, "the cursor is back"
    assert re.search(r"\x1b\[2K[^\n]*unit 1 failed: \[/\] disk full\n", text), "above, on a line that was cleared"
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).rstrip("\n").split("\r")[-1]
    assert re.fullmatch(r"\S+ 2/2 units  [\d.]+ samples/s  6 failed, 1 units  0 s left\s*", last), last


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_terminal_that_cannot_draw_gets_the_lines_of_a_log(term: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERM", raising=False)
    if term:
        monkeypatch.setenv("TERM", term)
    text = lines_of(Terminal(), 10, [4, 4, 4, 4, 8, 1])
    assert [line[:9] for line in text.splitlines()] == ["3/6 units", "5/6 units", "6/6 units"]
    assert not re.search(r"[\r\x1b]", text)


def test_a_narrow_terminal_gets_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress(2, 10, stream) as progress:
        progress.add(receipt_of(0, ok=5))
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split("\r")
    assert all(len(frame.strip("\n")) <= 40 for frame in frames)
    assert stream.getvalue().count("\n") == 1


def test_what_is_counted_has_its_pace_without_what_was_done_before() -> None:
    clock, log = Clock(), io.StringIO()
    progress = CountProgress(100, "steps", log, clock=clock, before=50)
    clock.now += 10
    progress.reach(70, "loss 0.5")
    assert log.getvalue() == "70/100 steps  loss 0.5  2.0 steps/s  10 s gone, 15 s left\n"
    clock.now += 40
    progress.tick()
    assert log.getvalue().splitlines()[-1].endswith("; the last of the steps came 40 s ago")
    assert progress.short(clock.now) == "70/100 steps  loss 0.5  0.4 steps/s  1 min 15 s left"


def test_a_line_comes_every_half_minute_also_where_nothing_else_comes() -> None:
    now, log = [0.0], io.StringIO()
    progress = Progress(5, 10, log, clock=lambda: now[0])
    for second in range(1, 71):
        now[0] = float(second)
        progress.tick()
    first = log.getvalue().splitlines()
    assert len(first) == 2
    assert all("0/5 units" in line and "waiting for the first unit" in line for line in first)
    progress.add(receipt_of(0, 2))
    now[0] = 200.0
    progress.tick()
    assert "waiting for a unit, the last one came 2 min 10 s ago" in log.getvalue().splitlines()[-1]
    lines = len(log.getvalue().splitlines())
    progress.tick()
    assert len(log.getvalue().splitlines()) == lines, "a line was printed just now"


def test_the_thread_that_prints_ends_with_the_run() -> None:
    log = io.StringIO()
    with Progress(2, 4, log, silence=0.05) as progress:
        threading.Event().wait(0.5)
        assert "waiting for the first unit" in log.getvalue()
        progress.add(receipt_of(0, 2))
        progress.add(receipt_of(1, 2))
        done = log.getvalue()
        threading.Event().wait(0.3)
    assert log.getvalue() == done, "nothing is waited for when all is done"
    assert "progress" not in [thread.name for thread in threading.enumerate()]
