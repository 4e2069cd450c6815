from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitswitch.codes import check_widths, narrow, narrow_in_unit, signed_range, unsigned_range
from bitswitch.errors import UserError

PAIRS = [(high, low) for high in range(2, 9) for low in range(2, high + 1)]
NUMPY_TYPES = [np.int8, np.int16, np.int32, np.int64]
TORCH_TYPES = [torch.int8, torch.int16, torch.int32, torch.int64]


def exact(code, high, low):
    rounded = floor(Fraction(code, 2 ** (high - low)) + Fraction(1, 2))
    return max(-(2 ** (low - 1)), min(2 ** (low - 1) - 1, rounded))


def every_code(high):
    return list(range(-(2 ** (high - 1)), 2 ** (high - 1)))


def reference(high, low):
    return [exact(code, high, low) for code in every_code(high)]


@pytest.mark.parametrize("dtype", NUMPY_TYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_numpy_narrows_every_code_exactly(high, low, dtype):
    got = narrow(np.array(every_code(high), dtype), high, low)
    assert got.dtype == dtype
    assert got.tolist() == reference(high, low)


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_torch_narrows_every_code_exactly(high, low, dtype):
    got = narrow(torch.tensor(every_code(high), dtype=dtype), high, low)
    assert got.dtype == dtype
    assert got.tolist() == reference(high, low)


@pytest.mark.parametrize("dtype", [*NUMPY_TYPES, *TORCH_TYPES], ids=str)
@pytest.mark.parametrize(("high", "low"), PAIRS)
def test_narrowed_codes_in_the_unit_of_the_wide_ones(high, low, dtype):
    make = torch.tensor if isinstance(dtype, torch.dtype) else np.array
    codes = make(every_code(high), dtype=dtype)
    got = narrow_in_unit(codes, high, low)
    assert got.dtype == codes.dtype
    assert got.tolist() == [code * 2 ** (high - low) for code in reference(high, low)]
    assert codes.tolist() == every_code(high)


@pytest.mark.parametrize("width", [np.int8, np.uint8, np.uint64, np.int64], ids=lambda t: t.__name__)
@pytest.mark.parametrize("function", [narrow, narrow_in_unit])
def test_widths_of_numpy_are_widths(function, width):
    codes = np.array(every_code(8), np.int8)
    got = function(codes, width(8), width(2))
    assert got.dtype == np.int8 and got.tolist() == function(codes, 8, 2).tolist()


@pytest.mark.parametrize(("high", "low"), [pair for pair in PAIRS if pair[0] > pair[1]])
def test_narrowing_is_no_bare_shift_and_no_rounding_to_even(high, low):
    codes = np.array(every_code(high))
    got = narrow(codes, high, low)
    inside = got < signed_range(low)[1]
    assert (got != codes >> (high - low)).any()
    # Below the top code, where clipping cannot hide it, the bare shift is one too low for half of all codes.
    floored = (codes >> (high - low))[inside]
    assert ((got[inside] - floored) == (codes[inside] >> (high - low - 1)) % 2).all()
    if low > 2:
        even = np.round(codes / 2 ** (high - low))[inside]
        assert (got[inside] != even).any()


@pytest.mark.parametrize(
    ("code", "high", "low", "wanted"),
    [(1, 8, 7, 1), (-1, 8, 7, 0), (-3, 8, 7, -1), (3, 8, 7, 2), (127, 8, 2, 1), (-96, 8, 2, -1), (-97, 8, 2, -2)],
)
def test_ties_go_up(code, high, low, wanted):
    assert narrow(np.array([code], np.int8), high, low).tolist() == [wanted]
    assert narrow(torch.tensor([code], dtype=torch.int8), high, low).tolist() == [wanted]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4), (1, 1, 1, 1)])
def test_any_shape(shape):
    codes = np.arange(int(np.prod(shape)), dtype=np.int8).reshape(shape)
    from_numpy, from_torch = narrow(codes, 8, 4), narrow(torch.from_numpy(codes), 8, 4)
    assert from_numpy.shape == shape
    assert tuple(from_torch.shape) == shape
    assert (from_numpy == from_torch.numpy()).all()


