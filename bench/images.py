"""How fast photographs become patches: `python -m bench.images [--images 200]`.

JPEG files of COCO's size are read and made into the vision tower's patches, by qwen35 and by
transformers' image processor on Pillow, alternating on one thread; then by qwen35 in one process
per core. It stops if the two do not give the same numbers.
"""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qwen35.data.image_processor import ImageProcessor
from qwen35.tools.tiny import make_model

PIXELS = (1024, 262144)  # least and most of an image, the recipes' defaults
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.images", description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="files of 640 x 480 pixels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder) / "photographs", args.images)
        make_model(Path(folder) / "model")
        own = ImageProcessor.from_folder(Path(folder) / "model", *PIXELS)
        peer = peer_processor(Path(folder) / "model")
        readers = {"qwen35": partial(read, own), "transformers": partial(read_as_peer, peer)}
        if not torch.equal(*(reader(files[0]) for reader in readers.values())):
            raise SystemExit("qwen35 and transformers do not give the same patches")
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(ROUNDS):
            for name, reader in readers.items():
                start = time.perf_counter()
                for file in files:
                    reader(file)
                rates[name].append(len(files) / (time.perf_counter() - start))
        for name, values in rates.items():
            print(
                f"{name}: {statistics.median(values):.0f} images/s in one process ({min(values):.0f} to {max(values):.0f})"
            )
        print(f"ratio {statistics.median(rates['qwen35']) / statistics.median(rates['transformers']):.2f}")
        with ProcessPoolExecutor(cores) as pool:
            values = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                sum(pool.map(partial(count, own), files, chunksize=10))
                values.append(len(files) / (time.perf_counter() - start))
        print(f"qwen35: {statistics.median(values[1:]):.0f} images/s in {cores} processes")


def write(folder: Path, count: int) -> list[Path]:
    """Soft shapes with some noise, so that a file has the size of a photograph's, about 80 KB."""
    folder.mkdir()
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(shapes, dtype=np.int16) + rng.integers(-12, 13, (480, 640, 3))
        files.append(folder / f"{i:012}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    print(f"{count} files of {statistics.mean(file.stat().st_size for file in files) / 1e3:.0f} KB")
    return files


def read(processor: ImageProcessor, file: Path) -> Tensor:
    return processor.patches(file)[0]


def count(processor: ImageProcessor, file: Path) -> int:
    return len(read(processor, file))


def peer_processor(folder: Path) -> Any:
    package = "transformers.models.qwen2_vl."
    try:
        peer_class = import_module(f"{package}image_processing_pil_qwen2_vl").Qwen2VLImageProcessorPil
    except ModuleNotFoundError:  # its name in transformers 5.2
        peer_class = import_module(f"{package}image_processing_qwen2_vl").Qwen2VLImageProcessor
    peer = peer_class.from_pretrained(folder)
    peer.size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    if hasattr(peer, "min_pixels"):  # where 5.2 looks
        peer.min_pixels, peer.max_pixels = PIXELS
    return peer


def read_as_peer(processor: Any, file: Path) -> Tensor:
    with Image.open(file) as image:
        patches: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    return patches


if __name__ == "__main__":
    main()
