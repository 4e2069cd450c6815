"""How well a session and an exported ONNX file agree with torch, on the test images of a data set. On the CPU.

    python benchmarks/agreement.py FILE --data digits [--data-root FOLDER] [--json results/agreement-digits.json]

FILE is a trained artifact. Its graph is made anew in both ways to add branches, calibrated on training images as `bitswitch
export` does; FILE itself is not touched. Then, at every width: the share of test images whose top-1 is torch's, and the
signal-to-noise ratio of the logits in dB, `10 log10(sum(torch^2) / sum((found - torch)^2))`.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import bitswitch as bs
import result
from bitswitch import artifact
from bitswitch.data import DataSet, Preprocessing, load_data
from bitswitch.deployment import CALIBRATION_IMAGES
from bitswitch.export import add_graph
from bitswitch.export.artifact import Additions
from bitswitch.export.onnx import export_file
from bitswitch.runtime import Session
from bitswitch.runtime.executable import Executable

COLUMNS = ["additions", "bits", "side", "top-1 % of torch", "top-1 %", "equal %", "SNR dB"]
BATCH = 256

Run = Callable[[np.ndarray], np.ndarray]


def logits(run: Run, batches: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.concatenate([run(images) for images, _ in batches]).astype(np.float64)


def row(
    additions: str, width: int, side: str, expected: np.ndarray, found: np.ndarray, labels: np.ndarray
) -> list[Any]:
    noise = np.square(found - expected).sum()
    return [
        additions,
        width,
        side,
        round(100 * float((expected.argmax(1) == labels).mean()), 2),
        round(100 * float((found.argmax(1) == labels).mean()), 2),
        round(100 * float((found.argmax(1) == expected.argmax(1)).mean()), 3),
        round(10 * float(np.log10(np.square(expected).sum() / noise)), 1) if noise else None,
    ]


def in_torch(model: torch.nn.Module, width: int) -> Run:
    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad(), bs.switched(model, width):
            return model(torch.from_numpy(images)).numpy()

    return run


def in_session(path: Path, width: int) -> Run:
    session = Session(path, bits=width)
    return lambda images: session.run(images)  # type: ignore[return-value]


def in_onnx(path: Path, width: int) -> Run:
    out = path.with_suffix(".onnx")
    export_file(path, out, wanted=width)
    executable = Executable(out.read_bytes(), {})
    return lambda images: executable.run([images])[0]


def measure(path: Path, data: DataSet, calibration: int, network: str | None) -> list[list[Any]]:
    device = torch.device("cpu")
    batches = [(x.numpy(), y.numpy()) for x, y in data.evaluation_batches("test", batch_size=BATCH, device=device)]
    labels = np.concatenate([y for _, y in batches])
    model = bs.load(path, model=network)
    widths = artifact.read_header(path).widths
    expected = {width: logits(in_torch(model, width), batches) for width in widths}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for additions in get_args(Additions):
            copy = Path(shutil.copy(path, Path(folder) / f"{additions}.safetensors"))
            add_graph(copy, data.sample(calibration), model=network, additions=additions)
            for width in widths:
                for side, make in (("session", in_session), ("ONNX", in_onnx)):
                    found = logits(make(copy, width), batches)
                    rows.append(row(additions, width, side, expected[width], found, labels))
                    print("  ".join(f"{cell!s:<16}" for cell in rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a trained artifact")
    parser.add_argument("--data", required=True, help="a data name")
    parser.add_argument("--data-root", type=Path, help="where they lie")
    parser.add_argument("--model", help="the network where the file does not name it")
    parser.add_argument("--calibration", type=int, default=CALIBRATION_IMAGES, help="training images for the ranges")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    header = artifact.read_header(options.file)
    data = load_data(options.data, root=options.data_root)
    if header.preprocessing is not None:
        data = data.with_preprocessing(Preprocessing.from_json(dict(header.preprocessing)))
    print("  ".join(f"{column:<16}" for column in COLUMNS))
    rows = measure(options.file, data, options.calibration, options.model)
    if options.json:
        about = {key: header.provenance.get(key) for key in ("recipe", "seed", "commit")}
        result.write(
            options.json,
            title=f"Sessions and ONNX files against torch, {options.data}",
            columns=COLUMNS,
            rows=rows,
            data=options.data,
            split="test",
            seeds=[header.provenance.get("seed", "unknown")],
            note=f"The artifact: {about}. Ranges of requantized branches from {options.calibration} training images. SNR of "
            "logits; none where they are torch's to the last bit.",
        )


if __name__ == "__main__":
    result.run(main)
