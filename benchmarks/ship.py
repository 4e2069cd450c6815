"""Put a trained artifact into the package, with its graph, and write down what it reaches there.

    python benchmarks/ship.py NAME RUN/model.safetensors --data CIFAR_FOLDER --json results/shipped/NAME.json

Every number is of the file in the package: top-1 in torch as `bitswitch evaluate NAME --data CIFAR_FOLDER` gives it, top-1 of a
session, and the bytes that `bitswitch.load` reads. A SuperNet's file has a row for each choice of its frontier, too.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

import accuracy
import agreement
import bitswitch
import result
from bitswitch import artifact, files
from bitswitch.artifact.planes import plane_bytes
from bitswitch.codes import bits_read
from bitswitch.deployment import CALIBRATION_IMAGES
from bitswitch.evaluation import evaluate_file
from bitswitch.export import add_graph
from bitswitch.runtime import Session

SHIPPED = Path(bitswitch.__file__).parent / "shipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("file", type=Path, help="of a run")
    parser.add_argument("--data", required=True, help="folder with train/ and test/")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The package's file is replaced when all is measured.
        path = Path(shutil.copy(options.file, Path(folder) / f"{options.name}.safetensors"))
        ship(path, options)
        files.write(SHIPPED / path.name, path.read_bytes())


def ship(path: Path, options: argparse.Namespace) -> None:
    """Put the graph into the file, measure it, and write that down."""
    header = artifact.read_header(path)
    data = accuracy.images_for(header, options.data)
    add_graph(path, data.sample(CALIBRATION_IMAGES))
    device = torch.device("cpu")
    scores = evaluate_file(path, data_name=options.data, device=device)["results"]
    if header.frontier:
        with tempfile.TemporaryDirectory() as folder:
            frontier = Path(folder) / "frontier.json"
            files.write_json(frontier, {"choices": list(header.frontier)})
            scores += evaluate_file(path, assignment=str(frontier), data_name=options.data, device=device)["results"]
    batches = [(x.numpy(), y.numpy()) for x, y in data.evaluation_batches("test", batch_size=256, device=device)]
    labels = torch.cat([torch.from_numpy(y) for _, y in batches]).numpy()
    planes, graph = header.widths[0], artifact.read(path)[1]["graph"].nbytes
    plane = plane_bytes([layer.shape for layer in header.layers])
    known = header.provenance
    rows = []
    for score in scores:
        widths = score["assignment"] or {layer.name: score["bits"] for layer in header.layers}
        unread = planes - max(bits_read(planes, width) for width in widths.values())
        session = Session(path, assignment=widths)
        answers = agreement.logits(session.run, batches).argmax(1)  # type: ignore[arg-type]
        top1, (low, high) = score["top1"], score["top1_interval"]
        rows.append(
            [
                score["bits"] or f"{statistics.mean(widths.values()):.2f} ({''.join(map(str, widths.values()))})",
                round(top1, 2),
                f"{low:.2f}-{high:.2f}",
                round(known["float_top1"] - top1, 2),
                round(100 * float((answers == labels).mean()), 2),
                path.stat().st_size - graph - unread * plane,
            ]
        )
        print(rows[-1], flush=True)
    config = known["config"]
    last = f" and {config['supernet']['epochs']} of the SuperNet" if header.frontier else ""
    result.write(
        options.json,
        title=options.name,
        data=accuracy.label(data.fingerprint()),
        split="test",
        seeds=[known["seed"]],
        columns=[
            "bits",
            "top-1 %",
            "95 % interval",
            "below float",
            "top-1 % of a session",
            "bytes read",
        ],
        rows=rows,
        note=(
            f"Float {known['float_top1']:.2f} %. Recipe {known['recipe']}, {config['train']['epochs']} joint epochs{last}, at "
            f"commit {str(known['commit'])[:12]}; `bitswitch inspect {options.name} --json` has every override."
        ),
        sha256=files.file_digest(path),
        config=config,
    )


if __name__ == "__main__":
    result.run(main)
