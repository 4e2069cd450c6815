import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitswitch.artifact import Header, LayerEntry
from bitswitch.codes import narrow
from bitswitch.errors import UserError
from bitswitch.runtime import executable, protobuf
from bitswitch.runtime.bindings import Bindings, Constant, Product, Quantizer
from bitswitch.runtime.constants import may_saturate, values
from bitswitch.runtime.whole_bias import GREATEST_BIAS, whole_bias, with_room

WIDTHS = (8, 6, 4, 2)


def header(kind="unsigned", widths=WIDTHS):
    errors = dict.fromkeys(widths, 0.0)
    layer = LayerEntry(name="a", shape=(3, 2, 1, 1), bits=widths[0], input=kind, squared_error=errors)
    return Header(
        widths=widths,
        layers=(layer,),
        norms={"n": "a"},
        per_channel=False,
        before={"n": None},
        transitional=False,
        frontier=(),
        network=None,
        preprocessing=None,
        classes=None,
        provenance={},
        checksums={},
    )


def tensors(count=4):
    rng = np.random.default_rng(0)
    return {
        "a.codes": np.array([[-128, 127], [33, -32], [5, -90]], np.int8).reshape(3, 2, 1, 1),
        "a.weight_scale": np.asarray(0.02, np.float32),
        "a.input_scale": np.float32(0.01) * np.array([1, 4, 17, 85], np.float32)[:count],
        "a.input_offset": np.full(count, -0.3, np.float32),
        "n.weight": np.array([1.5, -0.7, 0.0], np.float32) * np.ones((count, 1), np.float32),
        "n.bias": rng.normal(size=(count, 3)).astype(np.float32),
        "n.running_mean": rng.normal(size=(count, 3)).astype(np.float32),
        "n.running_var": rng.uniform(0.5, 2, size=(count, 3)).astype(np.float32),
    }


def product(kind="conv", **options):
    defaults = {"prefix": "p", "layer": "a", "into": None, "ranges": (), "common_ranges": ()}
    defaults |= {"bias": None, "norm": None, "epsilon": 1e-5}
    return Product(kind=kind, **defaults | options)


def bindings(*products, quantizers=(), constants=()):
    return Bindings(additions="exact", quantizers=quantizers, products=products, constants=constants)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("norm", [None, "n"])
def test_a_convolution_is_its_float_form(width, norm):
    """Codes, scale and integer bias against `narrow(q) s_h 2^(h-l)` and the batch normalization in float64."""
    found = values(bindings(product(norm=norm)), header(), tensors(), {"a": width})
    row = WIDTHS.index(width)
    t = {name: array.astype(np.float64) for name, array in tensors().items()}
    weight = narrow(tensors()["a.codes"], 8, width)[..., 0, 0] * (t["a.weight_scale"] * 2 ** (8 - width))
    a, c = np.ones(3), np.zeros(3)
    if norm:
        a = t["n.weight"][row] / np.sqrt(t["n.running_var"][row] + 1e-5)
        c = t["n.bias"][row] - t["n.running_mean"][row] * a
    assert np.allclose(
        found["p.codes"][..., 0, 0] * found["p.scale"][:, None].astype(float), weight * a[:, None], rtol=1e-6
    )
    assert np.allclose(found["p.bias_scale"], found["p.scale"] * t["a.input_scale"][row], rtol=1e-6)
    assert (
        np.abs(found["p.bias"] * found["p.bias_scale"].astype(float) - c) <= np.abs(found["p.bias_scale"]) * 1.01
    ).all()
    assert found["p.bias"].dtype == np.int32 and found["p.codes"].dtype == np.int8


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["unsigned", "signed", "zero_point"])
def test_below_8_bits_no_two_products_exceed_16_bits(width, kind):
    a = {"a": width}
    found = values(bindings(product()), header(kind), tensors(), a)
    greatest = {"unsigned": 2**width - 1, "zero_point": 2**width - 1, "signed": 127 + 2 ** (width - 1)}[kind]
    magnitude = int(np.abs(found["p.codes"].astype(int)).max())
    assert may_saturate(bindings(product()), header(kind), found, a) == (width == 8)
    assert (2 * magnitude * greatest <= 2**15) == (width < 8)
    # As far as they can be shifted, so that the bias is fine.
    full = -int(narrow(np.array([-128], np.int8), 8, width)[0])
    assert width == 8 or 2 * (2 * magnitude) * greatest > 2**15 or 2 * magnitude > 128 or magnitude < full


def test_codes_are_not_shifted_where_they_are_to_be_packed():
    found = values(bindings(product()), header(), tensors(), {"a": 2}, filled=lambda width: width > 4)
    assert np.array_equal(found["p.codes"], narrow(tensors()["a.codes"], 8, 2))


