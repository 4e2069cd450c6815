"""A reader of artifacts, written from docs/artifact.md: no line is shared with the package, and no safetensors library is used.

python independent_reader.py FILE BITS prints what every quantized layer's weight is at that width.
"""

import hashlib
import json
import struct
import sys
from math import prod
from pathlib import Path

import numpy as np

TYPES = {"F32": "<f4", "I32": "<i4", "U8": "u1"}


def read(content: bytes, bits: int) -> tuple[dict, dict, dict]:
    """Header, float and int tensors, and {layer: float32 weight at `bits`}; of a whole file or of a prefix that holds them."""
    (length,) = struct.unpack_from("<Q", content)
    table = json.loads(content[8 : 8 + length])
    text = table.pop("__metadata__")["bitswitch"]
    header = json.loads(text)
    assert header["version"] == 2, header["version"]
    zeroed = text.replace(header["digest"], "0" * 64)
    assert hashlib.sha256(zeroed.encode("utf-8")).hexdigest() == header["digest"], "the header is altered"
    assert table.keys() == header["checksums"].keys()
    high = header["widths"][0]
    planes = [f"plane.{i}" for i in range(min(bits + 1, high))]
    tensors = {}
    for name, entry in table.items():
        if name in planes or not name.startswith("plane."):
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert end <= len(content), f"{name} is not in this prefix"
            kind = json.dumps([entry["dtype"], entry["shape"]], separators=(",", ":"))
            checksum = hashlib.sha256(kind.encode() + content[begin:end]).hexdigest()[:16]
            assert checksum == header["checksums"][name], f"{name} is altered"
            tensors[name] = np.frombuffer(content[begin:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    packed = [tensors.pop(name) for name in planes]
    weights, start = {}, 0
    for layer in header["layers"]:
        count = prod(layer["shape"])
        stop = start + -(-count // 8)
        code = np.zeros(count, np.int64)
        for i, plane in enumerate(packed):
            bit = (plane[start:stop, None] >> np.arange(7, -1, -1)).ravel()[:count] & 1
            code += bit.astype(np.int64) * (-(2 ** (high - 1)) if i == 0 else 2 ** (high - 1 - i))
        shift = high - bits
        if shift:
            code = np.minimum(np.floor(code / 2**shift + 0.5), 2 ** (bits - 1) - 1)
        scale = tensors[f"{layer['name']}.weight_scale".lstrip(".")] * np.float32(2**shift)
        weights[layer["name"]] = code.reshape(layer["shape"]).astype(np.float32) * scale
        start = stop
    return header, tensors, weights


if __name__ == "__main__":
    for layer, weight in read(Path(sys.argv[1]).read_bytes(), int(sys.argv[2]))[2].items():
        print(layer, weight.shape, weight.min(), weight.max())
