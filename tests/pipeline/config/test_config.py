import dataclasses
import inspect
import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from featup.upsamplers import Bilateral
from pipeline.config.base import describe, read_config
from pipeline.config.bilateral import BilateralOptions
from pipeline.config.parser import parse_args
from pipeline.config.precompute import PrecomputeConfig
from pipeline.errors import ConfigError, StoreFormatError
from pipeline.options import Size

NEEDED = ["--shards", "a.tar", "--out", "out"]
FIELDS = {one.name: one for one in dataclasses.fields(PrecomputeConfig)}

# Every option with a value that is not its default; together they are a config that passes the checks.
OTHER: dict[str, Any] = {
    "shards": (),
    "images": ("photographs", "s3://bucket/list.csv"),
    "every": 3,
    "image_column": "photo",
    "label_dir": ("seg=masks", "cls=s3://bucket/classes"),
    "out": "s3://bucket/out",
    "image_exts": ("png", "webp"),
    "labels": ("seg", "cls"),
    "size": Size(352, 480),
    "geometry": "pad",
    "max_pixels": 1000,
    "max_bytes": 2000,
    "decode_timeout": 1.5,
    "missing_label": "keep",
    "seg_dtype": "uint16",
    "label_orientation": "stored",
    "depth_png_scale": 0.25,
    "depth_npy_scale": 2.0,
    "limit": 7,
    "backbone": "resnet50",
    "weights": "/w/resnet50.safetensors",
    "pretrained": False,
    "layer": 2,
    "stride": None,
    "norm": "layer",
    "backbone_kwargs": {"drop_path_rate": 0.5},
    "mean": (0.5, 0.25, 0.125),
    "std": (0.5, 0.5, 0.25),
    "precision": "bfloat16",
    "upsampler": "jbu",
    "checkpoint": "jbu.safetensors",
    "output_size": Size(176, 240),
    "sigma_space": 3.0,
    "sigma_colour": 0.5,
    "sigma_feature": 0.5,
    "feature_components": 4,
    "same_resolution_stages": 2,
    "sigma_coarse": 0.75,
    "views": 5,
    "view_base": "anyup",
    "held_out_views": 2,
    "view_max_pad": 9,
    "view_flips": False,
    "back_projection": False,
    "implicit_preset": "paper",
    "fit_views": 5,
    "fit_steps": 7,
    "fit_step_views": 2,
    "fit_tokens": 64,
    "fit_positions": 8,
    "fit_lr": 0.5,
    "fit_lr_decay": True,
    "fit_warm_start": True,
    "fit_components": 9,
    "fit_frequencies": 11,
    "fit_lowest": -1.5,
    "fit_highest": 4.0,
    "fit_dropout": 0.25,
    "fit_kernel": 13,
    "fit_magnitude": 0.5,
    "fit_total_variation": 0.125,
    "fit_blur_pin": 0.75,
    "fit_max_pad": 12,
    "fit_max_zoom": 2.5,
    "fit_zoom_share": 0.25,
    "fit_flip": False,
    "fit_seed": 3,
    "pca": 16,
    "pca_images": 8,
    "pca_from": None,
    "store_image": False,
    "mantissa_bits": 6,
    "tile": 44,
    "rows_per_shard": 4,
    "codec": "zstd",
    "compression_level": 3,
    "actors": 2,
    "gpus_per_actor": 0.5,
    "cpus_per_actor": 2.0,
    "loader_cpus": 0.25,
    "threads": 3,
    "batch_size": 4,
    "max_failed_fraction": 0.5,
    "unit_attempts": 1,
    "object_store_mb": 128,
    "retry_failed": ("undecodable", "decode_timeout"),
    "resource_timeout": 5.0,
    "recheck_share": 0.5,
}


def config(**options: Any) -> PrecomputeConfig:
    return PrecomputeConfig(**{"shards": ("a.tar",), "out": "out", **options})


def parse(*argv: str) -> PrecomputeConfig:
    return parse_args(PrecomputeConfig, argv, description="test")[0]


