"""The integer law: which integers a bit-width has, and how a code of `high` bits becomes one of `low` bits.

Integers in, integers out, on NumPy arrays and torch tensors alike, with the same answers. Training's forward, the loader
of artifacts, export and the runtime all narrow with `narrow`, so that codes are equal everywhere to the last bit.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from bitswitch.errors import UserError

LEAST_BITS = 2
MOST_BITS = 8

Codes = TypeVar("Codes", bound=Any)


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return `widths` as a tuple, or raise.

    Raises:
        UserError: a width is not a whole number from 2 to 8, or the widths do not strictly descend.
    """
    if not isinstance(widths, (list, tuple)) or not widths:
        raise UserError(f"bits={widths!r}: give a list of bit-widths, highest first, such as [8,6,4,2]")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, np.integer)) or not LEAST_BITS <= width <= MOST_BITS:
            raise UserError(f"bits={tuple(widths)}: {width!r} is not a bit-width; use whole numbers from 2 to 8")
    if any(after >= before for before, after in pairwise(widths)):
        raise UserError(f"bits={tuple(widths)}: list each bit-width once, highest first, such as [8,6,4,2]")
    return tuple(int(width) for width in widths)


def signed_range(bits: int) -> tuple[int, int]:
    """The least and the greatest two's complement integer of `bits` bits.

    >>> signed_range(8), signed_range(2)
    ((-128, 127), (-2, 1))
    """
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def unsigned_range(bits: int) -> tuple[int, int]:
    """The least and the greatest unsigned integer of `bits` bits.

    >>> unsigned_range(4)
    (0, 15)
    """
    return 0, (1 << bits) - 1


def narrow(q: Codes, high: int, low: int) -> Codes:
    """Narrow signed codes of `high` bits to `low` bits: the second rounding of Double Rounding (arXiv 2502.01199).

    `q_l = clip((q_h + 2^(D-1)) >> D, -2^(l-1), 2^(l-1) - 1)` with `D = high - low`: ties go up (half-up), not to even.

    Args:
        q: codes in `signed_range(high)`, a NumPy array or torch tensor of a signed integer type, any shape.
        high: the width of `q`, at most 8.
        low: the width wanted, at least 2. Either width may be a 0-dim integer tensor, which is not checked: so one
            compiled graph serves all widths.

    Returns:
        Codes of the same type and shape, in `signed_range(low)`. `q` itself where the widths are equal.

    Raises:
        UserError: the widths are not `2 <= low <= high <= 8`.
        TypeError: `q` does not hold signed integers.

    >>> narrow(np.array([-128, -33, -32, 31, 32, 127], np.int8), 8, 2)
    array([-2, -1,  0,  0,  1,  1], dtype=int8)
    """
    high, low = _plain(high), _plain(low)
    if _nothing_to_narrow(q, high, low):
        return q
    q = _plus_half(q, high, high - low)
    q >>= high - low
    return q


def narrow_in_unit(q: Codes, high: int, low: int) -> Codes:
    """`narrow(q, high, low) * 2^(high - low)`: the narrowed codes in the unit of `q`, so that one scale serves every width.

    Args, returns, raises: see `narrow`.

    >>> narrow_in_unit(np.array([-128, -33, -32, 31, 32, 127], np.int8), 8, 2)
    array([-128,  -64,    0,    0,   64,   64], dtype=int8)
    """
    high, low = _plain(high), _plain(low)
    if _nothing_to_narrow(q, high, low):
        return q
    q = _plus_half(q, high, high - low)
    # The bits that a shift would drop and bring back as zeros. It takes a third of the time of torch's shift of bytes.
    q &= -(1 << (high - low))
    return q


def _plain(width: Any) -> Any:
    # NumPy's scalars would bring their own type into the codes.
    return int(width) if isinstance(width, np.integer) else width


def _nothing_to_narrow(q: Any, high: int, low: int) -> bool:
    plain = isinstance(high, int) and isinstance(low, int)
    if plain and not LEAST_BITS <= low <= high <= MOST_BITS:
        raise UserError(f"cannot narrow from {high} to {low} bits: need {LEAST_BITS} <= low <= high <= {MOST_BITS}")
    if not str(q.dtype).removeprefix("torch.").startswith("int"):
        raise TypeError(f"codes are signed integers, not {q.dtype}")
    return plain and high == low


def _plus_half(q: Codes, high: int, shift: int) -> Codes:
    """Half a step added, as hardware rounds before it shifts.

    What would leave int8 by the addition has the greatest code anyway; the least code needs no clipping. One array, few
    passes over it: this runs at every switch.
    """
    half = (1 << shift) >> 1
    q = q.clip(max=signed_range(high)[1] - half)
    q += half
    return q


def bits_read(high: int, low: int) -> int:
    """How many of the most significant bits of a code of `high` bits `narrow` looks at: the rest may be anything.

    `low` bits and the one below, which rounds; all of them where there is nothing to narrow.

    >>> [bits_read(8, low) for low in (8, 7, 6, 4, 2)]
    [8, 8, 7, 5, 3]
    """
    return min(low + 1, high)