def test_other_candidate_widths():
    codes = {**tensors(3), "a.codes": narrow(tensors()["a.codes"], 8, 4)}
    for width in (4, 3, 2):
        found = values(bindings(product()), header(widths=(4, 3, 2)), codes, {"a": width})
        expected = narrow(codes["a.codes"], 4, width) * (0.02 * 2 ** (4 - width))
        assert np.allclose(found["p.codes"] * found["p.scale"].reshape(3, 1, 1, 1), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "width", "least", "greatest", "expected"),
    [
        ("unsigned", 8, None, None, (0, 0, 255, False)),
        ("unsigned", 4, None, None, (0, 0, 15, True)),
        ("unsigned", 8, 0.0, 6.0, (0, 0, 255, False)),
        ("unsigned", 8, 0.0, 2.003, (0, 0, 200, True)),
        ("signed", 8, None, None, (128, 0, 255, False)),
        ("signed", 2, None, None, (128, 126, 129, True)),
        ("signed", 2, 0.0, None, (128, 128, 129, True)),
        ("zero_point", 8, None, None, (30, 0, 255, False)),
        ("zero_point", 2, None, None, (0, 0, 3, True)),
    ],
)
def test_a_quantizer_is_bytes(kind, width, least, greatest, expected):
    quantizer = Quantizer(prefix="q", layer="a", least=least, greatest=greatest, nonnegative=False)
    found = values(bindings(quantizers=(quantizer,)), header(kind), tensors(), {"a": width}, saturating=True)
    assert tuple(int(found[f"q.{key}"]) for key in ("zero", "low", "high", "clips")) == tuple(map(int, expected))
    assert found["q.scale"] == tensors()["a.input_scale"][WIDTHS.index(width)]


@pytest.mark.parametrize("kind", ["unsigned", "signed", "zero_point"])
@pytest.mark.parametrize("greatest", [None, 2.003])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_bytes_own_saturation_clips_what_is_never_negative(kind, width, greatest):
    """`saturate(round(x / s) + zero)` is the clipped code, wherever no clip is left."""
    quantizer = Quantizer(prefix="q", layer="a", least=None, greatest=greatest, nonnegative=True)
    given = bindings(quantizers=(quantizer,)), header(kind), tensors(), {"a": width}
    plain, found = values(*given), values(*given, saturating=True)
    x = np.concatenate([np.linspace(0, 3, 1000, dtype=np.float32), np.float32([0.0, 1e9, np.inf])])

    def codes(arrays):
        bytes_ = np.clip(np.round(x / arrays["q.scale"]) + int(arrays["q.zero"]), 0, 255)
        if arrays["q.clips"]:
            bytes_ = np.clip(bytes_, arrays["q.low"], arrays["q.high"])
        return bytes_ - int(arrays["q.zero"])

    assert np.array_equal(codes(found), codes(plain))
    if kind == "unsigned":
        assert plain["q.clips"] == (width < 8 or greatest is not None) and not found["q.clips"]


def test_a_closed_channel_keeps_its_bias():
    t = tensors() | {"n.weight": np.array([0.0, 1e-30, 1e-9], np.float32) * np.ones((4, 1), np.float32)}
    for kind, ranges in (("conv", ()), ("branch", (((-4.0,) * 3, (4.0,) * 3),) * 4), ("int32", ()), ("float", ())):
        found = values(bindings(product(kind, norm="n", ranges=ranges)), header(), t, {"a": 8})
        assert all(np.isfinite(array).all() for array in found.values())
        a = t["n.weight"][0] / np.sqrt(t["n.running_var"][0] + 1e-5)
        c = t["n.bias"][0] - t["n.running_mean"][0] * a
        if kind == "conv":
            assert np.allclose(found["p.bias"] * found["p.bias_scale"].astype(float), c, rtol=1e-5)
        elif kind == "branch":
            byte = np.clip(np.round(found["p.bias"] * found["p.bias_scale"].astype(float)), 0, 255)
            assert (np.abs(byte * found["p.step"] + found["p.offset"] - c) <= found["p.step"] / 2).all()
        else:
            assert np.allclose(found["p.offset" if kind == "int32" else "p.bias"].ravel(), c, rtol=1e-5)


def test_codes_that_leave_room_for_their_bias_stand_for_the_same_weights():
    codes = np.array([[100, -50], [100, -50], [100, -50]], np.int8)
    scale, least = np.array([0.01, -0.01, -0.05]), 0.02
    found, coarser = with_room(codes, scale, np.full(3, least * GREATEST_BIAS))
    assert np.allclose(np.abs(coarser), [least, least, 0.05]) and np.array_equal(found[2], codes[2])
    assert np.allclose(found * coarser[:, None], codes * scale[:, None], atol=least / 2)