def refused(*argv: str) -> str:
    """What is said on stderr as the program ends, with spaces for line ends."""
    stream = io.StringIO()
    with redirect_stderr(stream), pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return " ".join(stream.getvalue().partition("error:")[2].split())


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_other_values_are_other_values_of_every_option() -> None:
    assert OTHER.keys() == FIELDS.keys()
    assert [name for name, value in OTHER.items() if value == FIELDS[name].default] == ["shards", "stride", "pca_from"]


def words(name: str, value: object) -> list[str]:
    text = [str(one) for one in value] if isinstance(value, tuple) and not isinstance(value, Size) else [str(value)]
    if isinstance(value, dict):
        text = [json.dumps(value)]
    return [f"--{name}", *(text if not isinstance(value, bool) else [str(value).lower()])]


@pytest.mark.parametrize("sign", ["_", "-"], ids=["underscores", "dashes"])
def test_every_option_can_be_given_on_the_command_line(sign: str) -> None:
    argv = [word for name, v in OTHER.items() if v not in (None, ()) for word in words(name.replace("_", sign), v)]
    assert parse(*argv) == PrecomputeConfig(**OTHER)


def test_an_option_and_its_value_may_be_one_word() -> None:
    found = parse(*NEEDED, "--batch-size=3", "--sigma_space=1.5", "--out=a-b_c/d-e_f")
    assert (found.batch_size, found.sigma_space, found.out) == (3, 1.5, "a-b_c/d-e_f")


def test_a_config_written_as_yaml_reads_back(recipe: Path) -> None:
    for wanted in (PrecomputeConfig(**OTHER), config()):
        recipe.write_text(yaml.safe_dump(describe(wanted), sort_keys=False))
        assert parse("--config", str(recipe)) == wanted


