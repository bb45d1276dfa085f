"""The UTF-8 bytes that each token stands for, to measure ids in bytes of text without decoding them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from moray.pipelines.tokenizer.train import id_count

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Any) -> npt.NDArray[np.int64]:
    """Bytes by id of a `tokenizers.Tokenizer`, int64 [ids]; 0 for control tokens.

    Exact for byte-level tokenizers: each character of a token's spelling is a byte. For others, the size of the
    spelling, with a space for SentencePiece's mark and a byte for a byte token.
    """
    is_byte_level = type(tokenizer.decoder).__name__ == "ByteLevel"
    added = tokenizer.get_added_tokens_decoder()
    sizes = np.zeros(id_count(tokenizer), np.int64)
    for spelling, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(str(added[index].content).encode())
        elif is_byte_level or _BYTE.fullmatch(spelling):
            sizes[index] = len(spelling) if is_byte_level else 1
        else:
            sizes[index] = len(spelling.replace("\u2581", " ").encode())
    return sizes
