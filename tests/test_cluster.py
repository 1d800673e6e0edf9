"""cluster.yaml, held against Ray's own schema and commands, this repository's files and the job's options."""

import logging
import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from pipeline.config.parser import parse_args
from pipeline.config.precompute import PrecomputeConfig
from pipeline.inputs.storage import is_local

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
CLUSTER: dict[str, Any] = yaml.safe_load(TEXT)
TYPES: dict[str, dict[str, Any]] = CLUSTER["available_node_types"]
WORKERS = {name: kind for name, kind in TYPES.items() if name != CLUSTER["head_node_type"]}


def commented_commands() -> list[list[str]]:
    """The commands in the comments, as words; a line of a command is indented by three spaces or more."""
    lines = re.findall(r"^#   +(.*)$", TEXT, re.M)
    commands = "\n".join(lines).replace("\\\n", " ").split("\n")
    return [shlex.split(command) for command in commands if command.startswith("ray ")]


def jobs() -> list[tuple[list[str], list[str]]]:
    """(words before ``--``, words after) of every job submitted in the comments."""
    submits = [words for words in commented_commands() if words[:3] == ["ray", "job", "submit"]]
    return [(words[3 : words.index("--")], words[words.index("--") + 1 :]) for words in submits]


def precompute_config() -> PrecomputeConfig:
    (words,) = [after for _, after in jobs() if "jobs.precompute" in after]
    assert words[:3] == ["python", "-m", "jobs.precompute"]
    argv = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words[3:]]
    config, _ = parse_args(PrecomputeConfig, argv, description="")
    return config


def test_ray_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepared = prepare_config(deepcopy(CLUSTER))
        validate_config(prepared)
    assert not caplog.records
    assert prepared["available_node_types"]["head"]["max_workers"] == 0, "the head's type must not serve as a worker"
    # What the file says must not have been replaced by Ray's defaults, which install a nightly Ray.
    for name in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "file_mounts"):
        assert prepared[name] == CLUSTER[name]
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == CLUSTER["setup_commands"]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("idle_timeout_minute", 5, "Additional properties"),
        ("head_node_type", "haed", "must be one of"),
        ("max_workers", "8", "is not of type 'integer'"),
    ],
)
def test_ray_would_refuse_a_slip(name: str, value: object, error: str) -> None:
    with pytest.raises(Exception, match=error):
        validate_config({**prepare_config(deepcopy(CLUSTER)), name: value})


def test_the_head_has_cpus_only_and_gpu_machines_start_from_none() -> None:
    head = TYPES[CLUSTER["head_node_type"]]
    assert head["resources"]["CPU"] >= 1
    assert not head["resources"].get("GPU")
    assert "InstanceMarketOptions" not in head["node_config"], "the driver must not be taken away"
    assert WORKERS
    for kind in WORKERS.values():
        assert kind["resources"]["GPU"] >= 1
        assert kind["min_workers"] == 0 < kind["max_workers"] <= CLUSTER["max_workers"]
        assert kind["node_config"]["IamInstanceProfile"], "by itself Ray gives only the head a role that may read S3"


def test_setup_names_only_files_of_the_repository() -> None:
    every: dict[str, str] = CLUSTER["file_mounts"]
    mounts = {remote: local for remote, local in every.items() if not local.startswith("~")}
    for remote, local in mounts.items():
        assert (ROOT / local).exists(), f"{local} is not in the repository"
        assert Path(remote).name == Path(local).name
    (folder,) = {str(Path(remote).parent) for remote in mounts}
    (install,) = [command for command in CLUSTER["setup_commands"] if "[make,gpu,s3]" in command]
    words = shlex.split(install)
    assert words[:2] == ["cd", folder]
    assert words[words.index("-c") + 1] in mounts.values()
    project = re.search(r'readme = "(.*)"\n(?:.*\n)*license-files = \["(.*)"\]', (ROOT / "pyproject.toml").read_text())
    assert project
    assert {"pyproject.toml", *project.groups()} <= set(mounts.values()), "pip cannot build the project without them"
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(mounts.values())


def test_the_extras_it_installs_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    wanted = re.findall(r"'\.\[(.*?)\]'", " ".join(CLUSTER["setup_commands"]))
    assert wanted == ["make,gpu,s3"]
    for extra in wanted[0].split(","):
        assert re.search(rf"^{extra} = \[", extras, re.M), f"pyproject.toml has no extra {extra}"


def test_the_torch_pinned_is_not_a_cpu_build() -> None:
    pins = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert len(pins) == 1
    assert "+" not in pins[0], f"torch=={pins[0]} would put a CPU build on GPU machines"


def _options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def test_the_ray_commands_exist_with_their_options() -> None:
    commands = commented_commands()
    assert [words[1] for words in commands] == ["get-auth-token", "up", "dashboard", "job", "job", "down"]
    for words in commands:
        assert words[1] in cli.commands
        if words[1] in ("up", "dashboard", "down"):
            assert words[2:] == ["cluster.yaml"]
    assert set(commands[0][2:]) <= _options(cli.commands["get-auth-token"])
    submit = cli.commands["job"].commands["submit"]
    for before, _ in jobs():
        assert {word for word in before if word.startswith("-")} <= _options(submit)
    starts = [c for name in ("head", "worker") for c in CLUSTER[f"{name}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for start in starts:
        used = set(re.findall(r"(--[\w-]+)", start))
        assert used <= _options(cli.commands["start"])
        assert "--object-store-memory" in used


def test_all_sides_use_the_token() -> None:
    token = "~/.ray/auth_token"
    assert CLUSTER["file_mounts"][token] == token, "where Ray looks for it by itself"
    starts = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    assert sum("RAY_AUTH_MODE=token ray start" in command for command in starts) == 2
    assert re.search(r"^#   export RAY_ADDRESS=http://\S+ RAY_AUTH_MODE=token$", TEXT, re.M)


def test_the_job_in_the_comments_is_one_the_cluster_can_run() -> None:
    config = precompute_config()
    assert not any(is_local(url) for url in (*config.shards, config.out)), "no two machines share a disk"
    assert config.gpus_per_actor, "without a GPU in the cluster yet, the job would choose CPUs"
    gpus = sum(kind["max_workers"] * kind["resources"]["GPU"] for kind in WORKERS.values())
    assert config.actors * config.gpus_per_actor <= gpus


def test_the_jobs_in_the_comments_exist() -> None:
    modules = [after[after.index("-m") + 1] for _, after in jobs()]
    assert modules == ["jobs.precompute", "jobs.verify"]
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)
    (out,) = [after[-1] for _, after in jobs() if "jobs.verify" in after]
    assert out == precompute_config().out
