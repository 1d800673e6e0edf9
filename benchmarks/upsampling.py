"""Milliseconds of the upsamplers and of the backbone's forward pass, one image at a time, in one run.

    python benchmarks/upsampling.py [--backbone vit_small_patch16_224] [--size 224] [--threads 2]

The weights are random: the table shows speed only.
"""

import argparse
import time
from collections.abc import Callable

import numba
import torch

from featup.backbones import create_backbone
from featup.upsamplers import JBU, Bilateral, ChannelMap, Interpolate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pca", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numba.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (args.size, args.size)
    backbone = create_backbone(args.backbone, image_size=size).to(device)
    image = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, device=device)
    upsamplers = [Interpolate("bilinear"), Bilateral(), JBU(backbone.channels).eval().to(device)]
    with torch.inference_mode():
        features = backbone(image)
        projection = ChannelMap(torch.randn(args.pca, backbone.channels), torch.zeros(args.pca))
        forward = _milliseconds(lambda: backbone(image), device)
        print(f"| {args.backbone} {args.size}x{args.size}, {device} | ms | of the backbone |\n| --- | --- | --- |")
        print(f"| backbone, forward | {forward:.1f} | 1.00 |")
        for upsampler in upsamplers:
            for channel_map in (None, projection):
                channels = backbone.channels if channel_map is None else args.pca
                out = torch.empty(1, *size, channels, dtype=torch.float16, device=device)
                run = _run(upsampler, features, image, size, channel_map, out)
                upsampling = _milliseconds(run, device)
                print(f"| {upsampler.name}, {channels} channels | {upsampling:.1f} | {upsampling / forward:.2f} |")


def _run(upsampler: torch.nn.Module, *args: object) -> Callable[[], object]:
    return lambda: upsampler(*args)


def _milliseconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """The fastest of ``rounds`` runs, after one that compiles."""
    best = float("inf")
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


if __name__ == "__main__":
    main()