def test_the_later_of_file_and_command_line_wins(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("batch_size: 3\nlabels: [seg, depth]\nsize: 64x96\nthreads: 2\nshards: [b.tar]\nout: from_file\n")
    after = parse("--config", str(recipe), *NEEDED, "--batch-size", "5", "--labels", "cls")
    assert (after.batch_size, after.labels, after.size, after.threads) == (5, ("cls",), Size(64, 96), 2)
    assert (after.shards, after.out) == (("a.tar",), "out")
    before = parse(*NEEDED, "--batch-size", "5", "--labels", "cls", "--tile", "8", "--config", str(recipe))
    assert (before.batch_size, before.labels, before.tile, before.out) == (3, ("seg", "depth"), 8, "from_file")
    second = tmp_path / "second.yaml"
    second.write_text("batch_size: 4\n")
    both = parse("--config", str(recipe), "--config", str(second))
    assert (both.batch_size, both.labels) == (4, ("seg", "depth"))
    assert parse("--config", str(recipe), "--threads", "null").threads is None


def test_one_word_in_a_file_is_a_list_of_one(recipe: Path) -> None:
    recipe.write_text("shards: train.tar\nlabels: seg\nout: o\nsize: 224\noutput_size: [64, 96]\n")
    found = parse("--config", str(recipe))
    assert (found.shards, found.labels) == (("train.tar",), ("seg",))
    assert (found.size, found.output_size) == (Size(224, 224), Size(64, 96))


def test_a_tilde_in_a_file_is_the_home_folder(recipe: Path) -> None:
    """Paths from a file do not pass through a shell, which would replace it."""
    home = os.path.expanduser("~")
    recipe.write_text(
        "shards: [~/a.tar, s3://b/~c.tar]\nout: ~/out\nweights: ~/w.pth\nupsampler: jbu\ncheckpoint: ~/j.safetensors\n"
        "pca_from: ~/train\n"
    )
    found = parse("--config", str(recipe))
    assert found.shards == (f"{home}/a.tar", "s3://b/~c.tar")
    assert (found.out, found.weights, found.checkpoint, found.pca_from) == (
        f"{home}/out", f"{home}/w.pth", f"{home}/j.safetensors", f"{home}/train",
    )  # fmt: skip
    assert "there is no such home folder" in refused(*NEEDED[:2], "--out", "~nobody-here/out")


def test_failed_samples_are_retried_for_all_reasons_or_those_that_are_named(recipe: Path) -> None:
    assert parse(*NEEDED).retry_failed is None
    assert parse(*NEEDED, "--retry-failed").retry_failed == ()
    assert parse(*NEEDED, "--retry-failed", "truncated", "too_large").retry_failed == ("truncated", "too_large")
    recipe.write_text("retry_failed: []\n")
    assert parse(*NEEDED, "--config", str(recipe)).retry_failed == ()
    text = refused(*NEEDED, "--retry-failed", "rotten")
    assert "retry_failed=('rotten',) must be reasons that samples fail for: image_missing, undecodable," in text


def test_an_error_is_one_line() -> None:
    stream = io.StringIO()
    with redirect_stderr(stream), pytest.raises(SystemExit):
        parse_args(PrecomputeConfig, [*NEEDED, "--batch-sise", "3"], description="test", prog="featup precompute")
    assert stream.getvalue() == (
        "featup precompute: error: unknown option 'batch_sise', did you mean 'batch_size'? (--help lists the options)\n"
    )


def test_the_help_has_groups_ranges_and_the_examples_as_they_are_written() -> None:
    stream = io.StringIO()
    with redirect_stdout(stream), pytest.raises(SystemExit) as caught:
        parse_args(PrecomputeConfig, ["--help"], description="One line.\n\nfeatup a --b\nfeatup c", prog="featup a")
    assert caught.value.code == 0
    text = stream.getvalue()
    assert "\nOne line.\n\nfeatup a --b\nfeatup c\n" in text
    titles = ["input and output", "backbone", "decoding and labels", "upsampler", "store", "run: how the job runs"]
    places = [text.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    assert all(f"--{name} " in text for name in FIELDS)
    assert "of zstd; between 1 and 9 (default: 1)" in " ".join(text.split())


def test_extra_arguments_are_not_part_of_the_config() -> None:
    found, namespace = parse_args(
        PrecomputeConfig,
        [*NEEDED, "--dry-run"],
        description="test",
        extra=lambda parser: parser.add_argument("--dry_run", action="store_true"),
    )
    assert namespace.dry_run is True
    assert found == config()


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("batch-sise", "batch_size"), ("label", "labels"), ("batchsize", "batch_size"), ("upsample", "upsampler")],
)
def test_unknown_options_are_refused_with_the_nearest_name(typo: str, nearest: str, recipe: Path) -> None:
    unknown = typo.replace("-", "_")
    assert f"unknown option '{unknown}', did you mean '{nearest}'?" in refused(*NEEDED, f"--{typo}", "3")
    recipe.write_text(f"{unknown}: 3\n")
    assert f"unknown option '{unknown}', did you mean '{nearest}'?" in refused(*NEEDED, "--config", str(recipe))


def test_dashes_in_a_file_are_refused_with_the_name_that_is_meant(recipe: Path) -> None:
    recipe.write_text("batch-size: 3\n")
    assert "unknown option 'batch-size', did you mean 'batch_size'?" in refused(*NEEDED, "--config", str(recipe))


def test_an_unknown_option_like_no_other_is_refused_without_a_guess(recipe: Path) -> None:
    recipe.write_text("zzz: 3\n")
    for argv in (["--zzz", "3"], ["--config", str(recipe)]):
        text = refused(*NEEDED, *argv)
        assert "unknown option 'zzz'" in text
        assert "did you mean" not in text


