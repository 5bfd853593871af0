"""How fast records become training data: `python -m bench.data [--records 150000] [--images 2000] [--tokenizer FOLDER]`.

A synthetic LLaVA-Instruct of that size, one image in use for several records, converted as `make data` does it: without looking
at the images, then with their headers read, then with a model folder's tokenizer. Then the packing of as many samples of
LLaVA-like lengths into bins.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from qwen35.data.llava import Options, convert
from qwen35.data.packing import pack_epoch

CUTOFFS = (512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.data", description=__doc__)
    parser.add_argument("--records", type=int, default=150_000)
    parser.add_argument("--images", type=int, default=2_000, help="image files; records take them in turn")
    parser.add_argument("--tokenizer", type=Path, help="model folder; without one no record is tokenised")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        llava, images = write(Path(folder), args.records, args.images)
        print(f"{args.records:,} records, {llava.stat().st_size / 1e6:.0f} MB, {args.images:,} images")
        asked = {"images none": Options(llava, images, Path(folder) / "out.json", check="none")}
        asked["images headers"] = replace(asked["images none"], check="headers")
        if args.tokenizer:
            asked["tokens"] = replace(asked["images headers"], tokenizer=args.tokenizer)
        for what, options in asked.items():
            start = time.perf_counter()
            convert(options)
            print(f"make data, {what}: {args.records / (time.perf_counter() - start):,.0f} records/s")
        own, others = (
            resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(f"peak memory {own:.0f} MB, of the largest other process {others:.0f} MB")
    lengths = llava_lengths(args.records)
    for cutoff_len in CUTOFFS:
        cut = np.minimum(lengths, cutoff_len)
        start = time.perf_counter()
        bins = pack_epoch(cut, cutoff_len, seed=1, epoch=0)
        seconds = time.perf_counter() - start
        share, least = cut.sum() / (len(bins) * cutoff_len), fewest_bins(cut, cutoff_len)
        print(
            f"pack into {cutoff_len}: {share:.2%} of the tokens real, {len(bins):,} bins (no packing has fewer than "
            f"{least:,}), {seconds:.1f} s"
        )


def llava_lengths(count: int) -> np.ndarray:
    """[count] tokens: a long-tailed spread about 400, as images of 262,144 pixels with a conversation have."""
    return np.clip(np.random.default_rng(0).lognormal(5.9, 0.5, count).astype(int), 40, 2048)


def fewest_bins(lengths: np.ndarray, cutoff_len: int) -> int:
    """A bound: all tokens have to lie somewhere, and no two samples of more than half a bin share one."""
    return max(-(-int(lengths.sum()) // cutoff_len), int((2 * lengths > cutoff_len).sum()))


def write(folder: Path, records: int, images: int) -> tuple[Path, Path]:
    """-> the description file and the folder of its images."""
    chance, pictures = random.Random(0), folder / "train2017"
    pictures.mkdir()
    for i in range(images):
        Image.new("RGB", (chance.randint(320, 640), chance.randint(320, 640)), (i % 256, 90, 90)).save(
            pictures / f"{i:012}.jpg"
        )
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(2000)]
    llava = folder / "llava.json"
    with llava.open("w", encoding="utf-8") as stream:
        for i in range(records):
            turns = []
            for turn in range(chance.choice((1, 1, 1, 3, 4))):
                asked = "<image>\n" * (turn == 0) + " ".join(chance.choices(words, k=12))
                answer = " ".join(chance.choices(words, k=chance.randint(20, 120)))
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            record = {"id": f"{i:012}", "image": f"{i % images:012}.jpg", "conversations": turns}
            stream.write(("[" if i == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    return llava, pictures


if __name__ == "__main__":
    main()
