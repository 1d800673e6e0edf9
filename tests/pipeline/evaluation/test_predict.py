"""A probe applied to photographs: in memory, from files and from shards; and what does not fit it."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from featup.backbones import create_backbone
from featup.checkpoints import probe_bytes, read_probe, upsampler_bytes
from featup.errors import WeightsError
from featup.upsamplers import create_trainable
from pipeline.compute.models import Extractor, make_backbone
from pipeline.config.predict import PredictConfig
from pipeline.config.probe import ProbeConfig
from pipeline.decode.geometry import Size, apply_label, plan_transform
from pipeline.errors import ConfigError, InputError, JobFailedError
from pipeline.evaluation.predict import predict
from pipeline.evaluation.prediction_files import depth_png, seg_png
from pipeline.evaluation.predictor import Predictor, decide_at_source, load_predictor
from pipeline.loader.dataset import FeatureDataset
from pipeline.training.create import describe_backbones
from pipeline.training.probes import train_probe
from pipeline.training.tasks import DepthTask
from tests.e2e.support import encode, good_sample, photograph, write_tar
from tests.pipeline.compute.support import make_config, open_store
from tests.pipeline.inputs import videos
from tests.pipeline.inputs.videos import OPEN, write_video

CLASSES = 8
SIZE = Size(64, 96)


@dataclass
class Fitted:
    """A store, the probe that was fitted on it, and the shard it was made from."""

    store: str
    probe: Path
    tar: Path


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    members = [member for n in range(first, first + count) for member in good_sample(f"k{n}", n)]
    for n in range(first, first + count):
        members.append((f"k{n}.depth.png", encode(500 + photograph(n)[..., 0].astype(np.uint16) * 8, "PNG")))
    return sorted(members)


def fit(folder: Path, label: str = "seg", names: Path | None = None, **options: Any) -> Fitted:
    tar = write_tar(folder / "train.tar", samples(0, 6))
    values = {"size": SIZE, "labels": (label,), "norm": "layer", "upsampler": "bilinear"}
    config = make_config(tar, folder / "store", **(values | options))
    open_store(config).run()
    probe = folder / "probe.safetensors"
    classes = CLASSES if label == "seg" else None
    train_probe(
        ProbeConfig(
            store=config.out,
            out=str(probe),
            label=label,  # type: ignore[arg-type]
            classes=classes,
            pixels=100,
            workers=0,
            threads=1,
            names=str(names) if names else None,
        )
    )
    return Fitted(config.out, probe, tar)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    folder = tmp_path_factory.mktemp("fitted")
    names = folder / "names.txt"
    names.write_text("".join(f"class {n}\n" for n in range(CLASSES - 1)) + "last one #0102fe\n")
    return fit(folder, names=names, pca=16)


@pytest.fixture(scope="module")
def predictor(fitted: Fitted) -> Predictor:
    return load_predictor(fitted.probe)


def read(file: Path | bytes) -> Image.Image:
    """A picture, read whole, with its file closed."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        image.load()
        return image


def at_size(pixels: np.ndarray) -> np.ndarray:
    """A photograph as a shard holds it, decoded and at the backbone's size."""
    return np.array(read(encode(pixels)).resize((SIZE.width, SIZE.height), Image.Resampling.BICUBIC))


def stored_outputs(fitted: Fitted) -> torch.Tensor:
    """The probe's output from the features that the store holds."""
    channel_map = read_probe(fitted.probe).probe.channel_map
    dataset = FeatureDataset(fitted.store, ["features"])
    features = torch.stack([dataset[number]["features"].float() for number in range(len(dataset))])
    return features @ channel_map.weight.T + channel_map.bias


def config_of(fitted: Fitted, out: Path, **options: Any) -> PredictConfig:
    return PredictConfig(**({"probe": str(fitted.probe), "out": str(out), "threads": 1} | options))


