"""What decoding in a child process costs: time and processor time of a sample, against decoding in this process.

    python benchmarks/decoding.py --shards 'imagenet/*.tar' --size 224
    python benchmarks/decoding.py --shards 'camvid/*.tar' --size 224 --labels seg

Both decode the same samples in turn, a few at a time, again and again; of each few the shortest time counts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import psutil

from pipeline.decode.options import DecodeOptions
from pipeline.decode.sample import PreparedSample, prepare_sample
from pipeline.decode.worker import DecoderProcess
from pipeline.errors import SampleError
from pipeline.inputs.patterns import expand
from pipeline.inputs.read import Sample, read_samples
from pipeline.inputs.tar_index import cached_index
from pipeline.options import Size

FEW = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", nargs="+", required=True, help="tars of samples")
    parser.add_argument("--size", type=int, default=224, help="height and width of the output, pixels")
    parser.add_argument("--labels", nargs="*", default=[], help="kinds of labels: seg, depth, cls")
    parser.add_argument("--samples", type=int, default=128, help="samples used")
    parser.add_argument("--rounds", type=int, default=20, help="how often each is decoded")
    args = parser.parse_args()
    options = DecodeOptions(Size(args.size, args.size), labels=tuple(args.labels))
    samples = read(args.shards, args.samples)
    decoder = DecoderProcess()
    started = time.perf_counter()
    decoder.prepare(samples[0], options)
    print(f"the child process starts in {time.perf_counter() - started:.2f} s")
    child = psutil.Process(decoder.pid)

    def processor_seconds() -> float:
        return time.process_time() + sum(child.cpu_times()[:2])

    ways: dict[str, Callable[[Sample, DecodeOptions], PreparedSample]] = {
        "in this process": prepare_sample,
        "in a child process": decoder.prepare,
    }
    groups = [samples[start : start + FEW] for start in range(0, len(samples), FEW)]
    shortest = {name: [float("inf")] * len(groups) for name in ways}
    busy = dict.fromkeys(ways, 0.0)
    for _ in range(args.rounds):
        for number, group in enumerate(groups):
            for name, way in ways.items():
                used, started = processor_seconds(), time.perf_counter()
                for sample in group:
                    way(sample, options)
                shortest[name][number] = min(shortest[name][number], time.perf_counter() - started)
                busy[name] += processor_seconds() - used
    sent = sum(len(data) for sample in samples for data in sample.values()) / len(samples)
    print(f"{len(samples)} samples of {sent / 1000:.0f} kB\n\n| decoding | ms a sample | processor ms a sample |")
    print("| --- | --- | --- |")
    for name in ways:
        wall = 1000 * sum(shortest[name]) / len(samples)
        print(f"| {name} | {wall:.2f} | {1000 * busy[name] / len(samples) / args.rounds:.2f} |")
    decoder.close()


def read(shards: list[str], count: int) -> list[Sample]:
    """The first samples of the shards."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="featup-bench-") as folder:
        for url in expand(shards):
            index = cached_index(url, folder)
            stop = min(len(index.samples), count - len(samples))
            samples += [sample for sample in read_samples(index, 0, stop) if not isinstance(sample, SampleError)]
    return samples


if __name__ == "__main__":
    main()
