"""The cache admits the model's whole context, and takes no more than its share of the memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.models.presets import PRESETS
from moray.pipelines.serve.cache_size import BLOCK_SIZE, cache_bytes, sequence_bytes
from moray.pipelines.serve.engine import cache_blocks
from moray.pipelines.serve.scheduler import EngineLimits
from moray.platform.core.errors import InputError
from moray.platform.core.serve_options import ServeOptions

GIB = 1 << 30
# DeepSeek-V2-Lite: 16B parameters, with the context of V3.
LARGE = replace(PRESETS["v3"], num_hidden_layers=27, max_position_embeddings=163_840)


@given(
    context=st.integers(1, 1 << 18),
    running=st.integers(1, 512),
    replicas=st.integers(1, 8),
    free=st.integers(1 << 20, 1 << 42),
    element=st.sampled_from([2, 4]),
)
def test_a_sequence_of_full_context_always_fits(
    context: int, running: int, replicas: int, free: int, element: int
) -> None:
    config = replace(LARGE, max_position_embeddings=context)
    options = ServeOptions(max_running=running, replicas=replicas)
    try:
        size = cache_bytes(config, options, element, free)
    except InputError:
        assert sequence_bytes(config, element) > free // 2 // replicas
        return
    assert size <= max(free // 2 // replicas, sequence_bytes(config, element))
    assert size * replicas <= free
    limits = EngineLimits(options.step_tokens, running, size, BLOCK_SIZE)
    assert cache_blocks(config, limits, element) * BLOCK_SIZE >= context


def test_a_model_of_16b_gets_its_whole_context() -> None:
    size = cache_bytes(LARGE, ServeOptions(dtype="bfloat16"), 2, 64 * GIB)
    assert size == 32 * GIB
    assert size // sequence_bytes(LARGE, 2) * LARGE.max_position_embeddings >= LARGE.max_position_embeddings


def test_a_cache_that_is_too_small_is_an_error_that_names_what_is_needed() -> None:
    with pytest.raises(InputError, match=r"a cache of 134 MB is too small: one sequence .* takes") as caught:
        cache_bytes(LARGE, ServeOptions(cache_bytes=128 << 20), 2, 64 * GIB)
    assert caught.value.hint == "raise --cache-bytes"
    with pytest.raises(InputError, match=r"of memory is free, and one sequence"):
        cache_bytes(LARGE, ServeOptions(), 2, 1 << 30)


@pytest.mark.parametrize("option", ["max_running", "threads", "replicas"])
def test_an_option_below_one_is_an_error(option: str) -> None:
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')} is 0"):
        ServeOptions(**{option: 0})  # type: ignore[arg-type]
