"""Explained variance of held-out views against CPU seconds of the implicit fit, on real photographs.

    python benchmarks/implicit.py --tar VAL.tar --weights WEIGHTS.safetensors [--size 224] [--images 2]
        [--preset fast] [--set steps=100 views=50] ... [--every 100]

Each ``--set`` is one fit with these options in place of the preset's, on one thread. The explained variance is that of
32 views that no fit has seen, in the space of the PCA of the image's own views: once through the fit's own downsampler,
once by patch means, as for bilinear interpolation. ``--every`` reports it after so many steps as well.
"""

import argparse
import dataclasses
import io
import tarfile
import time
from ast import literal_eval

import numba
import numpy as np
import torch
from PIL import Image

from featup.backbones import create_backbone
from featup.images import resize_images
from featup.multiview.back_projection import view_consistency
from featup.multiview.fitting import views_explained
from featup.multiview.implicit import FAST, PAPER, Fit
from featup.multiview.view_features import view_features
from featup.multiview.views import Jitter, View
from featup.upsamplers import Interpolate

JITTER = Jitter(max_pad=30, zoom=(1.0, 1.8), zoom_share=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tar", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--preset", choices=["fast", "paper"], default="fast")
    parser.add_argument("--set", nargs="*", action="append", metavar="OPTION=VALUE")
    parser.add_argument("--every", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    size = (args.size, args.size)
    backbone = create_backbone(args.backbone, weights=args.weights, image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3)
    titles = ("image", "options", "steps", "CPU s", "own downsampler", "patch means", "bilinear")
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for number, photograph in enumerate(_images(args.tar, args.images)):
        image = resize_images(photograph, size)
        with torch.no_grad():
            features = backbone(image)
        views = JITTER.sample(32, size, torch.Generator().manual_seed(1000 + number))
        targets = view_features(backbone, image, views, JITTER.max_pad)
        for settings in args.set or [[]]:
            changes = {name: literal_eval(value) for name, _, value in (one.partition("=") for one in settings)}
            options = dataclasses.replace({"fast": FAST, "paper": PAPER}[args.preset], **changes)
            name, evaluating, started = f"{args.preset} {' '.join(settings)}", 0.0, time.process_time()
            fit = Fit(backbone, None, options, image)
            for step in fit.steps():
                if step == options.steps or (args.every and step and step % args.every == 0):
                    now = time.process_time()
                    scores = _scores(fit, features, views, targets)
                    cells = [number, name, step, f"{now - started - evaluating:.1f}", *(f"{one:.4f}" for one in scores)]
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)
                    evaluating += time.process_time() - now


@torch.no_grad()
def _scores(fit: Fit, features: torch.Tensor, views: list[View], targets: torch.Tensor) -> tuple[float, float, float]:
    """Explained variance through the fit's own downsampler, by patch means, and of bilinear interpolation."""
    to_pca, projected = fit.pca.as_channel_map(), fit.pca.project(targets)
    maps = fit.field(features, fit.image).query(fit.size, to_pca)
    bilinear = Interpolate("bilinear")(features, fit.image, fit.size, to_pca)[0]
    own = views_explained(fit.model, maps, views, projected, JITTER.max_pad)
    means, baseline = (float(view_consistency(one, views, projected, JITTER)) for one in (maps, bilinear))
    return own, means, baseline


def _images(path: str, count: int) -> list[torch.Tensor]:
    with tarfile.open(path) as tar:
        members = [one for one in tar.getmembers() if one.name.endswith(".jpg")]
        files = [tar.extractfile(one) for one in members[:count]]
        return [
            torch.from_numpy(np.asarray(Image.open(io.BytesIO(one.read())).convert("RGB")).copy())[None]
            for one in files
            if one is not None
        ]


if __name__ == "__main__":
    main()
