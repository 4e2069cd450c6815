"""How fast training batches come, in images/s: from memory, and through DataLoader for every number of workers.

python benchmarks/loader.py FOLDER [--workers 0 1 2] [--batch-size 128] [--seconds 5] [--json PATH]

FOLDER is an image folder. From memory it is read where its images are of one size; through DataLoader it is read as ImageNet
is (random crops of 224 x 224). What is decoded or checked the first time is kept in the cache: the second run opens faster.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

import result
from bitswitch.data import Batches, DataSet, MemoryDataSet, load_data
from bitswitch.errors import UserError
from bitswitch.machine import machine
from bitswitch.pipeline import choose_device


def rate(batches: Batches, seconds: float, device: torch.device) -> dict[str, Any]:
    """Images/s over at least `seconds`, start of the workers apart."""
    began = time.perf_counter()
    endless = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())
    next(endless)
    first, images = time.perf_counter(), 0
    while time.perf_counter() - first < seconds:
        images += len(next(endless)[1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"images_per_second": images / (time.perf_counter() - first), "first_batch_seconds": first - began}


def opened(name: str, folder: Path, **words: Any) -> tuple[DataSet, float]:
    began = time.perf_counter()
    return load_data(name, folder, **words), time.perf_counter() - began


def measure(path: str, data: DataSet, seconds: float, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    device = choose_device(options.device)
    row = {"path": path, "open_seconds": seconds, "shape": list(data.preprocessing.shape)} | more
    row |= {"images": {split: data.size(split) for split in ("train", "val", "test")}}
    batches = data.training_batches(batch_size=options.batch_size, seed=0, device=device)
    row |= rate(batches, options.seconds, device)
    print(
        f"{path:<8} {more.get('workers', '-')!s:>3} workers: {row['images_per_second']:>9,.0f} images/s of {row['shape']}, "
        f"first batch after {row['first_batch_seconds']:.2f} s, opened in {seconds:.1f} s, {row['images']}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's, in this process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    data, seconds = opened("image_folder", options.folder)
    if not data.size("train"):
        raise UserError(f"{options.folder} has no train/: there is nothing to train on")
    if isinstance(data, MemoryDataSet):
        rows.append(measure("memory", data, seconds, options))
    else:
        print("memory: these images differ in size, or are too many")
    for workers in options.workers:
        data, seconds = opened("imagenet", options.folder, workers=workers)
        rows.append(measure("files", data, seconds, options, workers=workers))
    if options.json is not None:
        result.write(
            options.json,
            title="Training batches, images/s",
            machine=machine(choose_device(options.device)),
            data=options.folder.name,
            split="train",
            columns=["from", "workers", "images/s", "first batch s", "opened s"],
            rows=[
                [row["path"], row.get("workers", "-")]
                + [round(row[key], 2) for key in ("images_per_second", "first_batch_seconds", "open_seconds")]
                for row in rows
            ],
            note=f"Batches of {options.batch_size}, on {options.device}.",
            measured=rows,
        )


if __name__ == "__main__":
    result.run(main)