def test_every_sum_of_two_bits_has_a_byte_of_its_own():
    """A branch whose channels hold few sums is exact."""
    p = product("branch", norm="n", ranges=(((-8.0,) * 3, (8.0,) * 3),) * 4)
    t = tensors() | {"n.weight": np.array([1.5, -0.7, 0.4], np.float32) * np.ones((4, 1), np.float32)}
    found = values(bindings(p), header(), t, {"a": 2})
    x = np.stack(np.meshgrid(*[np.arange(4)] * 2), -1).reshape(-1, 2)
    sums = x @ found["p.codes"][..., 0, 0].T.astype(int) + found["p.bias"]
    bytes_ = np.round(sums * found["p.bias_scale"].astype(float))
    weight = narrow(t["a.codes"], 8, 2)[..., 0, 0] * (0.02 * 64)
    a = t["n.weight"][3] / np.sqrt(t["n.running_var"][3] + 1e-5)
    expected = (x * float(t["a.input_scale"][3])) @ weight.T * a + t["n.bias"][3] - t["n.running_mean"][3] * a
    inside = np.abs(expected) < 8
    assert inside.any() and np.allclose(
        (bytes_ * found["p.step"] + found["p.offset"])[inside], expected[inside], atol=1e-5
    )
    assert (bytes_[inside] >= 0).all() and (bytes_[inside] <= 255).all()


def wrong_codes(bias, thresholds, step, whole, factor):
    """How many codes step up at another sum than with the real bias."""
    exact = np.ceil((thresholds - bias[:, None]) / step)
    found = np.ceil((thresholds * factor[:, None] - whole[:, None]) / step)
    return (exact != found).sum(1)


@given(
    st.floats(-1e4, 1e4),
    st.lists(st.floats(-1e4, 1e4).filter(lambda t: abs(t) > 0.5), min_size=1, max_size=3),
    st.sampled_from([1, 4, 16, 64]),
)
def test_a_whole_bias_is_as_good_as_the_nearest_one_or_better(bias, thresholds, step):
    bias, thresholds = np.array([bias]), np.array([thresholds])
    whole, factor, moved = whole_bias(bias, thresholds, np.ones_like(thresholds), step)
    assert whole == np.round(whole) and abs(whole - bias) <= 1.5
    # A code at the very end of an interval, by a rounding, is no matter: float32 has it so.
    wrong = wrong_codes(bias, thresholds, step, whole, factor)
    assert wrong <= wrong_codes(bias, thresholds, step, np.round(bias), np.ones(1)) + 1
    assert abs(moved[0] * thresholds.shape[1] - wrong) < 1 + 1e-6


def test_with_room_below_the_bias_every_code_steps_up_where_it_should():
    """Codes of 4 bits: hardly ever a wrong one, where rounding the bias alone makes some in every fourth channel."""
    rng = np.random.default_rng(0)
    # A step of the codes is 2.5 to 60 steps of the sums, as networks have it.
    thresholds = np.exp(rng.uniform(np.log(2.5), np.log(60), (2000, 1))) * 16 * (np.arange(15) + 0.5)
    bias = rng.normal(size=2000) * thresholds[:, -1] / 2
    whole, factor, moved = whole_bias(bias, thresholds, np.ones_like(thresholds), 16)
    wrong = wrong_codes(bias, thresholds, 16, whole, factor)
    rounded = wrong_codes(bias, thresholds, 16, np.round(bias), np.ones(2000))
    assert (wrong > 0).mean() < 0.03
    # All thresholds count alike here.
    assert np.allclose(moved * thresholds.shape[1], wrong, atol=1e-6)
    assert (rounded > 0).mean() > 0.1
    assert np.abs(factor - 1).max() < 0.1


def test_a_place_where_one_interval_ends_and_the_next_begins_is_none():
    """The thresholds of codes are odd multiples of one number, so that ends of their intervals coincide."""
    rng = np.random.default_rng(0)
    thresholds = np.exp(rng.uniform(np.log(40), np.log(900), (4000, 1))) * (np.arange(15) + 0.5)
    bias = rng.normal(size=4000) * 300
    whole, factor, _ = whole_bias(bias, thresholds, np.ones_like(thresholds), 16)
    at = (thresholds * factor[:, None] - whole[:, None]) / 16
    # As far from every sum as float32 can tell.
    assert np.abs(at - np.round(at)).min() > 1e-6


def test_without_a_reader_the_bias_is_rounded():
    whole, factor, moved = whole_bias(np.array([0.4, -7.6]), np.zeros((2, 0)), np.zeros((2, 0)), 16)
    assert whole.tolist() == [0, -8] and factor.tolist() == [1, 1] and moved.tolist() == [0, 0]


