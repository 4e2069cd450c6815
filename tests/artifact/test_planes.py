import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitswitch.artifact.planes import pack, plane_bytes, unpack
from bitswitch.codes import bits_read, narrow, signed_range

WIDTHS = range(2, 9)


def every_code(bits):
    low, high = signed_range(bits)
    return np.arange(low, high + 1, dtype=np.int8)


@st.composite
def layers(draw):
    bits = draw(st.integers(2, 8))
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = signed_range(bits)
    return bits, [generator.integers(low, high + 1, shape).astype(np.int8) for shape in shapes]


def test_the_bytes_are_those_of_the_document():
    # Codes of 3 bits: 1 = 001, -4 = 100, 3 = 011; then a second layer, -1 = 111.
    planes = pack([np.array([1, -4, 3], np.int8), np.array([-1], np.int8)], 3)
    assert [plane.tolist() for plane in planes] == [
        [0b01000000, 0b10000000],
        [0b00100000, 0b10000000],
        [0b10100000, 128],
    ]
    assert all(plane.dtype == np.uint8 for plane in planes)
    assert plane_bytes([(3,), (1,)]) == 2 and plane_bytes([(2, 4), (9,)]) == 3


@given(layers())
@settings(deadline=None)
def test_unpacking_is_the_inverse_of_packing(case):
    bits, codes = case
    planes = pack(codes, bits)
    shapes = [layer.shape for layer in codes]
    assert len(planes) == bits and all(len(plane) == plane_bytes(shapes) for plane in planes)
    for layer, again in zip(codes, unpack(planes, shapes, bits=bits), strict=True):
        assert again.dtype == np.int8 and np.array_equal(layer, again)


@given(layers(), st.data())
@settings(deadline=None)
def test_planes_come_in_parts(case, data):
    bits, codes = case
    planes = pack(codes, bits)
    shapes = [layer.shape for layer in codes]
    held = data.draw(st.integers(0, bits))
    top = unpack(planes[:held], shapes, bits=bits)
    rest = unpack(planes[held:], shapes, bits=bits, first=held)
    for layer, a, b in zip(codes, top, rest, strict=True):
        assert np.array_equal(a | b, layer) and not (a & b).any()


@pytest.mark.parametrize("high", WIDTHS)
def test_narrowing_reads_these_bits_and_no_others(high):
    codes = every_code(high)
    for low in range(2, high + 1):
        dropped = high - bits_read(high, low)
        known = (codes >> dropped) << dropped
        assert np.array_equal(narrow(known, high, low), narrow(codes, high, low))
        # And it does look at the last of them.
        less = (codes >> (dropped + 1)) << (dropped + 1)
        assert not np.array_equal(narrow(less, high, low), narrow(codes, high, low))


@given(layers(), st.data())
@settings(deadline=None)
def test_a_width_from_its_planes_is_the_width_from_the_codes(case, data):
    bits, codes = case
    low = data.draw(st.integers(2, bits))
    planes = pack(codes, bits)[: bits_read(bits, low)]
    for layer, known in zip(codes, unpack(planes, [layer.shape for layer in codes], bits=bits), strict=True):
        assert np.array_equal(narrow(known, bits, low), narrow(layer, bits, low))


def test_bits_of_a_last_byte_that_no_weight_has_are_not_read():
    codes = [np.array([1, -2, 0], np.int8)]
    planes = [plane | 0b00011111 for plane in pack(codes, 2)]
    assert np.array_equal(unpack(planes, [(3,)], bits=2)[0], codes[0])


def test_a_large_layer():
    generator = np.random.default_rng(0)
    codes = [generator.integers(-128, 128, (64, 33, 3, 3)).astype(np.int8)]
    assert np.array_equal(unpack(pack(codes, 8), [codes[0].shape], bits=8)[0], codes[0])
    assert plane_bytes([codes[0].shape]) == math.ceil(codes[0].size / 8)
