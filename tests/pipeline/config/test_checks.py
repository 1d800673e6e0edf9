"""Values that cannot be, of every option of every config, are refused when the config is constructed."""

import re
from dataclasses import MISSING, fields
from typing import Any, get_args, get_type_hints

import pytest

from featup.multiview import FAST, PAPER, ImplicitOptions, MultiViewOptions
from pipeline.config.base import InputConfig
from pipeline.config.evaluate import EvaluateConfig, multiview_row
from pipeline.config.precompute import PrecomputeConfig
from pipeline.config.predict import PredictConfig
from pipeline.config.probe import ProbeConfig
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.options import Bounds, Checked, Size

NEEDED: dict[type[Checked], dict[str, Any]] = {
    PrecomputeConfig: {"shards": ("a.tar",), "out": "out"},
    TrainConfig: {"shards": ("a.tar",), "out": "out"},
    EvaluateConfig: {"out": "out", "cam_shards": ("a.tar",)},
    PredictConfig: {"probe": "probe.safetensors", "images": ("a.jpg",), "out": "out"},
    ProbeConfig: {"store": "store", "out": "probe.safetensors", "classes": 3},
}


def construct(kind: type[Checked], **options: Any) -> Checked:
    return kind(**{**NEEDED[kind], **options})


def numbers() -> list[Any]:
    """(config, option) of every option that is a number, or several."""
    return [
        pytest.param(kind, one.name, id=f"{kind.__name__}-{one.name}")
        for kind in NEEDED
        for one in fields(kind)
        if {int, float, Size} & {part for hint in (get_type_hints(kind)[one.name],) for part in (hint, *get_args(hint))}
        or "tuple[float" in str(get_type_hints(kind)[one.name])
    ]


@pytest.mark.parametrize(("kind", "name"), numbers())
def test_every_number_has_a_range_and_is_refused_outside_of_it(kind: type[Checked], name: str) -> None:
    (one,) = [one for one in fields(kind) if one.name == name]
    bounds: Bounds | None = one.metadata["bounds"]
    if name == "layer":
        assert bounds is None, "the range is that of the model's layers"
        return
    assert bounds is not None
    assert bounds.at_least is not None or bounds.above is not None
    least = bounds.at_least if bounds.at_least is not None else bounds.above
    assert least is not None
    outside = [least - 1, *([least] if bounds.above is not None else []), float("nan"), float("inf")]
    outside += [bounds.at_most + 1] if bounds.at_most is not None else []
    hint = str(get_type_hints(kind)[name])
    for number in outside:
        value = Size(1, number) if "Size" in hint else (number,) * 3 if "tuple" in hint else number  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=rf"^{name}=.* must be "):
            construct(kind, **{name: value})
    for wrong in ("7", True):
        with pytest.raises(ConfigError, match=rf"^{name}=.* must be "):
            construct(kind, **{name: wrong})


@pytest.mark.parametrize("kind", NEEDED)
def test_every_option_has_help_and_a_group(kind: type[Checked]) -> None:
    for one in fields(kind):
        assert one.metadata["help"], one.name
        assert "\n" not in one.metadata["help"]
        assert one.metadata["group"] in (
            "input",
            "backbone",
            "decoding",
            "upsampler",
            "training",
            "probe",
            "evaluation",
            "store",
            "run",
        )


