"""All the jobs on a few photographs, from shards to pictures: what they do, seen in a few minutes.

A feature store by bilateral upsampling; AnyUp, where its weights can be had; JBU trained for about a minute, which
shows that it runs and not what it can do; and of one photograph the average of views and the network fitted to it.

featup demo --out out/demo
featup demo --backbone mobilenetv1_100 --weights mobilenetv1.safetensors --stride 16
"""

import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featup.errors import WeightsError
from pipeline.options import Size

from . import CommandParser, at_least, exit_status

if TYPE_CHECKING:
    from featup.projection import PCA
    from pipeline.compute.models import Extractor
    from pipeline.config.precompute import PrecomputeConfig

# About a minute on two cores.
TRAINING_STEPS = 30
FITTED = "chelsea"
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "motorcycle", "retina", "rocket")


def main(argv: list[str] | None = None) -> int:
    """Write shards, run the jobs on them, verify the store, make a picture of each photograph."""
    return exit_status("demo", lambda: _run(argv))


def _run(argv: list[str] | None) -> bool:
    parser = CommandParser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for shards, store and pictures")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2.lvd142m", help="a timm model")
    parser.add_argument("--weights", help="local file with its weights; by default timm's are downloaded")
    parser.add_argument("--stride", type=at_least(1), help="choose the feature map by its stride, for CNNs")
    args = parser.parse_args(argv)
    args.out = args.out.expanduser()
    from pipeline.config.precompute import PrecomputeConfig

    for folder in ("store", "jbu"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    shards = _write_shards(args.out / "shards")
    config = PrecomputeConfig(
        shards=(str(args.out / "shards" / "photographs-*.tar"),),
        out=str(args.out / "store"),
        backbone=args.backbone,
        weights=args.weights,
        stride=args.stride,
        geometry="center_crop",
        size=Size(224, 224),
        pca=64,
        rows_per_shard=4,
    )
    print(f"{len(shards)} shards written to {args.out / 'shards'}", flush=True)
    if args.weights is None:
        config = replace(config, pretrained=_weights_to_be_had(config))

    from pipeline.cluster.precompute import precompute
    from pipeline.cluster.verify import verify

    precompute(config)
    report = verify(config.out, config.object_store_mb)
    print(f"verify: {report.text()}", flush=True)
    _train(config, args.out / "jbu")
    pictures = _pictures(config, args.out / "jbu" / "last.safetensors", args.out / "pictures")
    note = "" if config.pretrained or config.weights else " (of RANDOM features: the backbone has no trained weights)"
    print(f"{len(pictures)} pictures{note} in {args.out / 'pictures'}", flush=True)
    return report.clean


def _write_shards(folder: Path) -> list[Path]:
    """The photographs that scikit-image ships, as JPEG in two WebDataset shards."""
    import io

    import skimage.data
    import webdataset
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("photographs-*.tar"):
        old.unlink()
    with webdataset.ShardWriter(str(folder / "photographs-%04d.tar"), maxcount=4, verbose=0) as writer:
        for name in PHOTOGRAPHS:
            pixels = skimage.data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(skimage.data, name)()
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=92)
            writer.write({"__key__": name, "jpg": encoded.getvalue()})
    return sorted(folder.glob("photographs-*.tar"))


