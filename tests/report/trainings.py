"""Result files of trainings, made up."""

QUANTITIES = [f"{side}_{name}" for side in ("weight", "input") for name in ("scale", "move", "mean")]


def training(variant, seed, *, top1, drop, schedule="decide", bits=(8, 2), epochs=2):
    """A result file in which every width has the same numbers."""
    score = {"top1": top1, "top5": 99.0, "loss": 0.5, "drop": drop, "images": 10}
    splits = ("val", "test") if schedule in ("decide", "long") else ("val",)
    return {
        "title": "T",
        "command": "c",
        "data": "CIFAR-10, JPEG-compressed",
        "split": "val",
        "seeds": [seed],
        "commit": "abcdef0123456789",
        "commits": ["abcdef0123456789"],
        "machine": {"device": "cpu", "threads": 2, "torch": "2"},
        "columns": [],
        "rows": [],
        "schedule": schedule,
        "variant": variant,
        "overrides": [],
        "changed": [f"train.alrs={variant}"],
        "epochs": epochs,
        "bits": list(bits),
        "stored_bytes": 123_456,
        "final": {str(b): dict.fromkeys(splits, score) for b in bits},
        "curves": {str(b): {"top1": [top1 - 1, top1][:epochs]} for b in bits},
        "means_over_layers": {str(b): {name: [0.001, 0.25] for name in (*QUANTITIES, "gradient_norm")} for b in bits},
    }
