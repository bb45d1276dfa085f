"""Loads of many bytes at a time, by LLVM instructions that numba does not expose.

Offsets are int64 and there are no bounds checks: callers must make sure that the bytes exist. Little-endian machines
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

WIDTH = 64
_BYTE, _64 = ir.IntType(8), ir.IntType(64)
_Code = tuple[Any, Callable[..., Any]]


def _vector(value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_BYTE, WIDTH), [value] * WIDTH)


def _loaded(context: Any, builder: Any, array: Any, args: Any, kind: Any) -> Any:
    """An unaligned load of `kind` at offset args[1] of the array args[0]."""
    data = context.make_array(array)(context, builder, args[0]).data
    return builder.load(builder.bitcast(builder.gep(data, [args[1]]), kind.as_pointer()), align=1)


def _eight_bytes(typing: Any, data: Any, at: Any) -> _Code:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _loaded(context, builder, signature.args[0], args, _64)

    return numba.uint64(data, numba.int64), code


def _whole_in_words(typing: Any, data: Any, at: Any) -> _Code:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = _loaded(context, builder, signature.args[0], args, ir.VectorType(_BYTE, WIDTH))
        letter = builder.icmp_unsigned("<", builder.sub(builder.or_(x, _vector(32)), _vector(ord("a"))), _vector(26))
        digit = builder.icmp_unsigned("<", builder.sub(x, _vector(ord("0"))), _vector(10))
        line = builder.icmp_unsigned("==", x, _vector(ord("_")))
        beyond = builder.icmp_signed("<", x, _vector(0))
        every = builder.or_(builder.or_(letter, digit), builder.or_(line, beyond))
        return builder.bitcast(every, _64)

    return numba.uint64(data, numba.int64), code


def _first_bit(typing: Any, bits: Any) -> _Code:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return numba.int64(numba.uint64), code


def _popcount(typing: Any, bits: Any) -> _Code:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return numba.int64(numba.uint64), code


# (data, at): data[at : at + 8], uint8, as one little-endian uint64.
eight_bytes: Any = intrinsic(_eight_bytes)
# (bits): index of the lowest set bit of a uint64; 64 if there is none.
first_bit: Any = intrinsic(_first_bit)
# (bits): number of set bits of a uint64.
popcount: Any = intrinsic(_popcount)
_64_in_words: Any = intrinsic(_whole_in_words)


@numba.njit(nogil=True)
def in_words(data: Any, at: int, end: int) -> np.uint64:
    """A bit mask of data[at : min(at + 64, end)], uint8. A bit is set if the byte is an ASCII letter or digit, an
    underscore, or part of a non-ASCII character."""
    if at + WIDTH <= len(data):
        bits: np.uint64 = _64_in_words(data, at)
    else:
        bits = np.uint64(0)
        for i in range(at, min(end, len(data))):
            byte = data[i]
            low = byte | 32
            if byte >= 128 or 97 <= low < 123 or 48 <= byte < 58 or byte == 95:
                bits |= np.uint64(1) << np.uint64(i - at)
    if end - at < WIDTH:
        bits &= (np.uint64(1) << np.uint64(end - at)) - np.uint64(1)
    return bits
