"""How fast records become training data: `python -m bench.data [--records 150000] [--images 2000]`.

A synthetic LLaVA-Instruct, whose records share images, is converted as by `make data`: without
reading the images, with their headers, and with a model folder's tokenizer (--tokenizer). Then as
many samples of LLaVA-like lengths are packed.
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
    parser.add_argument("--images", type=int, default=2_000, help="image files, which the records share")
    parser.add_argument("--tokenizer", type=Path, help="model folder; default: no record is tokenised")
    args = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        llava, images = write(Path(folder), args.records, args.images)
        print(f"{args.records:,} records, {llava.stat().st_size / 1e6:.0f} MB, {args.images:,} images")
        options = {"images none": Options(llava, images, Path(folder) / "out.json", check="none")}
        options["images headers"] = replace(options["images none"], check="headers")
        if args.tokenizer:
            options["tokens"] = replace(options["images headers"], tokenizer=args.tokenizer)
        for what, of_run in options.items():
            start = time.perf_counter()
            convert(of_run)
            print(f"make data, {what}: {args.records / (time.perf_counter() - start):,.0f} records/s")
        own, others = (
            resource.getrusage(who).ru_maxrss / 1e3 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(f"peak memory {own:.0f} MB, of its largest subprocess {others:.0f} MB")
    lengths = llava_lengths(args.records)
    for cutoff_len in CUTOFFS:
        truncated = np.minimum(lengths, cutoff_len)
        start = time.perf_counter()
        bins = pack_epoch(truncated, cutoff_len, seed=1, epoch=0)
        seconds = time.perf_counter() - start
        share, least = truncated.sum() / (len(bins) * cutoff_len), fewest_bins(truncated, cutoff_len)
        print(
            f"packed to {cutoff_len} tokens: {share:.2%} without padding, {len(bins):,} packed sequences (at least "
            f"{least:,} are needed), {seconds:.1f} s"
        )


def llava_lengths(count: int) -> np.ndarray:
    """[count] tokens of an image of 262,144 pixels with a conversation, about 400 on average."""
    return np.clip(np.random.default_rng(0).lognormal(5.9, 0.5, count).astype(int), 40, 2048)


def fewest_bins(lengths: np.ndarray, cutoff_len: int) -> int:
    """A lower bound: all tokens need room, and two samples of over half cutoff_len do not fit."""
    return max(-(-int(lengths.sum()) // cutoff_len), int((2 * lengths > cutoff_len).sum()))


def write(folder: Path, records: int, images: int) -> tuple[Path, Path]:
    """-> the file of records, the folder of its images."""
    rng, pictures = random.Random(0), folder / "train2017"
    pictures.mkdir()
    for i in range(images):
        Image.new("RGB", (rng.randint(320, 640), rng.randint(320, 640)), (i % 256, 90, 90)).save(
            pictures / f"{i:012}.jpg"
        )
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]
    llava = folder / "llava.json"
    with llava.open("w", encoding="utf-8") as stream:
        for i in range(records):
            turns = []
            for turn in range(rng.choice((1, 1, 1, 3, 4))):
                asked = "<image>\n" * (turn == 0) + " ".join(rng.choices(words, k=12))
                answer = " ".join(rng.choices(words, k=rng.randint(20, 120)))
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            record = {"id": f"{i:012}", "image": f"{i % images:012}.jpg", "conversations": turns}
            stream.write(("[" if i == 0 else ",\n") + json.dumps(record))
        stream.write("]")
    return llava, pictures


if __name__ == "__main__":
    main()
