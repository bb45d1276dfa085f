"""The size of a replica's latent cache: what its sequences need, within the memory that is free."""

from __future__ import annotations

from moray.models.config import ModelConfig
from moray.platform.core.errors import InputError
from moray.platform.core.serve_options import ServeOptions
from moray.platform.core.units import size

BLOCK_SIZE = 32  # positions in a block of the cache
_SHARE_OF_FREE = 0.5  # of the memory that is free once the weights are loaded; the rest is for activations and others


def cache_bytes(config: ModelConfig, options: ServeOptions, element_bytes: int, free: int) -> int:
    """The memory of a replica's cache, in bytes. free: what the replica's host or GPU has left, in bytes.

    Enough for `max_running` sequences of full context, within the replica's share of the free memory, but at least for
    one of them. Raises InputError if that one does not fit, or if `options` name less.
    """
    one = sequence_bytes(config, element_bytes)
    share = int(_SHARE_OF_FREE * free) // options.replicas  # they may be on one host
    context = f"one sequence of the model's context ({config.max_position_embeddings:,} tokens) takes {size(one)}"
    if options.cache_bytes:
        if options.cache_bytes < one:
            raise InputError(f"a cache of {size(options.cache_bytes)} is too small: {context}", "raise --cache-bytes")
        return options.cache_bytes
    if one > 2 * share:
        raise InputError(f"{size(free)} of memory is free, and {context} of cache", "use a machine with more memory")
    return max(one, min(options.max_running * one, share))


def sequence_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Bytes that a sequence of full context takes in the cache: a latent and a rotated key per position and layer."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    blocks = -(-config.max_position_embeddings // BLOCK_SIZE)
    return config.num_hidden_layers * blocks * BLOCK_SIZE * width * element_bytes
