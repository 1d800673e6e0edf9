"""Speed and ratio of codecs on the features of a store, chunk by chunk, on one core, in one run.

python benchmarks/compression.py out/train
"""

import argparse
import time

import numpy as np
from numcodecs import blosc

from pipeline.loader.dataset import FeatureDataset
from pipeline.store.layout import open_arrays, stored_layout
from pipeline.store.writer import round_mantissa

CODECS = (("zstd", 1), ("zstd", 3), ("lz4", 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    layout = stored_layout(args.store)
    rows = FeatureDataset(args.store).rows
    rows = rows[:: max(1, len(rows) // args.images)][: args.images]
    features = open_arrays(args.store, ["features"])["features"]
    images = [np.asarray(features[int(row)]) for row in rows]
    blosc.set_nthreads(1)
    print("| codec, bit-shuffled | mantissa bits | writes GB/s | reads GB/s | ratio |\n| --- | --- | --- | --- | --- |")
    for bits in (10, 7, 5):
        rounded = [image.copy() for image in images]
        for image in rounded:
            round_mantissa(image, bits)
        height, width = layout.tile
        chunks = [
            np.ascontiguousarray(image[y : y + height, x : x + width])
            for image in rounded
            for y in range(0, layout.height, height)
            for x in range(0, layout.width, width)
        ]
        total = sum(chunk.nbytes for chunk in chunks)
        for name, level in CODECS:
            started = time.perf_counter()
            packed = [blosc.compress(chunk, name.encode(), level, blosc.BITSHUFFLE) for chunk in chunks]
            middle = time.perf_counter()
            for data in packed:
                blosc.decompress(data)
            end = time.perf_counter()
            ratio = total / sum(map(len, packed))
            write, read = total / (middle - started) / 1e9, total / (end - middle) / 1e9
            print(f"| {name} {level} | {bits} | {write:.2f} | {read:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