def test_not_contiguous():
    codes = np.arange(-128, 128).astype(np.int8).reshape(16, 16)
    assert (narrow(codes.T[::2], 8, 3) == narrow(codes, 8, 3).T[::2]).all()
    turned = torch.from_numpy(codes).T[::2]
    assert (narrow(turned, 8, 3).numpy() == narrow(codes, 8, 3).T[::2]).all()


def test_equal_widths_return_the_codes_themselves():
    codes = np.array([-8, 7], np.int8)
    assert narrow(codes, 4, 4) is codes


@pytest.mark.parametrize(("high", "low"), [(4, 8), (9, 8), (9, 2), (8, 1), (8, 0), (8, -2), (1, 1), (0, 0), (16, 8)])
def test_bad_widths_are_refused(high, low):
    for codes in (np.zeros(3, np.int8), torch.zeros(3, dtype=torch.int8)):
        with pytest.raises(UserError, match=f"from {high} to {low}"):
            narrow(codes, high, low)


@pytest.mark.parametrize(
    "codes",
    [
        *(np.zeros(3, t) for t in (np.float16, np.float32, np.float64, np.uint8, np.uint16, np.uint64, bool)),
        *(torch.zeros(3, dtype=t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.bool)),
    ],
    ids=lambda codes: f"{type(codes).__name__}-{codes.dtype}",
)
@pytest.mark.parametrize(("high", "low"), [(8, 4), (8, 8)])
def test_only_signed_integers_are_codes(codes, high, low):
    with pytest.raises(TypeError, match="signed integers"):
        narrow(codes, high, low)


@pytest.mark.parametrize("bits", range(2, 9))
def test_ranges(bits):
    assert signed_range(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert unsigned_range(bits) == (0, 2**bits - 1)


@pytest.mark.parametrize("widths", [(8, 6, 4, 2), [4, 3, 2], (8,), (2,), (8, 7, 6, 5, 4, 3, 2), (np.int64(8), 4)])
def test_good_widths_become_a_tuple_of_int(widths):
    got = check_widths(widths)
    assert got == tuple(widths)
    assert type(got) is tuple
    assert {type(width) for width in got} == {int}


@pytest.mark.parametrize(
    "widths",
    [
        *(0, 1, 8, 9, "8", "8642", "", (), [], (0,), (1,), (9,), (8, 1), (9, 8), (8, 0), (-2,)),
        *((2, 4), (8, 2, 4), (8, 8), (8, 4, 4, 2), (True,), (8, True), (False,), (8.0,), (8, 4.0), ("8",), (None,)),
    ],
    ids=repr,
)
def test_bad_lists_of_widths_are_refused(widths):
    with pytest.raises(UserError, match="bits="):
        check_widths(widths)


@st.composite
def codes_and_widths(draw):
    high = draw(st.integers(2, 8))
    low = draw(st.integers(2, high))
    least, greatest = -(2 ** (high - 1)), 2 ** (high - 1) - 1
    codes = draw(st.lists(st.integers(least, greatest), max_size=40))
    return codes, high, low, draw(st.sampled_from(NUMPY_TYPES))


@given(codes_and_widths())
def test_laws(drawn):
    codes, high, low, dtype = drawn
    array = np.array(codes, dtype)
    tensor = torch.from_numpy(array.copy())
    got = narrow(array, high, low)
    assert got.dtype == dtype
    assert array.tolist() == codes
    assert got.tolist() == narrow(tensor, high, low).tolist()
    assert tensor.tolist() == codes
    least, greatest = -(2 ** (low - 1)), 2 ** (low - 1) - 1
    assert all(least <= code <= greatest for code in got.tolist())
    by_code = sorted(zip(codes, got.tolist(), strict=True))
    assert all(before[1] <= after[1] for before, after in pairwise(by_code))
