"""Integer matrix products of patches: neighbours that share a patch have the same sums."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bitswitch as bs
from bitswitch.artifact import read
from bitswitch.export import patches
from bitswitch.export.onnx import export_file
from bitswitch.runtime import Session
from bitswitch.runtime.packing import unpacked


def network(channels, kernel, filters, **options):
    torch.manual_seed(0)
    middle = nn.Conv2d(channels, filters, kernel, bias=False, **options)
    parts = nn.Conv2d(3, channels, 1), nn.ReLU(), middle, nn.BatchNorm2d(filters), nn.Sigmoid()
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, 4)).eval()


@pytest.mark.parametrize(
    ("channels", "kernel", "filters", "options", "width", "shares"),
    [
        (5, 3, 6, {"padding": 1}, 10, True),
        (16, (3, 5), 32, {"padding": (1, 2)}, 8, True),
        # Their rows are of whole pairs where they are padded so, and only there.
        (5, (1, 3), 6, {}, 10, True),
        (5, 3, 6, {"padding": 1}, 9, False),
        (5, 3, 6, {"padding": (0, 2)}, 8, True),
        (5, (3, 2), 6, {}, 9, False),
        (5, (3, 1), 6, {}, 10, False),
        (17, 3, 6, {"padding": 1}, 10, False),
        (5, 3, 33, {"padding": 1}, 10, False),
        (5, 3, 6, {"padding": 1, "stride": (1, 2)}, 10, False),
        (5, 3, 6, {"padding": 1, "stride": (2, 1), "dilation": (2, 1)}, 10, True),
        (5, 3, 6, {"padding": 2, "dilation": 2}, 10, False),
    ],
)
def test_neighbours_that_share_a_patch(monkeypatch, tmp_path, channels, kernel, filters, options, width, shares):
    """The same outputs to the last bit as with a patch for each, at every width and for any batch."""
    x = torch.randn(4, 3, 7, width, generator=torch.Generator().manual_seed(1))
    model = bs.quantize(network(channels, kernel, filters, **options), bits=(8, 6, 2), example_inputs=x)
    files = tmp_path / "shared", tmp_path / "own"
    for file, most in zip(files, (patches._MOST_SHARING_CHANNELS, 0), strict=True):
        monkeypatch.setattr(patches, "_MOST_SHARING_CHANNELS", most)
        bs.save(model, file, example_inputs=x, additions="exact")
    assert [b"neighbours" in unpacked(read(file)[1]["graph"]) for file in files] == [shares, False]
    for bits in (8, 6, 2):
        shared, own = (Session(file, bits=bits) for file in files)
        for batch in (1, 3):
            assert np.array_equal(shared.run(x[:batch].numpy()), own.run(x[:batch].numpy()))
        with torch.no_grad(), bs.switched(model, bits):
            assert np.allclose(shared.run(x.numpy()), model(x).numpy(), atol=1e-4)


def test_an_onnx_file_has_the_matrices_of_patches_themselves(tmp_path):
    """Whoever reads the file finds quantized weights and their scales, not what would make them."""
    x = torch.randn(4, 3, 7, 10, generator=torch.Generator().manual_seed(1))
    model = bs.quantize(network(5, 3, 6, padding=1), bits=(8, 6, 2), example_inputs=x)
    bs.save(model, tmp_path / "m.safetensors", example_inputs=x, additions="exact")
    export_file(tmp_path / "m.safetensors", tmp_path / "m.onnx", wanted=6, model=model, example_inputs=x)
    graph = onnx.load(tmp_path / "m.onnx").graph
    held = {value.name: onnx.numpy_helper.to_array(value) for value in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    (product,) = (node for node in graph.node if node.op_type == "MatMul")
    codes, scale, zero = (held[name] for name in makers[product.input[1]].input)
    assert codes.shape == (3 * 4 * 5, 2 * 6) and codes.dtype == np.int8 and np.array_equal(scale[:6], scale[6:])
    assert not zero.any() and {name for node in graph.node for name in node.input} >= set(held)
