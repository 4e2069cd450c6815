import numpy as np
import onnx_ir as ir
import pytest

from bitswitch.export.layers import _is_nonnegative


def chain(*ops):
    """The result of operations on an input, each (type, bounds)."""
    value = ir.Value(name="x")
    for i, (op, bounds) in enumerate(ops):
        constants = [ir.Value(name=f"{i}.{j}", const_value=ir.tensor(np.float32(x))) for j, x in enumerate(bounds)]
        value = ir.node(op, [value, *constants], outputs=[ir.Value(name=str(i))]).outputs[0]
    return value


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ([], False),
        ([("Relu", ())], True),
        ([("Sigmoid", ())], True),
        ([("Tanh", ())], False),
        ([("Gelu", ())], False),
        ([("Clip", (0.0, 6.0))], True),
        ([("Clip", (-1.0, 6.0))], False),
        ([("Relu", ()), ("MaxPool", ()), ("Transpose", ())], True),
        ([("Gelu", ()), ("MaxPool", ())], False),
        ([("Relu", ()), ("Neg", ())], False),
        ([("MaxPool", ())], False),
    ],
)
def test_what_is_never_negative(ops, expected):
    assert _is_nonnegative(chain(*ops)) is expected
