"""The main job from shards to a verified store, and what happens when it is run again."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from featup.backbones import create_backbone
from featup.checkpoints import load_pca, pca_bytes, upsampler_bytes
from featup.images import resize_images
from featup.multiview.average import MultiView, MultiViewOptions
from featup.multiview.implicit import FAST, Implicit
from featup.upsamplers import JBU, AnyUp, Bilateral, Interpolate
from pipeline.loader.dataset import FeatureDataset
from tests.e2e import support
from tests.e2e.in_process import run

OPTIONS = (*support.TINY, "--labels", "seg", "--pca", 8, "--rows-per-shard", 4, "--stride", 16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for tar, count in enumerate((7, 6)):
        samples = [support.good_sample(f"img{tar}{n:02d}", 10 * tar + n) for n in range(count)]
        support.write_tar(folder / f"train-{tar:04d}.tar", [member for sample in samples for member in sample])
    return folder


@pytest.fixture(scope="module")
def store(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "train"
    text = run("precompute", "--shards", shards / "train-{0000..0001}.tar", "--out", out, *OPTIONS)
    assert "input 13 = ok 13 + failed 0" in text
    return out


@pytest.mark.ray
def test_plain_zarr_reads_the_store(store: Path) -> None:
    root = zarr.open(store / "features.zarr", mode="r")
    assert root["features"].shape == (16, 64, 64, 8)
    assert root["features"].dtype == np.float16
    # 7 samples and 6 samples in units of 4: row 7 and rows 14, 15 are holes.
    good = np.r_[0:7, 8:14]
    assert np.flatnonzero(root["status"][:] == 1).tolist() == good.tolist()
    features = root["features"][:]
    assert np.isfinite(features[good]).all()
    assert np.isnan(features[[7, 14, 15]]).all()
    assert (root["seg"][:][[7, 14, 15]] == 255).all()


@pytest.mark.ray
def test_a_limit_is_spread_over_the_input_and_its_store_verifies_and_grows(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "limited"
    command = ("precompute", "--out", out, *OPTIONS, "--limit", 5)
    assert "input 5 = ok 5 + failed 0" in run(*command, "--shards", shards / "train-*.tar")
    keys = ["img001", "img003", "img005", "img101", "img104"]
    assert pq.read_table(out / "index").column("key").to_pylist() == keys
    assert "clean" in run("verify", out)
    # Images alone tell a row from its neighbours: row 1 is the fourth photograph of the first shard.
    dataset = FeatureDataset(str(out), ["image"])
    for key in keys:
        seed = 10 * int(key[3]) + int(key[4:])
        expected = resize_images(torch.from_numpy(support.photograph(seed))[None], (64, 64))[0]
        assert (dataset[key]["image"].float() - expected.float()).abs().mean() < 8
    shutil.copytree(shards, tmp_path / "more")
    support.write_tar(tmp_path / "more" / "train-0002.tar", support.good_sample("img200", 20))
    assert " 0 to do" in run(*command, "--shards", tmp_path / "more" / "train-*.tar")


@pytest.mark.ray
def test_the_features_are_those_of_the_method(store: Path, shards: Path) -> None:
    """Computed again, one image at a time, without the pipeline."""
    from pipeline.decode.options import DecodeOptions
    from pipeline.decode.sample import prepare_sample
    from tests.pipeline.inputs.tars import iterate_tar

    backbone = create_backbone("test_vit", stride=16, image_size=(64, 64))
    pca = load_pca(store / "plan" / "pca.safetensors")
    dataset = FeatureDataset(str(store), ["features", "seg"])
    options = DecodeOptions(size=(64, 64), geometry="squash", labels=("seg",))
    members = [sample for tar in (0, 1) for _, sample in iterate_tar(str(shards / f"train-{tar:04d}.tar"))]
    assert len(members) == len(dataset)
    for number in (0, 6, 7, 12):
        prepared = prepare_sample(members[number], options)
        image = torch.from_numpy(prepared.image)[None]
        with torch.inference_mode():
            expected = pca.project(Bilateral()(backbone(image), image, (64, 64)))[0]
        stored = dataset[number]
        error = (stored["features"] - expected).abs().max() / expected.abs().max()
        assert error < 2e-3, f"sample {number}: relative error {error} against float16's 1e-3"
        assert torch.equal(stored["seg"], torch.from_numpy(prepared.labels["seg"]).long())


@pytest.mark.ray
def test_index_and_receipts_account_for_every_sample(store: Path) -> None:
    index = pq.read_table(store / "index").to_pylist()
    assert [row["key"] for row in index] == [f"img0{n:02d}" for n in range(7)] + [f"img1{n:02d}" for n in range(6)]
    assert {row["status"] for row in index} == {"ok"}
    assert all(row["height"] == 60 and row["width"] == 80 and len(row["sha256"]) == 32 for row in index)
    assert len(support.receipts(store)) == 4


@pytest.mark.ray
def test_running_again_computes_nothing_and_other_options_are_refused(store: Path, shards: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in support.receipts(store)}
    command = ("--shards", shards / "train-*.tar", "--out", store)
    text = run("precompute", *command, *OPTIONS)
    assert "4 units done before, 0 to do" in text
    assert {path: path.stat().st_mtime_ns for path in support.receipts(store)} == before
    text = run("precompute", *command, *OPTIONS, "--geometry", "pad", "--upsampler", "bicubic", status=1)
    assert "geometry: the store has 'squash', this run has 'pad'" in text
    assert "upsampler: the store has 'bilateral', this run has 'bicubic'" in text
    fewer = ("--shards", shards / "train-0000.tar", "--out", store)
    text = run("precompute", *fewer, *OPTIONS, status=1)
    assert "train-0001.tar" in text
    assert "InputError" in text
    # Without its arrays, the receipts would make a new store look finished and be empty.
    arrays = (store / "features.zarr").rename(store / "moved")
    try:
        assert "has receipts and no arrays" in run("precompute", *command, *OPTIONS, status=1)
    finally:
        arrays.rename(store / "features.zarr")


@pytest.mark.ray
def test_verify_passes_a_whole_store_and_finds_damage(store: Path) -> None:
    assert "clean: 4 units, 13 samples = 13 ok + 0 failed" in run("verify", store)
    shard = store / "features.zarr" / "features" / "c" / "1" / "0" / "0" / "0"
    label = store / "features.zarr" / "seg" / "c" / "2" / "0" / "0"
    status = store / "features.zarr" / "status" / "c" / "3"
    originals = {path: path.read_bytes() for path in (shard, label, status)}
    try:
        data = bytearray(originals[shard])
        data[100] ^= 4
        shard.write_bytes(data)
        label.unlink()
        array = zarr.open(store / "features.zarr", mode="r+")["status"]
        array[13] = 2
        text = run("verify", store, status=1)
    finally:
        for path, data in originals.items():
            path.write_bytes(data)
    assert "unit 1 (shard 0, samples 4:7, row 4): features cannot be read" in text
    assert "seg row 8 (img100): crc32c" in text
    assert "unit 3 (shard 1, samples 4:6, row 12): status is [1, 2, 0, 0]" in text


@pytest.mark.ray
def test_dry_run_counts_as_the_run_does(store: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "planned"
    text = run("precompute", "--shards", shards / "train-*.tar", "--out", out, *OPTIONS, "--dry-run")
    assert "2 shards, 13 samples" in text
    assert "4 of up to 4 samples; arrays of 16 rows, 3 of them holes" in text
    assert not (out / "features.zarr").exists()
    planned = int(text.split("before compression (")[1].split(" bytes")[0])
    written = sum(json.loads(path.read_text())["sizes"]["encode_write"] for path in support.receipts(store))
    assert planned == written == 13 * (64 * 64 * (8 * 2 + 3 + 1) + 1)


def _mixed_shard(path: Path) -> Path:
    """Photographs of several aspects with depth (metres, as npy) and a class."""
    members = []
    for number, size in enumerate([(60, 80), (90, 50), (64, 64), (300, 201)]):
        depth = np.linspace(0.5, 4, size[0] * size[1], dtype=np.float32).reshape(size)
        depth[:5] = 0
        file = io.BytesIO()
        np.save(file, depth)
        photograph = support.encode(support.photograph(number, size), "PNG")
        members += [(f"m{number}.png", photograph), (f"m{number}.depth.npy", file.getvalue())]
        members += [(f"m{number}.cls", str(number * 7).encode())]
    return support.write_tar(path, members)


@pytest.mark.ray
def test_a_store_by_anyup_resumes_and_holds_to_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(AnyUp(16).state_dict(), tmp_path / f"anyup{seed}.pth")
    command = ("precompute", "--shards", shards / "train-0000.tar", "--out", tmp_path / "out", *OPTIONS)
    command = (*command, "--upsampler", "anyup", "--checkpoint")
    assert "input 7 = ok 7 + failed 0" in run(*command, tmp_path / "anyup1.pth")
    before = zarr.open(tmp_path / "out" / "features.zarr", mode="r")["features"][:]
    assert np.isfinite(before[:7]).all()
    shutil.copy(tmp_path / "anyup1.pth", tmp_path / "moved.pth")
    assert "input 7 = ok 7 + failed 0" in run(*command, tmp_path / "moved.pth")
    assert "checkpoint digest" in run(*command, tmp_path / "anyup2.pth", status=1)


@pytest.mark.ray
def test_patch_14_by_jbu_with_padding_depth_and_classes(tmp_path: Path) -> None:
    shard = _mixed_shard(tmp_path / "mixed.tar")
    torch.manual_seed(0)
    (tmp_path / "jbu.safetensors").write_bytes(upsampler_bytes(JBU(channels=384)))
    out = tmp_path / "out"
    command = ("--shards", shard, "--out", out, "--backbone", "vit_small_patch14_dinov2", "--pretrained", "false")
    command = (*command, "--upsampler", "jbu", "--checkpoint", tmp_path / "jbu.safetensors", "--pca", 16)
    command = (*command, "--geometry", "pad", "--labels", "depth", "cls", "--object-store-mb", 100)
    assert "16x16 to 224x224 by jbu" in run("precompute", *command)
    dataset = FeatureDataset(str(out), ["features", "depth", "cls", "valid"])
    assert [int(dataset[n]["cls"]) for n in range(4)] == [0, 7, 14, 21]
    tall = dataset[1]
    assert tall["features"].shape == (224, 224, 16)
    assert tall["features"].isfinite().all()
    # 90x50 fits as 224x124, in the middle.
    assert torch.equal(tall["valid"].any(0).nonzero().flatten(), torch.arange(50, 174))
    assert tall["depth"][~tall["valid"]].isnan().all()
    inside = tall["depth"][:, 50:174]
    assert inside[:12].isnan().all(), "0 means unknown"
    assert inside[14:].isfinite().all()
    assert inside[200].mean() > inside[20].mean() > 0.5
    assert "clean" in run("verify", out)


@pytest.mark.ray
def test_a_cnn_stage_on_images_that_are_not_square_to_another_size(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in support.good_sample(f"s{n}", n)]
    shard = support.write_tar(tmp_path / "s.tar", members)
    out = tmp_path / "out"
    command = (
        "--shards",
        shard,
        "--out",
        out,
        "--backbone",
        "mobilenetv1_100",
        "--pretrained",
        "false",
        "--stride",
        16,
    )
    command = (*command, "--size", "352x480", "--output-size", "88x120", "--labels", "seg", "--mantissa-bits", 7)
    assert "22x30 to 88x120 by bilateral, 512 channels" in run("precompute", *command, "--object-store-mb", 100)
    sample = FeatureDataset(str(out), ["features", "seg"])[2]
    assert sample["features"].shape == (88, 120, 512)
    assert sample["seg"].shape == (88, 120)
    raw = sample["features"].half().numpy().view(np.uint16)
    assert not (raw & 0b111).any()
    assert (raw & 0b1000).any(), "7 of 10 mantissa bits are kept"


@pytest.mark.ray
def test_another_store_takes_the_pca(store: Path, shards: Path, tmp_path: Path) -> None:
    """Features of the same image are then the same in both; options that give other features are refused."""
    out, place = tmp_path / "val", Path("plan", "pca.safetensors")
    plain = [value for value in OPTIONS if value not in ("--pca", 8)]
    command = ("--shards", shards / "train-0001.tar", "--out", out, *plain, "--pca-from")
    text = run("precompute", *command, store, "--norm", "layer", "--dry-run", status=1)
    assert (
        "norm: the store has 'model', this run has 'layer'. Give the options of the backbone that store was made with"
        in text
    )
    assert "8 channels stored" in run("precompute", *command, store, "--dry-run")
    assert "input 6 = ok 6 + failed 0" in run("precompute", *command, store)
    assert (out / place).read_bytes() == (store / place).read_bytes()
    whole, part = (FeatureDataset(str(url), ["features"]) for url in (store, out))
    assert torch.equal(whole[7]["features"], part[0]["features"])
    other = tmp_path / "other"
    shutil.copytree(store, other)
    pca = load_pca(store / place)
    (other / place).write_bytes(pca_bytes(replace(pca, components=-pca.components)))
    # So is a PCA that is not the one its store was made with: it gave features of cosine -1, and exit status 0.
    assert "the file was replaced" in run("precompute", *command, other, status=1)
    assert (out / place).read_bytes() == (store / place).read_bytes()
    assert "0 to do with 0 samples" in run("precompute", *command, store)


VIEWS = {
    "multiview": ("--upsampler", "multiview", "--views", 6, "--fit-seed", 5, "--view-base", "bilinear"),
    "implicit": ("--upsampler", "implicit", "--fit-steps", 20, "--fit-views", 6, "--fit-seed", 5),
}


@pytest.mark.ray
@pytest.mark.parametrize("name", VIEWS)
def test_features_of_views_go_into_the_store_with_their_quality(shards: Path, tmp_path: Path, name: str) -> None:
    """Whatever batches and units the images come in, a field is the one the image has alone."""
    from pipeline.decode.options import DecodeOptions
    from pipeline.decode.sample import prepare_sample
    from tests.pipeline.inputs.tars import iterate_tar

    out = tmp_path / "store"
    tar = shards / "train-0001.tar"
    run("precompute", "--shards", tar, "--out", out, *OPTIONS, *VIEWS[name], "--output-size", 96)
    run("verify", out)
    (sample,) = [one for number, (_, one) in enumerate(iterate_tar(str(tar))) if number == 4]
    image = prepare_sample(sample, DecodeOptions(size=(96, 96), geometry="squash")).image
    images = torch.from_numpy(image)[None]
    backbone = create_backbone("test_vit", stride=16, image_size=(64, 64))
    pca = load_pca(out / "plan" / "pca.safetensors")
    upsampler = {
        "multiview": MultiView(backbone, Interpolate("bilinear"), MultiViewOptions(views=6, held_out=4, seed=5)),
        "implicit": Implicit(backbone, pca, replace(FAST, steps=20, views=6, seed=5)),
    }[name]
    (field,) = upsampler.fields(backbone(resize_images(images, (64, 64))), images)
    stored = FeatureDataset(str(out), ["features"])[4]["features"]
    expected = field.query((96, 96), pca.as_channel_map())
    assert (stored - expected).abs().max() / expected.abs().max() < 2e-3
    index = pq.read_table(out / "index")
    explained = index["explained_variance"].to_pylist()
    assert explained[4] == pytest.approx(field.explained_variance, abs=1e-4)
    assert len(explained) == 6
    assert all(one is not None and one < 1 for one in explained)
    flags = index["flags"].to_pylist()[4]
    assert ("fit_no_better" in flags) == (field.explained_variance <= field.baseline_explained_variance)


@pytest.mark.ray
def test_a_damaged_receipt_costs_its_unit_alone_also_where_moved_input_is_compared(
    store: Path, shards: Path, tmp_path: Path
) -> None:
    """It ended the job, which could then never go on."""
    out = tmp_path / "copy"
    shutil.copytree(store, out)
    support.receipts(out)[1].write_bytes(b"{")
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    text = run("precompute", "--shards", moved / "train-*.tar", "--out", out, *OPTIONS)
    assert "unit 1 is taken back and computed anew" in text
    assert "its 1 finished units compared with their receipts" in text
    assert "3 units done before, 1 to do with 3 samples" in text
    assert "input 13 = ok 13 + failed 0" in text
    assert support.array_files(out) == support.array_files(store)
