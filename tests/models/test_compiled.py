"""The compiled step: its law (a row's bits depend on nothing but the row), and its agreement with the reference."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.kernels import cached_step
from moray.kernels.cached_step import padded
from moray.models import checkpoint
from moray.models.cache import LatentCache
from moray.models.compiled import CompiledModel
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.models.rows import Span
from moray.models.yarn import Yarn
from tests.examples import examples
from tests.native import NATIVE

LENGTH = 48
BASE = replace(
    preset("tiny"), vocab_size=100, hidden_size=72, intermediate_size=100, moe_intermediate_size=40,
    num_hidden_layers=3, max_position_embeddings=256, initializer_range=0.15, routed_scaling_factor=1.7,
)  # fmt: skip
FAMILY = {
    "groups": BASE,
    "no latent of queries": replace(BASE, q_lora_rank=None, n_group=1, topk_group=1),
    "no shared expert": replace(BASE, n_shared_experts=0, norm_topk_prob=False),
    "two shared experts": replace(BASE, n_shared_experts=2, num_experts_per_tok=4),
    "dense only": replace(BASE, first_k_dense_replace=3),
    "MoE only": replace(BASE, first_k_dense_replace=0),
    "odd sizes": replace(
        BASE, hidden_size=50, kv_lora_rank=37, qk_nope_head_dim=11, qk_rope_head_dim=6, v_head_dim=13, q_lora_rank=19,
        num_attention_heads=3,
    ),
    "YaRN": replace(BASE, rope_scaling=Yarn(4.0, 64, mscale=0.7, mscale_all_dim=0.7)),
    "wide latents": replace(BASE, kv_lora_rank=160, qk_rope_head_dim=32, num_attention_heads=2),
}  # fmt: skip


def drawn(config, seed=1):
    model = DeepseekV3(config).eval()
    model.init_weights(seed)
    for _, bias in model.logical_biases():
        bias.uniform_(-0.1, 0.1)
    return model


def ids_of(config, count=LENGTH, seed=0):
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model, ids):
    """Logits of every id in FP64."""
    wide = DeepseekV3(model.config).double().eval()
    wide.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()})
    cache = LatentCache(model.config, 16, 16, torch.float64)
    tables, positions = torch.arange(16).unsqueeze(0), torch.arange(len(ids)).unsqueeze(0)
    return wide.forward_cached(torch.tensor([ids]), positions, cache, tables)[0]


def whole(compiled, ids, block_size=16):
    cache = compiled.cache(16, block_size)
    return compiled.forward([Span(ids, 0, range(16), len(ids))], cache).logits_WV.clone()


def distance(found, expected):
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("name", FAMILY)
def test_it_is_the_reference(name):
    model = drawn(FAMILY[name])
    ids = ids_of(model.config)
    compiled = CompiledModel.of(model, NATIVE)
    assert distance(whole(compiled, ids), reference(model, ids)) <= 1e-5
    one_by_one, cache = [], compiled.cache(16, 16)
    for position, index in enumerate(ids):
        one_by_one.append(compiled.forward([Span([index], position, range(15, -1, -1), 1)], cache).logits_WV[0].clone())
    assert torch.equal(torch.stack(one_by_one), whole(compiled, ids))
    assert set(compiled.expert_rows().sum(1).tolist()) <= {0, 3 * LENGTH * model.config.num_experts_per_tok}


@pytest.mark.parametrize("machine", ["haswell", "x86-64-v2"])
def test_narrower_vectors_are_the_reference_and_keep_the_law(machine, monkeypatch):
    """AVX2, and 128 bits, on whatever machine this is that has them."""
    if platform.machine() != "x86_64" or (machine == "haswell" and "avx2" not in Path("/proc/cpuinfo").read_text()):
        pytest.skip(f"this machine does not run code for {machine}")
    flags = [f"-march={machine}" if flag == "-march=native" else flag for flag in cached_step._FLAGS]
    monkeypatch.setattr(cached_step, "_FLAGS", tuple(flags))
    for name in ("groups", "odd sizes"):
        model, ids = drawn(FAMILY[name]), ids_of(FAMILY[name])
        compiled = CompiledModel.of(model, NATIVE / machine, threads=2)
        logits, cache = whole(compiled, ids), compiled.cache(16, 16)
        assert distance(logits, reference(model, ids)) <= 1e-5
        parts = [compiled.forward([Span(ids[at : at + 7], at, range(16), 7)], cache) for at in range(0, 42, 7)]
        assert torch.equal(logits[35:42], parts[-1].logits_WV)
        compiled.close()


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_other_forms_are_the_reference_with_rounded_weights(form):
    """Routers are rounded in INT8 only. The absorbed halves of kv_b_proj have scales of their own outputs."""
    model = drawn(replace(BASE, q_lora_rank=None))
    rounded = drawn(model.config)
    for name, view, _ in rounded.logical_parameters():
        if view.dim() == 1 or (form == "bfloat16" and name.endswith("gate.weight")):
            continue
        if form == "bfloat16" or "embed" in name:
            view.copy_(view.bfloat16().float())
        elif "kv_b_proj" in name:
            keys, values = view.unflatten(0, (model.config.num_attention_heads, -1)).split(
                [model.config.qk_nope_head_dim, model.config.v_head_dim], dim=1
            )
            keys.copy_(int8(keys.transpose(1, 2)).transpose(1, 2))
            values.copy_(int8(values))
        else:
            view.copy_(int8(view))
    for (_, bias), (_, other) in zip(model.logical_biases(), rounded.logical_biases(), strict=True):
        other.copy_(bias)
    ids = ids_of(model.config)
    assert distance(whole(CompiledModel.of(model, NATIVE, form), ids), reference(rounded, ids)) <= 1e-5


def int8(weight):
    scales = weight.abs().amax(-1, keepdim=True) / 127
    return (weight / scales).round() * scales


def test_checkpoints_in_fp8(tmp_path):
    model = drawn(BASE)
    checkpoint.save(model, tmp_path / "fp8", "fp8")
    compiled = CompiledModel.from_folder(tmp_path / "fp8", NATIVE)
    stored = checkpoint.load(tmp_path / "fp8", dequantize=True)
    ids = ids_of(BASE)
    assert distance(whole(compiled, ids), reference(stored, ids)) <= 1e-5


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(form, threads):
    for config in (BASE, FAMILY["odd sizes"]):
        model, ids = drawn(config), ids_of(config)
        alone, together = (CompiledModel.of(model, NATIVE, form, count) for count in (1, threads))
        for _ in range(5):
            assert torch.equal(whole(alone, ids), whole(together, ids))
        together.close()


@pytest.fixture(scope="module", params=["float32", "int8"])
def compiled(request):
    return CompiledModel.of(drawn(BASE), NATIVE, request.param, threads=2)


PROMPTS = [ids_of(BASE, 40, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def expected(compiled):
    return [whole(compiled, ids) for ids in PROMPTS]


@given(data=st.data(), block_size=st.sampled_from([16, 32, 48]))
@settings(max_examples=examples(40), deadline=None)
def test_a_rows_bits_depend_on_nothing_but_the_row(compiled, expected, data, block_size):
    """Any schedule of the prompts in any chunks, in any blocks, of which some were computed before, in another step."""
    blocks = -(-40 // block_size)
    cache = compiled.cache(len(PROMPTS) * blocks, block_size)
    order = data.draw(st.permutations(range(cache.storage.shape[1])))
    tables = [order[number * blocks : (number + 1) * blocks] for number in range(len(PROMPTS))]
    at = [0] * len(PROMPTS)
    while any(position < 40 for position in at):
        open_ = [number for number, position in enumerate(at) if position < 40]
        chosen = data.draw(st.lists(st.sampled_from(open_), unique=True, min_size=1))
        spans = []
        for number in chosen:
            count = data.draw(st.integers(1, min(17, 40 - at[number])))
            ids = PROMPTS[number][at[number] : at[number] + count]
            spans.append(Span(ids, at[number], tables[number], data.draw(st.integers(0, count))))
        found = compiled.forward(spans, cache)
        row = 0
        for number, span in zip(chosen, spans, strict=True):
            end = span.start + len(span.ids)
            logits = found.logits_WV[row : row + span.wanted]
            assert torch.equal(logits, expected[number][end - span.wanted : end])
            assert found.best[row : row + span.wanted] == logits.argmax(-1).tolist()
            at[number], row = end, row + span.wanted


def test_a_value_that_is_not_finite_is_reported_and_stays_in_its_row(compiled, expected):
    cache = compiled.cache(8, 32)
    compiled.forward([Span(PROMPTS[0], 0, [0, 1], 0), Span(PROMPTS[1], 0, [2, 3], 0)], cache)
    cache.storage[1, 2, 5] = float("nan")
    again = compiled.forward([Span(PROMPTS[0][-1:], 39, [0, 1], 1), Span(PROMPTS[1][-1:], 39, [2, 3], 1)], cache)
    assert torch.equal(again.logits_WV[0], expected[0][-1])
    assert again.best[1] == -1
    assert again.best[0] == int(expected[0][-1].argmax())


def test_a_row_of_logits_ends_with_the_vocabulary(compiled):
    assert padded(100) == 128
    assert whole(compiled, PROMPTS[0]).shape == (40, 100)