def test_beginnings_of_names_are_refused() -> None:
    assert "unknown option 'batch', did you mean 'batch_size'?" in refused(*NEEDED, "--batch", "3")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "out"),
        (("--shards", "a.tar"), "out"),
        (("--out", "out"), "give tars by --shards, or a folder or list by --images, and not both"),
        ((*NEEDED, "--images", "photographs"), "and not both"),
        ((*NEEDED, "--labels", "seg", "--label-dir", "seg=masks"), "goes with --images; in tars labels lie beside"),
        (("--out", "o", "--images", "p", "--label-dir", "seg=masks"), "must be KIND=FOLDER, KIND one of --labels"),
        ((*NEEDED, "--batch-size", "many"), "batch_size=many must be a whole number"),
        ((*NEEDED, "--actors", "all"), "actors=all must be a whole number or auto"),
        ((*NEEDED, "--limit", "1.5"), "limit=1.5 must be a whole number"),
        ((*NEEDED, "--geometry", "stretch"), "geometry=stretch must be one of squash, center_crop, pad"),
        ((*NEEDED, "--labels", "seg", "boxes"), "labels"),
        ((*NEEDED, "--size", "224by224"), "a size is HEIGHTxWIDTH, such as 352x480, or one number for a square"),
        ((*NEEDED, "--mean", "0.5", "0.5"), "mean"),
        ((*NEEDED, "--config", "/none.yaml"), "/none.yaml"),
        ((*NEEDED, "--limit", "0"), "limit=0 must be at least 1"),
    ],
)
def test_values_that_cannot_be_are_refused(argv: tuple[str, ...], text: str) -> None:
    assert text in refused(*argv)


def test_checks_apply_to_files_too(recipe: Path) -> None:
    recipe.write_text("mean: [0.5, 2]\npca: 0\n")
    assert "pca=0 must be at least 1" in refused(*NEEDED, "--config", str(recipe), "--mean", "1", "1", "1")
    assert "mean=(0.5, 2.0) must be 3 numbers; pca=0 must be at least 1" in refused(*NEEDED, "--config", str(recipe))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().limit = 3  # type: ignore[misc]


def test_the_size_of_the_features_is_that_of_the_image_unless_told() -> None:
    assert config(size=Size(3, 5)).target_size == Size(3, 5)
    assert config(size=Size(3, 5), output_size=Size(7, 2)).target_size == Size(7, 2)


def test_identity_is_what_decides_the_content() -> None:
    whole = config().identity()
    runs = {name for name in FIELDS if name not in whole}
    assert runs == {
        "shards", "images", "every", "image_column", "label_dir", "out", "weights", "checkpoint", "actors",
        "gpus_per_actor", "cpus_per_actor", "loader_cpus", "threads", "batch_size", "max_failed_fraction",
        "unit_attempts", "object_store_mb", "pca_from", "max_bytes", "decode_timeout", "retry_failed",
        "resource_timeout", "recheck_share",
    }  # fmt: skip
    base = describe(PrecomputeConfig(**OTHER))
    for name, value in OTHER.items():
        # These cannot change alone.
        if name in ("shards", "labels", "label_dir", "upsampler", "checkpoint", "stride", "pca_from", "codec"):
            continue
        default = FIELDS[name].default if FIELDS[name].default is not dataclasses.MISSING else {}
        if name in ("images", "out"):
            default = (*value, "more") if isinstance(value, tuple) else value + "more"
        other = PrecomputeConfig(**{**OTHER, name: default})
        assert (other.identity() == PrecomputeConfig(**OTHER).identity()) == (name in runs), name
        assert describe(other) != base, name


def test_local_paths_become_absolute_and_urls_stay() -> None:
    here = os.getcwd()
    found = config(
        shards=("a/{0..3}.tar", "/b.tar", "s3://c/d.tar", "file:e.tar", "file:///f.tar"),
        out="../out",
        weights="w.pth",
        upsampler="jbu",
        checkpoint="memory://c",
        pca_from="train",
    ).absolute(on_cluster=False)
    shards = (f"{here}/a/{{0..3}}.tar", "/b.tar", "s3://c/d.tar", f"{here}/e.tar", "file:///f.tar")
    assert found.shards == shards
    assert (found.out, found.weights) == (f"{os.path.dirname(here)}/out", f"{here}/w.pth")
    assert (found.checkpoint, found.pca_from) == ("memory://c", f"{here}/train")
    assert config(out="/o", shards=("/a",)).absolute(on_cluster=True).weights is None