@pytest.mark.parametrize("kind", NEEDED)
def test_paths_are_never_empty(kind: type[Checked]) -> None:
    for one in fields(kind):
        if not one.metadata["path"]:
            continue
        several = isinstance(one.default, tuple)
        with pytest.raises(ConfigError, match=f"{one.name} is empty; give a path or URL"):
            construct(kind, **{one.name: ("",) if several else ""})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        # What passed before and failed late, or never.
        ({"max_pixels": 0}, "max_pixels=0 must be at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"every": 2}, "every=2 and image_column=None go with --images: in tars every image is a file"),
        ({"image_column": "photo"}, "every=1 and image_column='photo' go with --images"),
        ({"decode_timeout": 0.0}, "decode_timeout=0.0 must be more than 0"),
        ({"actors": 0}, "actors=0 must be at least 1"),
        ({"actors": "all"}, "actors='all' must be a whole number, or auto"),
        ({"actors": 1.5}, "actors=1.5 must be a whole number, or auto"),
        ({"gpus_per_actor": -3.0}, "gpus_per_actor=-3.0 must be at least 0"),
        ({"gpus_per_actor": 1.5}, "gpus_per_actor=1.5: more than one GPU must be a whole number"),
        ({"cpus_per_actor": -1.0}, "cpus_per_actor=-1.0 must be at least 0.01"),
        ({"cpus_per_actor": 0.0}, "cpus_per_actor=0.0 must be at least 0.01"),
        ({"loader_cpus": 0.0}, "loader_cpus=0.0 must be at least 0.01"),
        ({"depth_png_scale": -1.0}, "depth_png_scale=-1.0 must be more than 0"),
        ({"depth_png_scale": 0.0}, "depth_png_scale=0.0 must be more than 0"),
        ({"depth_npy_scale": float("inf")}, "depth_npy_scale=inf must be more than 0"),
        ({"depth_npy_scale": float("nan")}, "depth_npy_scale=nan must be more than 0"),
        ({"image_exts": ()}, "image_exts=() must be lower-case extensions without a dot, at least one"),
        ({"image_exts": (".jpg",)}, "image_exts=('.jpg',) must be lower-case extensions without a dot"),
        ({"image_exts": ("JPG",)}, "image_exts=('JPG',) must be lower-case extensions without a dot"),
        ({"object_store_mb": 0}, "object_store_mb=0 must be at least 75"),
        ({"tile": 100_000}, "tile=100000 is larger than the stored features, 224x224 (HEIGHTxWIDTH); give at most 224"),
        ({"tile": 65, "output_size": Size(32, 64)}, "tile=65 is larger than the stored features, 32x64"),
        ({"rows_per_shard": 65537}, "rows_per_shard=65537 must be between 1 and 65536"),
        ({"std": (0.5, 0.0, 0.5)}, "std=(0.5, 0.0, 0.5) must be more than 0"),
        ({"mean": (0.5, -0.1, 0.5)}, "mean=(0.5, -0.1, 0.5) must be between 0 and 1"),
        ({"mean": (124.0, 116.0, 104.0)}, "mean=(124.0, 116.0, 104.0) must be between 0 and 1"),
        ({"backbone": ""}, "backbone is empty"),
        ({"recheck_share": 0.0}, "recheck_share=0.0 must be more than 0, at most 1"),
        ({"retry_failed": ("rotten",)}, "retry_failed=('rotten',) must be reasons"),
        # Single values.
        ({"shards": ()}, "give tars by --shards, or a folder or list by --images"),
        ({"size": Size(0, 5)}, "size=0x5 must be between 1 and 16384 on both sides"),
        ({"mean": (0.5, 0.5)}, "mean=(0.5, 0.5) must be 3 numbers"),
        ({"std": 0.5}, "std=0.5 must be 3 numbers"),
        ({"limit": 1.5}, "limit=1.5 must be a whole number"),
        ({"geometry": "stretch"}, "geometry='stretch' must be one of squash, center_crop, pad"),
        ({"labels": ("boxes",)}, "labels=('boxes',) must be one of seg, depth, cls"),
        ({"upsampler": "jub"}, "upsampler='jub' must be one of nearest, bilinear, bicubic, norm_bilinear,"),
        ({"precision": "float64"}, "precision='float64' must be one of float32, bfloat16, float16"),
        ({"backbone": 3}, "backbone=3 must be text"),
        # Combinations.
        ({"labels": ("seg", "cls", "seg")}, "labels=('seg', 'cls', 'seg'): one is named twice"),
        ({"stride": 16, "layer": 2}, "stride=16 and layer=2 both choose the feature map; give one of them"),
        ({"upsampler": "jbu"}, "upsampler='jbu' with checkpoint=None: those that are trained (jbu, resize_conv"),
        ({"upsampler": "ifa"}, "upsampler='ifa' with checkpoint=None: those that are trained (jbu, resize_conv"),
        ({"checkpoint": "a"}, "upsampler='bilateral' with checkpoint='a': those that are trained (jbu, resize_conv"),
        ({"upsampler": "multiview", "view_base": "jbu"}, "need a checkpoint"),
        ({"upsampler": "implicit", "checkpoint": "a"}, "upsampler='implicit' with checkpoint='a'"),
        ({"view_base": "multiview"}, "view_base='multiview' must be one of nearest, bilinear"),
        (
            {"upsampler": "implicit", "fit_dropout": 1.0},
            "implicit: dropout=1.0 is a share, at least 0 and below 1; change the --fit options",
        ),
        ({"upsampler": "implicit", "fit_lowest": 11.0}, "must be finite logarithms of frequencies, in this order"),
        ({"pca": 8, "pca_from": "out/a"}, "pca=8 fits a PCA and pca_from='out/a' takes one that is there; give one"),
        (
            {"cpus_per_actor": 2.0, "loader_cpus": 2.0, "gpus_per_actor": 0.0},
            "cpus_per_actor and loader_cpus are both 2.0: Ray would then run reading and decoding inside the actors",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_precompute(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        construct(PrecomputeConfig, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gpus_per_worker": -1.0}, "gpus_per_worker=-1.0 must be at least 0"),
        ({"gpus_per_worker": 2.5}, "gpus_per_worker=2.5: more than one GPU must be a whole number"),
        ({"cpus_per_worker": 0.0}, "cpus_per_worker=0.0 must be at least 0.01"),
        ({"max_zoom": float("inf")}, "max_zoom=inf must be at least 1"),
        ({"lr": float("inf")}, "lr=inf must be more than 0"),
        ({"workers": 2, "batch_size": 3}, "batch_size=3 is that of all 2 workers and must divide among them"),
        ({"tensorboard": True, "out": "s3://b/c"}, "tensorboard with out='s3://b/c': event files are written to local"),
    ],
)
def test_train(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        construct(TrainConfig, **options)


def test_anyup_takes_a_checkpoint_or_none() -> None:
    for checkpoint in (None, "anyup.pth"):
        construct(PrecomputeConfig, upsampler="anyup", checkpoint=checkpoint)
    construct(EvaluateConfig, rows=("anyup", "anyup=anyup.pth"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cam_shards": ()}, "nothing to evaluate on"),
        ({"train": ("a",), "classes": 3}, "a probe is fitted on one and evaluated on the other, give both"),
        ({"train": ("a",), "val": ("b",)}, "segmentation needs both"),
        ({"rows": ()}, "rows is empty"),
        ({"rows": ("nearest", "nearest")}, "one is named twice"),
        ({"rows": ("nearest", "bilinaer")}, "rows: 'bilinaer' is not one of nearest, bilinear, bicubic, norm_"),
        ({"protocol": "448", "geometry": "center_crop"}, "protocol=448 trains segmentation probes"),
        (
            {"protocol": "448", "train": ("a",), "val": ("b",), "classes": 3},
            "protocol=448 with geometry=squash: its images are centre crops",
        ),
        ({"cluster_by": "(a"}, "cluster_by='(a' is no expression with a group"),
        ({"cluster_by": "a"}, "cluster_by='a' is no expression with a group"),
        ({"rows": ("jbu",)}, "rows: 'jbu' is not one of"),
        ({"rows": ("bilinear=a.safetensors",)}, "rows: 'bilinear=a.safetensors' is not one of"),
        ({"sigma_space": 0.0}, "sigma_space=0.0 must be more than 0"),
        ({"depth_png_scale": 0.0}, "depth_png_scale=0.0 must be more than 0"),
    ],
)
def test_evaluate(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        construct(EvaluateConfig, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": None}, "seg needs the number of classes"),
        ({"label": "depth"}, "depth has none"),
        ({"out": "probe.pth"}, "out='probe.pth' must end in .safetensors"),
        ({"workers": -1}, "workers=-1 must be at least 0"),
    ],
)
def test_probe(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        construct(ProbeConfig, **options)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"limit=0 must be at least 1; pca=-1 must be at least 1; actors=0 must"):
        construct(PrecomputeConfig, limit=0, pca=-1, actors=0)


def test_values_at_the_edge_are_taken() -> None:
    edge = {"limit": 1, "pca": 1, "pca_images": 1, "tile": 1, "rows_per_shard": 1, "threads": 1, "batch_size": 1}
    for options in (
        edge,
        {"size": Size(1, 1), "mantissa_bits": 1, "codec": "zstd", "compression_level": 9, "max_failed_fraction": 0.0},
        {"mantissa_bits": 10, "compression_level": 1, "max_failed_fraction": 1.0, "recheck_share": 1},
        {"stride": 16},
        {"layer": 3},
        {"tile": 64, "output_size": Size(32, 64)},
        {"gpus_per_actor": 0, "object_store_mb": 75, "resource_timeout": 0},
        {"precision": "float16", "gpus_per_actor": 0.5, "mean": (0, 0, 1), "std": (1, 1, 1)},
        {"cpus_per_actor": 0.5},
        {"cpus_per_actor": 0.5, "loader_cpus": 0.5, "gpus_per_actor": 1.0},
        {"upsampler": "implicit"},
        {"upsampler": "implicit", "pca": 8, "implicit_preset": "paper"},
        {"upsampler": "multiview", "view_base": "jbu", "checkpoint": "a", "views": 1, "held_out_views": 0},
        {"upsampler": "multiview", "view_base": "anyup"},
    ):
        construct(PrecomputeConfig, **options)
    for rows in (
        ("implicit", "implicit=paper"),
        ("multiview", "multiview:4", "multiview:32", "multiview=bilinear", "multiview=anyup:4"),
        ("multiview=a.safetensors", "multiview=s3://a/b:c.safetensors:4", "jbu=a.safetensors"),
        ("strided",),
    ):
        construct(EvaluateConfig, rows=rows)


def test_options_of_a_fit_win_over_its_preset() -> None:
    given = {name: 3 for name in ("views", "steps", "step_views", "tokens", "positions", "components", "kernel")}
    given |= {name: 0.5 for name in ("lr", "dropout", "magnitude", "total_variation", "blur_pin", "zoom_share")}
    given |= {"lowest": -1.0, "highest": 2.0, "max_zoom": 2.5, "max_pad": 7, "frequencies": 9, "seed": 7}
    given |= {"lr_decay": True, "warm_start": False, "flip": False}
    own = {field.name for field in fields(ImplicitOptions)} - {"held_out"}
    assert set(given) == own, "an option of a fit cannot be reached from the command line"
    for preset in ("fast", "paper"):
        config = construct(PrecomputeConfig, implicit_preset=preset, **{f"fit_{k}": v for k, v in given.items()})
        assert isinstance(config, PrecomputeConfig)
        options = config.implicit_options()
        assert {name: getattr(options, name) for name in given} == given
    assert PrecomputeConfig(shards=("a",), out="b", implicit_preset="paper").implicit_options() == PAPER
    assert PrecomputeConfig(shards=("a",), out="b").implicit_options() == FAST
    config = PrecomputeConfig(
        shards=("a",), out="b", view_max_pad=9, view_flips=False, back_projection=False, fit_seed=3
    )
    expected = MultiViewOptions(views=5, held_out=2, max_pad=9, flip=False, back_project=False, seed=3)
    assert config.multiview_options(5, 2) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("multiview", ("bilateral", "", 16)),
        ("multiview:4", ("bilateral", "", 4)),
        ("multiview=anyup:32", ("anyup", "", 32)),
        ("multiview=a/b:c.safetensors:8", ("jbu", "a/b:c.safetensors", 8)),
        ("multiview=s3://a/b.safetensors", ("jbu", "s3://a/b.safetensors", 16)),
        ("multiview=jbu", None),
        ("multiview:0", None),
        ("multiview=strided", None),
        ("multiview4", None),
        ("implicit", None),
    ],
)
def test_rows_of_multiview(row: str, expected: tuple[str, str, int] | None) -> None:
    assert multiview_row(row) == expected


def test_only_what_must_be_given_has_no_default() -> None:
    for kind, needed in NEEDED.items():
        names = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
        assert names <= set(needed)
    assert issubclass(PrecomputeConfig, InputConfig)