def test_bindings_are_text_and_back():
    quantizer = Quantizer(prefix="q", layer="a", least=0.0, greatest=None, nonnegative=False)
    constant = Constant(tensor="n.bias", dtype="float32", norm="n")
    given_ = bindings(
        product("bytes or sums", ranges=(((-1.0,) * 3, (2.0,) * 3),) * 4, common_ranges=((-1.0, 2.0, 0.01),) * 4),
        quantizers=(quantizer,),
        constants=(constant,),
    )
    assert Bindings.from_text(given_.to_text()) == given_
    found = values(given_, header(), tensors(), {"a": 4})
    assert np.array_equal(found["n.bias"], tensors()["n.bias"][2])


def test_no_two_parts_have_the_same_constants():
    quantizer = Quantizer(prefix="p", layer="a", least=0.0, greatest=None, nonnegative=False)
    for given_ in (bindings(product(), quantizers=(quantizer,)), bindings(product(), product())):
        with pytest.raises(ValueError, match="a prefix given twice"):
            given_.check(header(), tensors())
    bindings(product(), product(prefix="q")).check(header(), tensors())


def test_the_probe_is_what_it_says():
    weights = np.full((8, 8, 1, 1), 127, np.int8)
    constants = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "wzero": np.int8(0),
        "scale": np.float32(1100),
        "w": weights,
    }
    node = onnx.helper.make_node("QLinearConv", ["x", "one", "zero", "w", "one", "wzero", "scale", "zero"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, executable._PROBE_SHAPE) for name in "xy"]
    arrays = [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([node], "probe", info[:1], info[1:], arrays)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 10)], ir_version=5, producer_name=""
    )
    assert model.SerializeToString() == executable._PROBE


def test_a_convolution_that_is_wrong_even_when_precise_is_refused(monkeypatch):
    monkeypatch.setattr(executable, "_convolves", lambda *, precise: False)
    with pytest.raises(UserError, match="wrongly"):
        executable._must_be_precise(may_saturate=True)
    monkeypatch.setattr(executable, "_convolves", lambda *, precise: precise)
    assert executable._must_be_precise(may_saturate=True) and not executable._must_be_precise(may_saturate=False)


def test_a_model_is_looked_into_as_onnx_does():
    model = onnx.load_model_from_string(executable._PROBE)
    onnx.helper.set_model_props(model, {"a": "b", "empty": ""})
    content = model.SerializeToString()
    assert protobuf.metadata(content) == {"a": "b", "empty": ""}
    assert protobuf.operations(content) == {"QLinearConv": 1}


@given(st.binary(max_size=60))
def test_anything_else_is_refused_or_empty(content):
    try:
        assert all(number >= 0 for number, _ in protobuf.fields(memoryview(content)))
    except UserError as error:
        assert "damaged" in str(error)


RANGES = (((-4.0, -3.0, -4.5), (4.0, 5.0, 4.0)),) * 4


# The steps of their channels, 1/255 of the ranges, lose 0.0093 by rounding.
@pytest.mark.parametrize(("greatest", "loss", "alike"), [(5.0, 0.011, True), (5.0, 0.018, True), (5.0, 0.019, False)])
def test_one_scale_for_all_channels_of_a_branch_where_it_costs_little(greatest, loss, alike):
    """Each form's bytes stand for the convolution, to half a step of its own; one scale for all costs at most 6 dB."""
    t = tensors()
    p = product("bytes or sums", norm="n", ranges=RANGES, common_ranges=((-4.5, greatest, loss),) * 4)
    found = values(bindings(p), header(), t, {"a": 8})
    assert bool(found["p.in_bytes"]) and bool(found["p.alike"]) == alike
    x = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 2), -1).reshape(-1, 2)
    sums = (x @ found["p.codes"][..., 0, 0].T.astype(int) + found["p.bias"]) * found["p.bias_scale"].astype(float)
    a = t["n.weight"][0] / np.sqrt(t["n.running_var"][0] + 1e-5)
    weight = t["a.codes"][..., 0, 0] * 0.02
    expected = (x * 0.01) @ weight.T * a + t["n.bias"][0] - t["n.running_mean"][0] * a
    if alike:
        zero, step = int(found["p.common_zero"]), found["p.common_step"]
        stands_for = (np.clip(np.round(sums) + zero, 0, 255) - zero) * step
        inside = (expected > -4.4) & (expected < greatest - 0.1)
    else:
        step = found["p.step"]
        stands_for = np.clip(np.round(sums), 0, 255) * step + found["p.offset"]
        inside = (expected > np.array(RANGES[0][0])) & (expected < np.array(RANGES[0][1]))
    assert inside.mean() > 0.5
    assert (np.abs(stands_for - expected) <= 0.51 * step * np.ones(3))[inside].all()