def test_relative_paths_are_refused_on_a_cluster() -> None:
    text = r"relative paths on a cluster: \['out', 'w\.pth', 'a\.tar'\]; .* give absolute paths or URLs that every node"
    with pytest.raises(ConfigError, match=text):
        config(shards=("a.tar", "s3://b/c.tar"), weights="w.pth").absolute(on_cluster=True)


CHOICES = {name: get_args(hint) for name, hint in get_type_hints(PrecomputeConfig).items()}
PATHS = st.text(min_size=1).filter(lambda path: "~" not in path)
SIZES = st.builds(Size, st.integers(1, 4000), st.integers(1, 4000))
COLOURS = st.none() | st.tuples(*[st.floats(0.01, 1)] * 3)
CONFIGS = st.builds(
    config,
    shards=st.lists(PATHS, min_size=1).map(tuple),
    out=PATHS,
    image_exts=st.lists(st.text("abc", min_size=1), min_size=1).map(tuple),
    labels=st.lists(st.sampled_from(["seg", "depth", "cls"]), unique=True).map(tuple),
    size=SIZES,
    output_size=st.none() | SIZES,
    geometry=st.sampled_from(CHOICES["geometry"]),
    weights=st.none() | PATHS,
    backbone_kwargs=st.dictionaries(st.text("ab", min_size=1), st.integers() | st.booleans() | st.text()),
    mean=COLOURS,
    std=COLOURS,
    stride=st.none() | st.integers(1, 32),
    sigma_space=st.floats(0.01, 100),
    pca=st.none() | st.integers(1, 512),
    gpus_per_actor=st.none() | st.floats(0, 1) | st.integers(2, 8).map(float),
)


@given(CONFIGS)
def test_plain_values_read_back(wanted: PrecomputeConfig) -> None:
    plain = describe(wanted)
    assert list(plain) == list(FIELDS)
    assert read_config(PrecomputeConfig, json.loads(json.dumps(plain))) == wanted
    assert read_config(PrecomputeConfig, yaml.safe_load(yaml.safe_dump(plain))) == wanted


def test_options_that_are_not_stored_have_their_defaults() -> None:
    plain = describe(config(batch_size=3))
    del plain["max_bytes"], plain["labels"], plain["backbone_kwargs"]
    assert read_config(PrecomputeConfig, plain) == config(batch_size=3)
    # Before there was this option no image was stored; by default one is.
    del plain["store_image"]
    assert read_config(PrecomputeConfig, plain) == config(batch_size=3, store_image=False)


def test_options_of_a_newer_program_are_refused_by_name() -> None:
    plain = {**describe(config()), "sharpen": 2, "colour": "red"}
    with pytest.raises(
        StoreFormatError, match=r"made by a newer program: options \['colour', 'sharpen'\] are not known"
    ):
        read_config(PrecomputeConfig, plain)
    del plain["sharpen"], plain["colour"], plain["out"]
    with pytest.raises(StoreFormatError, match=r"the stored options lack \['out'\]"):
        read_config(PrecomputeConfig, plain)


def test_reading_checks_again() -> None:
    with pytest.raises(ConfigError, match="limit=-1"):
        read_config(PrecomputeConfig, {**describe(config()), "limit": -1})


def test_every_spelling_of_a_backbone_is_one_store() -> None:
    one, other = (
        PrecomputeConfig(shards=("a.tar",), out="out", backbone=name)
        for name in ("facebook/dinov2-small", "vit_small_patch14_dinov2.lvd142m")
    )
    assert one == other
    assert one.identity() == other.identity()
    assert describe(one)["backbone"] == "vit_small_patch14_dinov2.lvd142m"
    from_command_line, _ = parse_args(PrecomputeConfig, [*NEEDED, "--backbone", "dinov2_vits14"], description="")
    assert from_command_line.identity() == one.identity()


def test_the_bilateral_filter_of_jobs_is_that_of_the_library() -> None:
    """Else `featup.load` would give other features than a store holds."""
    defaults = inspect.signature(Bilateral).parameters
    jobs = BilateralOptions().bilateral
    assert jobs == {name: defaults[name].default for name in jobs}
    assert jobs.keys() == defaults.keys() - {"radius", "tile_pixels"}
