"""The command ``featup`` and what the jobs share: help, exit status, errors in one line."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from jobs import CommandParser, at_least, exit_status
from jobs.cli import COMMANDS, main
from pipeline.errors import StoreError

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment()
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_help_lists_every_command_with_the_first_line_of_its_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        module = import_module(f"jobs.{name}")
        assert f"  {name:<12} {(module.__doc__ or '').splitlines()[0]}\n" in text
    assert main([]) == 2


def test_every_job_is_a_command() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "cli"}
    assert jobs == set(COMMANDS)


def test_an_unknown_command_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precomput"]) == 2
    assert capsys.readouterr().err == "featup: error: unknown command 'precomput', did you mean 'precompute'?\n"
    assert main(["zzz"]) == 2
    assert "choose one of precompute, " in capsys.readouterr().err


def test_dashes_in_a_command_are_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train-probe", "--help"])
    assert "Fit a linear probe" in capsys.readouterr().out


def test_the_older_name_of_train_does_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "train-jbu"):
        with pytest.raises(SystemExit, match="2"):
            main([name, "--steps", "0", "--shards", "a.tar", "--out", "o"])
        assert "train: error: steps=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_needs_neither_torch_nor_ray(words: list[str]) -> None:
    code = f"""
import sys
from jobs.cli import main
try:
    main({words!r})
except SystemExit:
    pass
heavy = {{"torch", "ray", "timm", "numba", "zarr"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


def test_help_comes_within_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run("from jobs.cli import main; main(['--help'])")
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


def test_errors_of_the_project_and_of_files_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> bool:
        raise StoreError("no store at s3://id:secret@bucket/out")

    def unreadable() -> bool:
        return bool(Path("/nonexistent/file").read_bytes())

    assert exit_status("verify", broken) == 1
    text = capsys.readouterr().err
    assert text.startswith("verify: StoreError: no store at ")
    assert "secret" not in text
    assert exit_status("verify", unreadable) == 1
    assert capsys.readouterr().err.startswith("verify: FileNotFoundError: [Errno 2] No such file or directory: ")
    assert exit_status("verify", lambda: True) == 0
    assert exit_status("verify", lambda: False) == 1


@pytest.mark.parametrize(
    ("package", "extra"), [("timm_of_nobody", "make"), ("skimage.nothing", "demo"), ("s3fs.nothing", "s3")]
)
def test_a_missing_package_names_the_extra(package: str, extra: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("demo", lambda: bool(import_module(package))) == 1
    root = package.partition(".")[0]
    expected = f"demo: the package {root!r} is not installed; pip install 'featup-datasets[{extra}]'\n"
    assert capsys.readouterr().err == expected


def test_a_missing_module_of_this_project_is_a_fault_of_it() -> None:
    with pytest.raises(ModuleNotFoundError):
        exit_status("demo", lambda: bool(import_module("pipeline.nothing")))


def test_ctrl_c_ends_with_130_and_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> bool:
        stop = KeyboardInterrupt()
        stop.add_note("2 of 15 units done; the same command goes on")
        raise stop

    assert exit_status("precompute", interrupted) == 130
    assert capsys.readouterr().err == "precompute: stopped: 2 of 15 units done; the same command goes on\n"


def test_sigterm_ends_with_143_and_closes_what_is_open() -> None:
    code = """
import sys, time
from jobs import exit_status
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)
sys.exit(exit_status("precompute", work))
"""
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert (job.returncode, out, err) == (143, "closed\n", "precompute: stopped\n")


def test_a_parser_without_a_config_errs_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser("verify", "Verify.")
    parser.add_argument("--check-source", type=at_least(0))
    for words, text in (
        (["--check-sorce", "1"], "unknown option '--check-sorce', did you mean '--check-source'?"),
        (["--check-source", "-1"], "argument --check-source: '-1' must be a whole number, at least 0"),
        (["more"], "unrecognized arguments: more"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        assert capsys.readouterr().err == f"python -m jobs.verify: error: {text} (--help lists the options)\n"


def test_letters_that_a_log_cannot_show_end_no_job() -> None:
    """It ended with UnicodeEncodeError before any work, for the name of a shard that was missing."""
    code = (
        "import sys; from jobs import exit_status; sys.exit(exit_status('verify', lambda: not print('train-é日.tar')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment() | {"PYTHONIOENCODING": "ascii"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"train-\\xe9\\u65e5.tar\n")
