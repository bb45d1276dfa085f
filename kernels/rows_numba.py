"""The loops of `rows_cpu.py`, compiled by numba on first call and cached on disk.

Arguments are numpy arrays. bits_TD are the rows' bits, int32 or int16; shifted left by `shift` they are those of FP32.
"""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def _pack_row(bits_D, shift, out_W, x, y, one) -> None:
    """Packs one row. x, y: FP32 [128] and one: FP32 [1], scratch space."""
    columns = bits_D.shape[0]
    x_bits, y_bits, one_bits = x.view(np.int32), y.view(np.int32), one.view(np.int32)
    for tile in range((columns + 127) // 128):
        begin = tile * 128
        size = min(128, columns - begin)
        largest = np.int32(0)
        for i in range(size):
            x_bits[i] = np.int32(bits_D[begin + i]) << shift
        for i in range(size):
            largest = max(largest, np.int32(x_bits[i] & np.int32(0x7FFFFFFF)))
        if largest >= 0x7F800000:  # an infinity or a NaN
            out_W[columns + tile] = 255
            for i in range(size):
                out_W[begin + i] = 0x7F
            continue
        one_bits[0] = largest
        one[0] = max(one[0] / np.float32(448.0), np.float32(2.0**-126))
        scale = (one_bits[0] + 0x7FFFFF) & 0x7F800000
        out_W[columns + tile] = scale >> 23
        one_bits[0] = 0x7F000000 - scale
        inverse = one[0]
        for i in range(size):
            y[i] = abs(x[i] * inverse)
        for i in range(size):
            # The same bit manipulation as in `to_e4m3` of `util/backend.py`.
            magnitude = y_bits[i]
            normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
            small = np.int32(((y[i] + np.float32(16384.0)) - np.float32(16384.0)) * np.float32(512.0))
            nearest = small if magnitude < 0x3C800000 else normal
            out_W[begin + i] = np.uint8(nearest | ((x_bits[i] >> 24) & 0x80))


@numba.njit(nogil=True, cache=True)
def pack_rows_numba(bits_TD, shift, out_TW) -> None:
    x, y, one = np.empty(128, np.float32), np.empty(128, np.float32), np.empty(1, np.float32)
    for t in range(bits_TD.shape[0]):
        _pack_row(bits_TD[t], shift, out_TW[t], x, y, one)


@numba.njit(nogil=True, cache=True)
def push(bits_TD, shift, metadata_TN, sent_TP, inboxes) -> None:
    x, y, one = np.empty(128, np.float32), np.empty(128, np.float32), np.empty(1, np.float32)
    tokens, ranks = sent_TP.shape
    columns, size = bits_TD.shape[1], metadata_TN.shape[1]
    packed = columns + (columns + 127) // 128
    row_W = np.empty(packed + size, np.uint8)
    places = np.zeros(ranks, np.int64)
    for t in range(tokens):
        _pack_row(bits_TD[t], shift, row_W[:packed], x, y, one)
        for i in range(size):
            row_W[packed + i] = metadata_TN[t, i]
        for p in range(ranks):
            if sent_TP[t, p]:
                inbox_row = inboxes[p][places[p]]
                for i in range(row_W.shape[0]):
                    inbox_row[i] = row_W[i]
                places[p] += 1