def _weights_to_be_had(config: "PrecomputeConfig") -> bool:
    """Whether timm's trained weights can be downloaded, or have been before; says so where they cannot."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=5).close()
    except (urllib.error.URLError, OSError):
        # Asked of the cache alone: the hub's client would try for a minute before it gave up.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from featup.backbones import create_backbone

    try:
        create_backbone(config.backbone, pretrained=True, image_size=config.size)
    except WeightsError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        print(
            f"no trained weights, going on with random ones: the pictures show random features ({reason})", flush=True
        )
        return False
    return True


def _train(config: "PrecomputeConfig", out: Path) -> None:
    """A JBU for the store's backbone, on the store's photographs."""
    import ray

    from pipeline.cluster.train import train
    from pipeline.config.base import InputConfig
    from pipeline.config.train import TrainConfig

    # Ray Train's logs go where they are told only in a Ray that was started for it.
    ray.shutdown()
    shared = {one.name: getattr(config, one.name) for one in fields(InputConfig)} | {"out": str(out)}
    train(TrainConfig(**shared, steps=TRAINING_STEPS, holdout=2, evaluate_every=15, checkpoint_every=15))


def _pictures(config: "PrecomputeConfig", checkpoint: Path, folder: Path) -> list[Path]:
    """For each photograph: itself, coarse features, bilinear, what the store holds, AnyUp, JBU; of one more."""
    import numpy as np
    import torch
    from PIL import Image

    from featup.pictures import pca_colours, side_by_side
    from featup.upsamplers import Interpolate
    from pipeline.compute.load import decode_options, load_sample
    from pipeline.compute.models import Extractor
    from pipeline.inputs.plan import Plan
    from pipeline.loader.dataset import FeatureDataset
    from pipeline.store.index import read_index
    from pipeline.store.provenance import stored_pca

    folder.mkdir(parents=True, exist_ok=True)
    pca, _ = stored_pca(config.out)
    extractor = Extractor(config, pca)
    jbu = Extractor(replace(config, upsampler="jbu", checkpoint=str(checkpoint)), pca)
    whole_set = {
        **({} if (anyup := _anyup(config, pca)) is None else {"anyup (published weights)": anyup}),
        f"jbu after {TRAINING_STEPS} steps": jbu,
    }
    of_one = {
        f"multiview ({config.views} views)": Extractor(replace(config, upsampler="multiview"), pca),
        "implicit (a network for this image)": Extractor(replace(config, upsampler="implicit"), pca),
    }
    options = decode_options(config, extractor.backbone.mean)
    plan = Plan.from_json(Path(config.out, "plan/plan.json").read_bytes(), f"{config.out}/plan/index")
    index: dict[int, dict[str, Any]] = {row["row"]: row for row in read_index(config.out).to_pylist()}
    shard_numbers = {shard.url: number for number, shard in enumerate(plan.shards)}
    written = []
    dataset = FeatureDataset(config.out)
    trained = "" if config.pretrained or config.weights else " (random weights)"
    for number in range(len(dataset)):
        sample = dataset[number]
        row = int(sample["row"])
        key = plan.unit(index[row]["unit"])
        shard = plan.index(shard_numbers[index[row]["shard"]])
        image = load_sample(shard, key.start + row - key.row, options).image
        images = torch.from_numpy(image[None])
        features = extractor.features(images)
        low = pca.project(features.cpu())
        bilinear = Interpolate("bilinear")(low, images, config.target_size)
        maps = [low[0].numpy(), bilinear[0].numpy(), sample["features"].numpy()]
        titles = [
            f"{low.shape[1]}x{low.shape[2]} {config.backbone.split('.')[0]}{trained}",
            "bilinear",
            f"{config.upsampler} (the store)",
        ]
        for title, other in (whole_set | (of_one if index[row]["key"] == FITTED else {})).items():
            upsampled = torch.empty(1, *config.target_size, len(pca.components))
            started = time.perf_counter()
            fits = other.upsample(features, images, upsampled)
            for fit in fits:
                print(
                    f"{title}, {FITTED}: {time.perf_counter() - started:.0f} s; of the variance of views held "
                    f"out it explains {fit.explained_variance:.3f}, bilinear "
                    f"{fit.baseline_explained_variance:.3f}",
                    flush=True,
                )
            maps.append(upsampled[0].numpy())
            titles.append(title)
        panels = [("image", np.asarray(image)), *zip(titles, pca_colours(maps), strict=True)]
        path = folder / f"{index[row]['key']}.png"
        Image.fromarray(side_by_side(panels)).save(path)
        written.append(path)
    return written


def _anyup(config: "PrecomputeConfig", pca: "PCA") -> "Extractor | None":
    """AnyUp by its published weights; says so where they cannot be had."""
    from pipeline.compute.models import Extractor

    try:
        return Extractor(replace(config, upsampler="anyup"), pca)
    except WeightsError as error:
        print(f"no AnyUp in the pictures: {str(error).partition('. ')[0]}", flush=True)
        return None


if __name__ == "__main__":
    sys.exit(main())