def test_outputs_are_those_of_the_stored_features(fitted: Fitted, predictor: Predictor) -> None:
    """Before upsampling as after it: stored are the upsampled features, projected and rounded to float16."""
    images = [np.array(read(encode(photograph(number)))) for number in range(6)]
    outputs = predictor.outputs(torch.from_numpy(np.stack([at_size(photograph(number)) for number in range(6)])))
    expected = stored_outputs(fitted)
    assert outputs.shape == expected.shape == (6, *SIZE, CLASSES)
    assert torch.allclose(outputs, expected, atol=5e-3 * expected.abs().max().item())
    agreement = (outputs.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.995
    predictions = predictor(images, batch_size=4)
    for prediction, image, output in zip(predictions, images, outputs, strict=True):
        assert prediction.dtype == np.int32
        assert prediction.shape == image.shape[:2]
        planes = torch.nn.functional.interpolate(output.permute(2, 0, 1)[None], image.shape[:2], mode="bilinear")
        assert (torch.from_numpy(prediction) == planes[0].argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize("geometry", ["squash", "center_crop", "pad"])
@pytest.mark.parametrize("source", [(50, 120), (131, 40), (64, 96)], ids=str)
def test_every_pixel_gets_the_value_under_it(geometry: Any, source: tuple[int, int]) -> None:
    """A ramp along each axis, through the geometry and back, is the ramp again."""
    transform = plan_transform(geometry, Size(*source), SIZE)
    for axis in (0, 1):
        ramp = np.broadcast_to(np.expand_dims(np.arange(source[axis]) + 0.5, 1 - axis), source).astype(np.float32)
        seen = apply_label(ramp, transform, np.nan)
        # Padding holds what must not get into the prediction.
        output = torch.from_numpy(np.nan_to_num(seen, nan=1e6))[..., None]
        found = decide_at_source(DepthTask(), output, transform).numpy()
        top, left, height, width = transform.source_window
        rows, columns = (np.arange(length) + 0.5 for length in source)
        inside = ((rows >= top) & (rows <= top + height))[:, None] & ((columns >= left) & (columns <= left + width))
        assert np.array_equal(np.isfinite(found), inside)
        step = max(1.0, transform.source_window[axis + 2] / transform.output_window[axis + 2])
        assert np.abs(found - ramp)[inside].max() <= step


def test_files_pictures_and_account(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(photograph(20, (45, 70))).save(folder / "a.png")
    Image.fromarray(photograph(21, (90, 31))).save(folder / "a.jpg", quality=95)
    Image.fromarray(photograph(22)).save(folder / "more" / "b.JPG", "JPEG")
    (folder / "more" / "broken.jpg").write_bytes(encode(photograph(1))[:300])
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(b"")
    single = tmp_path / "single.bin"
    single.write_bytes(encode(photograph(23)))
    out = folder / "out"  # Below the images: what is written is not read by the next run.
    config = config_of(fitted, out, images=(str(folder), str(single)), batch_size=2)
    with pytest.raises(JobFailedError, match=r"2 of 6 images failed \(33\.33%\), more than max_failed_fraction=1\.00%"):
        predict(config)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "input 6 = ok 4 + failed 2"
    assert "ignored: 1 no image (.txt)" in printed
    assert f"failed: {folder}/more/broken.jpg: truncated: jpeg cannot be decoded" in printed
    assert f"failed: {folder}/photo.heic: unsupported_format: heic is not read here" in printed
    names = ["a", "a.png", "more/b", "single"]
    maps = [read(out / "seg" / f"{name}.png") for name in names]
    assert [(one.mode, one.size) for one in maps] == [
        ("P", (31, 90)), ("P", (70, 45)), ("P", (80, 60)), ("P", (80, 60)),
    ]  # fmt: skip
    assert maps[0].getpalette()[3 * 7 : 3 * 8] == [1, 2, 254]
    predictor = load_predictor(fitted.probe)
    (expected,) = predictor([photograph(20, (45, 70))])
    assert np.array_equal(np.array(maps[1]), expected)
    overlays = [read(out / "overlays" / f"{name}.jpg") for name in names]
    assert [one.size for one in overlays] == [one.size for one in maps]
    sheet = np.array(read(out / "contact_sheet.png"))
    assert sheet.std() > 20
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    results = predict(replace(config, max_failed_fraction=0.4))
    assert results == json.loads((out / "predictions.json").read_text())
    assert [image["status"] for image in results["images"]] == ["ok", "ok", "ok", "failed", "failed", "ok"]
    assert "output of this job" in capsys.readouterr().out
    changed = {path.name for path, data in first.items() if path.read_bytes() != data}
    assert changed == {"predictions.json"}, "the limit is in its config"


def test_frames_and_rows_are_photographs_too(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_video(tmp_path / "clip.mp4", 20, options=OPEN, size=(60, 80))
    (tmp_path / "noise.mkv").write_bytes(b"no video at all")
    cells = [{"bytes": encode(photograph(20)), "path": None}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"photo": pa.array(cells, kind)}), tmp_path / "rows.parquet")
    # Called as a cell is.
    (tmp_path / "left#row=1&column=a.jpg").write_bytes(encode(photograph(21)))
    out = tmp_path / "out"
    names = ("clip.mp4", "noise.mkv", "rows.parquet", "left#row=1&column=a.jpg")
    places = tuple(str(tmp_path / name) for name in names)
    config = config_of(fitted, out, images=places, every=9, image_column="photo", max_failed_fraction=0.5)
    results = predict(config)
    assert [(one["name"], one["status"]) for one in results["images"]] == [
        ("clip/000000", "ok"), ("clip/000009", "ok"), ("clip/000018", "ok"), ("noise", "failed"),
        ("rows/000000", "ok"), ("rows/000001", "failed"), ("left#row=1&column=a", "ok"),
    ]  # fmt: skip
    assert [one.get("reason") for one in results["images"] if one["status"] == "failed"] == [
        "undecodable", "image_missing"
    ]  # fmt: skip
    frames = videos.read(videos.listed(clip))
    (expected,) = load_predictor(fitted.probe)([np.asarray(frames[9])])
    assert np.array_equal(np.array(read(out / "seg" / "clip" / "000009.png")), expected)
    assert capsys.readouterr().out.splitlines()[-1] == "input 7 = ok 5 + failed 2"


def test_files_in_a_folder_may_be_named_from_here(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a relative path was put before it once more."""
    write_video(tmp_path / "in" / "clip.mp4", 1, size=(60, 80))
    pq.write_table(pa.table({"image": [encode(photograph(20))]}), tmp_path / "in" / "rows.parquet")
    (tmp_path / "in" / "a.jpg").write_bytes(encode(photograph(21)))
    monkeypatch.chdir(tmp_path)
    images = ("in/clip.mp4", "in/rows.parquet", "in/a.jpg")
    results = predict(config_of(fitted, tmp_path / "out", images=images))
    assert [(one["name"], one["status"]) for one in results["images"]] == [
        ("clip/000000", "ok"), ("rows/000000", "ok"), ("a", "ok")
    ]  # fmt: skip


def test_labels_in_shards_are_compared(fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = samples(0, 3)
    # One without a label, one with a label of another size, one of a class that the probe does not know.
    members += [("x.jpg", encode(photograph(40)))]
    members += [("y.jpg", encode(photograph(41))), ("y.seg.png", encode(np.zeros((3, 3), np.uint8), "PNG"))]
    members += [("z.jpg", encode(photograph(42))), ("z.seg.png", encode(np.full((60, 80), 99, np.uint8), "PNG"))]
    tar = write_tar(tmp_path / "val.tar", members)
    results = predict(config_of(fitted, tmp_path / "out", shards=(str(tar),)))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "input 6 = ok 6 + failed 0"
    assert f"against the labels of 3 images: mIoU {results['measures']['mIoU']:.4g}  accuracy" in printed
    assert f"label of {tar}: y not used: label_size: seg.png has size (height, width) = (3, 3)" in printed
    assert f"label of {tar}: z not used: class id 99 with classes=8" in printed
    right = total = 0
    for number in range(3):
        prediction = np.array(read(tmp_path / "out" / "seg" / f"k{number}.png"))
        label = photograph(number)[..., 0] // 32
        right, total = right + int((prediction == label).sum()), total + label.size
    assert results["measures"]["accuracy"] == pytest.approx(100 * right / total)
    assert right / total > 0.4, "it has seen these"


def test_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted = fit(tmp_path, "depth", geometry="center_crop")
    results = predict(config_of(fitted, tmp_path / "out", shards=(str(fitted.tar),), limit=2))
    assert results["measures"]["RMSE"] < 0.7
    for name in ("k1", "k4"):  # of six
        millimetres = np.array(read(tmp_path / "out" / "depth" / f"{name}.png"))
        metres = np.load(tmp_path / "out" / "depth" / f"{name}.npy")
        assert (millimetres.dtype, metres.dtype, millimetres.shape, metres.shape) == (
            np.uint16, np.float32, (60, 80), (60, 80),
        )  # fmt: skip
        # The window is 53.3 rows high: 60 - 53.3 of them lie outside of it.
        assert np.isnan(metres).all(1).tolist() == [row < 3 or row > 56 for row in range(60)]
        assert np.array_equal(millimetres == 0, np.isnan(metres))
        known = metres > 0.001
        assert np.abs(millimetres[known] / 1000 - metres[known]).max() < 0.00051
    with pytest.raises(ConfigError, match="is a probe of depth; leave it out"):
        load_predictor(fitted.probe, names="names.txt")


def test_pixel_values_of_many_classes_and_of_no_prediction() -> None:
    ids = np.array([[-1, 0, 299]], np.int32)
    wide = np.array(read(seg_png(ids, np.zeros((300, 3), np.uint8))))
    assert (wide.dtype, wide.tolist()) == (np.uint16, [[65535, 0, 299]])
    narrow = np.array(read(seg_png(ids.clip(-1, 7), np.zeros((8, 3), np.uint8))))
    assert (narrow.dtype, narrow.tolist()) == (np.uint8, [[255, 0, 7]])
    metres = np.array([[np.nan, -2, 0, 1.2346, 1e6]], np.float32)
    assert np.array(read(depth_png(metres))).tolist() == [[0, 1, 1, 1235, 65535]]


@pytest.mark.parametrize(
    "upsampler",
    [{"upsampler": "implicit", "fit_steps": 5, "fit_views": 4}, {"upsampler": "multiview", "views": 4}],
    ids=["implicit", "multiview"],
)
def test_views_of_each_photograph(tmp_path: Path, upsampler: dict[str, Any]) -> None:
    fitted = fit(tmp_path, pca=8, **upsampler)
    expected = stored_outputs(fitted)
    pixels = np.stack([at_size(photograph(number)) for number in (0, 1)])
    outputs = load_predictor(fitted.probe).outputs(torch.from_numpy(pixels))
    assert (outputs.argmax(-1) == expected[:2].argmax(-1)).float().mean() > 0.99


def test_other_weights_and_other_checkpoints_are_refused(tmp_path: Path) -> None:
    weights = [tmp_path / f"w{seed}.pth" for seed in (1, 2)]
    for seed, path in enumerate(weights, 1):
        torch.save(create_backbone("test_vit", seed=seed).model.state_dict(), path)
    common = {"size": SIZE, "norm": "layer", "weights": str(weights[0])}
    config = make_config("-", "-", **common)
    provenance = {"backbone": describe_backbones(config, [make_backbone(config)])[0]}  # type: ignore[arg-type]
    checkpoints = [tmp_path / f"jbu{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(checkpoints, 1):
        torch.manual_seed(seed)
        path.write_bytes(upsampler_bytes(create_trainable("jbu", 64), **provenance))
    fitted = fit(tmp_path, upsampler="jbu", checkpoint=str(checkpoints[0]), weights=str(weights[0]))
    load_predictor(fitted.probe)
    with pytest.raises(
        WeightsError, match=r"was fitted on test_vit with weights \w{12}.*, and those of \S*w2\.pth are"
    ):
        load_predictor(fitted.probe, weights=str(weights[1]))
    with pytest.raises(
        WeightsError, match=r"jbu2.* has sha256 \w+, and .*probe\.safetensors was fitted with .* by --ch"
    ):
        load_predictor(fitted.probe, checkpoint=str(checkpoints[1]))
    moved = [path.rename(tmp_path / f"moved_{path.name}") for path in (weights[0], checkpoints[0])]
    with pytest.raises(ConfigError, match=r"jbu1\.safetensors is not there, .* give the file by --checkpoint"):
        load_predictor(fitted.probe)
    with pytest.raises(ConfigError, match=r"w1\.pth is not there, the weights that .* give the file by --weights"):
        load_predictor(fitted.probe, checkpoint=str(moved[1]))
    load_predictor(fitted.probe, weights=str(moved[0]), checkpoint=str(moved[1]))
    # A JBU trained with --norm layer was taken under --norm model, with exit status 0.
    other = make_config("-", "-", upsampler="jbu", checkpoint=str(moved[1]), **common | {"norm": "model"})  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"layer 5, norm layer, with .* is test_vit, layer 5, norm model"):
        Extractor(other, weights=str(moved[0]))


def test_weights_that_the_store_keeps_are_found(tmp_path: Path) -> None:
    hub = tmp_path / "hub.pth"
    torch.save(create_backbone("test_vit", seed=7).model.state_dict(), hub)
    fitted = fit(tmp_path, pretrained=True, backbone_kwargs={"pretrained_cfg_overlay": {"file": str(hub)}})
    hub.unlink()
    assert load_predictor(fitted.probe).digests["backbone"] == create_backbone("test_vit", seed=7).digest


def test_probes_photographs_and_names_that_do_not_fit(fitted: Fitted, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    old.write_bytes(probe_bytes(read_probe(fitted.probe).probe, seed=3))
    with pytest.raises(ConfigError, match="does not say how its features are computed: an older program fitted it"):
        load_predictor(old)
    with pytest.raises(WeightsError, match="expected a probe in format"):
        load_predictor(Path(write_checkpoint(tmp_path)))
    with pytest.raises(ConfigError, match=r"must be uint8 \[h, w, 3\], got float64 \[4, 4, 3\]"):
        load_predictor(fitted.probe)([np.zeros((4, 4, 3))])  # type: ignore[list-item]
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"has 2 lines and there are 8 classes; give one line"):
        load_predictor(fitted.probe, names=str(names))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not one image in"):
        predict(config_of(fitted, tmp_path / "out", images=(str(tmp_path / "empty"),)))
    with pytest.raises(InputError, match=r"there is no file .*nothing\.jpg, which is named as an image"):
        predict(config_of(fitted, tmp_path / "out", images=(str(tmp_path / "nothing.jpg"),)))
    for options in ({}, {"images": ("a",), "shards": ("b",)}):
        with pytest.raises(ConfigError, match="give one of them"):
            config_of(fitted, tmp_path / "out", **options)


def write_checkpoint(folder: Path) -> str:
    path = folder / "jbu.safetensors"
    path.write_bytes(upsampler_bytes(create_trainable("jbu", 64)))
    return str(path)
