"""The cases of `kernels_gpu.py`: every kernel at DeepSeek-V3's sizes, its oracle, its traffic or work, and its peers.

A case is built on fresh random data. Its check runs before it is timed and compares the kernel with the PyTorch
reference. `small` sizes let the checks run in Triton's interpreter, on a machine without a GPU.

Shapes: T tokens, R = T * K padded rows of E local experts, D hidden size, F expert hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moray.kernels import (
    adamw_fp8,
    attention,
    cross_entropy,
    fp8_experts,
    fp8_gemm,
    fp8_rows,
    mla_decode,
    permute,
    quantize,
    rms_norm,
    rope,
    router,
    swiglu,
)

ROWS, COLUMNS, BLOCKS = quantize.ROW_TILES, quantize.COLUMN_TILES, quantize.WEIGHT_BLOCKS


@dataclass(frozen=True)
class Sizes:
    tokens: tuple[int, ...]
    rows: int
    hidden: int
    inner: int
    heads: int
    experts: int
    routed: int
    vocabulary: int
    length: int
    parameters: int
    context: int
    batch: int


V3 = Sizes((1, 128, 4096, 32768), 32768, 7168, 2048, 128, 8, 256, 129280, 4096, 1 << 28, 4096, 64)
SMALL = Sizes((1, 130), 384, 256, 128, 2, 3, 16, 300, 48, 3000, 40, 3)


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    moved: minimum bytes read and written. work: floating-point operations. goals: targets on an H100, as the
    (unit, number) of a bar, where unit is TB/s, TFLOPS, "of copy", or "over NAME" for a peer's time divided by ours.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], None]
    moved: int = 0
    work: int = 0
    peers: dict[str, Callable[[], Any]] = field(default_factory=dict)
    goals: tuple[tuple[str, float], ...] = ()


def near(found: Tensor, expected: Tensor, part: float) -> None:
    """Asserts that `found` is within `part` of the largest expected magnitude."""
    found, expected = found.float(), expected.float()
    torch.testing.assert_close(found, expected, rtol=0, atol=part * max(expected.abs().max().item(), 1e-30))


def fp8_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], block: tuple[int, int] = ROWS) -> None:
    """Asserts equality up to one E4M3 step at the largest value, because a sigmoid may differ in its last bits."""
    near(quantize.dequantize(*found, block), quantize.dequantize(*expected, block), 2.0**-3)


def with_gradients(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A function that returns the output and the inputs' gradients, for the same output gradient on every call."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    out = run(*leaves)
    generator = torch.Generator(out.device).manual_seed(7)
    gradient = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = run(*leaves)
        return out.detach(), *torch.autograd.grad(out, wanted, gradient)

    return forward_and_backward


def all_near(found: Callable[[], tuple[Tensor, ...]], expected: Callable[[], tuple[Tensor, ...]], part: float) -> None:
    for a, b in zip(found(), expected(), strict=True):
        near(a, b, part)


def offsets_of(size: Sizes, skewed: bool, device: str) -> Tensor:
    """Row offsets of the experts, in tiles of 128 rows: even, or with half to the first expert and none to the last."""
    tiles, experts = size.rows // 128, size.experts
    share = torch.full((experts,), tiles // experts)
    if skewed:
        share = torch.full((experts,), tiles // 2 // (experts - 2))
        share[0], share[-1] = tiles // 2, 0
    share[1] += tiles - share.sum()
    return (F.pad(share.cumsum(0), (1, 0)) * 128).int().to(device)


def quantisers(size: Sizes, device: str) -> Iterator[Case]:
    x = torch.randn(size.rows, size.hidden, device=device, dtype=torch.bfloat16)
    for block in (ROWS, COLUMNS, BLOCKS):
        run = partial(quantize.quantize_triton, x, block, True)

        def check(run: Callable[[], Any] = run, block: tuple[int, int] = block) -> None:
            for a, b in zip(run(), quantize.quantize_reference(x, block, True), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

        scales = -(-size.rows // block[0]) * -(-size.hidden // block[1])
        peers = {"PyTorch": partial(quantize.quantize_reference, x, block, True)}
        yield Case(
            f"quantize {block[0]}x{block[1]}", run, check, 3 * x.numel() + 4 * scales, 0, peers, (("TB/s", 2.6),)
        )

    def both_check() -> None:
        for a, b in zip(quantize.quantize_both_triton(x, True), quantize.quantize_both_reference(x, True), strict=True):
            for one, other in zip(a, b, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))

    def two_passes() -> None:
        quantize.quantize_triton(x, ROWS, True)
        quantize.quantize_triton(x.t().contiguous(), ROWS, True)

    yield Case(
        "quantize both layouts", partial(quantize.quantize_both_triton, x, True), both_check,
        4 * x.numel() + x.numel() // 16, 0, {"two passes": two_passes}, (("TB/s", 2.6), ("over two passes", 1.5)),
    )  # fmt: skip


def swiglus(size: Sizes, device: str) -> Iterator[Case]:
    h = torch.randn(size.rows, 2 * size.inner, device=device, dtype=torch.bfloat16)
    d = torch.randn(size.rows, size.inner, device=device, dtype=torch.bfloat16)
    weights = torch.rand(size.rows, device=device)
    numbers = size.rows * size.inner
    _, held = swiglu.swiglu_quantize_triton(h, weights)

    def forward_check() -> None:
        found, expected = swiglu.swiglu_quantize_triton(h, weights), swiglu.swiglu_quantize_reference(h, weights)
        for a, b in zip(found, expected, strict=True):
            fp8_near(a, b)

    def backward_check() -> None:
        found, expected = (
            form(held, d, weights) for form in (swiglu.swiglu_backward_triton, swiglu.swiglu_backward_reference)
        )
        for a, b in zip(found[:3], expected[:3], strict=True):
            fp8_near(a, b)
        near(found.weights_R, expected.weights_R, 2e-3)

    def unfused() -> None:
        quantize.quantize_triton(F.silu(h[:, : size.inner]) * h[:, size.inner :] * weights[:, None], ROWS, True)
        quantize.quantize_triton(h, ROWS, True)

    yield Case(
        "swiglu + quantize", partial(swiglu.swiglu_quantize_triton, h, weights), forward_check, 7 * numbers, 0,
        {"unfused": unfused},
    )  # fmt: skip
    yield Case(
        "swiglu + quantize, backward", partial(swiglu.swiglu_backward_triton, held, d, weights), backward_check,
        9 * numbers, 0, {"PyTorch": partial(swiglu.swiglu_backward_reference, held, d, weights)},
    )  # fmt: skip


def products(size: Sizes, device: str) -> Iterator[Case]:
    for n, k in ((size.hidden, size.inner), (size.inner, size.hidden)):
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5
        w = quantize.quantize_triton(weight, BLOCKS, True)
        for m in size.tokens:
            rows = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            x = quantize.quantize_triton(rows, ROWS, True)
            run = partial(fp8_gemm.fp8_gemm_triton, *x, *w)

            def check(run: Callable[[], Tensor] = run, x: Any = x, w: Any = w) -> None:
                near(run(), fp8_gemm.fp8_gemm_reference(*x, *w, dtype=torch.float32), 2.0**-7)

            one = torch.ones((), device=device)
            peers = {
                "cuBLAS BF16": partial(torch.mm, rows, weight.t()),
                "_scaled_mm": partial(torch._scaled_mm, x[0], w[0].t(), one, one, out_dtype=torch.bfloat16),
            }
            yield Case(f"fp8 product {m}x{n}x{k}", run, check, 0, 2 * m * n * k, peers)


def grouped_products(size: Sizes, device: str) -> Iterator[Case]:
    experts, rows = size.experts, size.rows
    for skewed in (False, True):
        offsets, how = offsets_of(size, skewed, device), "skewed" if skewed else "balanced"
        for n, k in ((size.inner, size.hidden), (size.hidden, size.inner)):
            weight = torch.randn(experts, n, k, device=device, dtype=torch.bfloat16) / k**0.5
            wide = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
            w, x = quantize.quantize_triton(weight, BLOCKS, True), quantize.quantize_triton(wide, ROWS, True)
            run = partial(fp8_gemm.fp8_gemm_grouped_triton, *x, *w, offsets)

            def check(run: Callable[[], Tensor] = run, x: Any = x, w: Any = w, at: Tensor = offsets) -> None:
                near(run(), fp8_gemm.fp8_gemm_grouped_reference(*x, *w, at, dtype=torch.float32), 2.0**-7)

            peers = {"_grouped_mm": partial(torch._grouped_mm, wide, weight.transpose(1, 2), offs=offsets[1:])}
            goals = (("TFLOPS", 860.0),) if not skewed and n == size.inner else ()
            yield Case(f"grouped {how} {rows}x{n}x{k}", run, check, 0, 2 * rows * n * k, peers, goals)
        m, n = size.inner, size.hidden
        a_wide, b_wide = (torch.randn(rows, width, device=device, dtype=torch.bfloat16) for width in (m, n))
        a, b = (quantize.quantize_both_triton(x, True)[1] for x in (a_wide, b_wide))
        run = partial(fp8_gemm.fp8_gemm_k_grouped_triton, *a, *b, offsets)

        def check_k(run: Callable[[], Tensor] = run, a: Any = a, b: Any = b, at: Tensor = offsets) -> None:
            # a product over 128 elements accumulates with 14 bits
            near(run(), fp8_gemm.fp8_gemm_k_grouped_reference(a[0], a[1], b[0], b[1], at), 2.0**-9)

        peers = {"_grouped_mm": partial(torch._grouped_mm, a_wide.t(), b_wide, offs=offsets[1:])}
        goals = (("TFLOPS", 650.0),) if not skewed else ()
        yield Case(f"weight gradient {how} {m}x{n}x{rows}", run, check_k, 0, 2 * m * n * rows, peers, goals)


def _experts_bf16(x: Tensor, factors: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    one, other = (torch._grouped_mm(x, w.transpose(1, 2), offs=ends) for w in (gate, up))
    inner = F.silu(one) * other * factors.unsqueeze(1).to(x.dtype)
    return torch._grouped_mm(inner, down.transpose(1, 2), offs=ends)


def layers(size: Sizes, device: str) -> Iterator[Case]:
    experts, d, f = size.experts, size.hidden, size.inner
    offsets = offsets_of(size, False, device)
    weights = [torch.randn(experts, *s, device=device) / s[1] ** 0.5 for s in ((f, d), (f, d), (d, f))]
    forms = fp8_experts.fp8_expert_weights(*weights)
    x = torch.randn(size.rows, d, device=device, dtype=torch.bfloat16)
    factors = torch.rand(size.rows, device=device)  # the router's weights

    def ours(x: Tensor, factors: Tensor, *weights: Tensor) -> Tensor:
        return fp8_experts.fp8_experts(x, factors, offsets, forms, *weights)

    run = with_gradients(ours, x, factors, *weights)
    halves = [w.bfloat16() for w in weights]

    def plain(x: Tensor, factors: Tensor, *weights: Tensor) -> Tensor:
        sizes = offsets.diff().tolist()
        parts = [
            F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up) * factor.unsqueeze(1), down)
            for part, factor, gate, up, down in zip(x.split(sizes), factors.split(sizes), *weights, strict=True)
        ]
        return torch.cat(parts)

    def check() -> None:
        """Compares with FP32 by norm: after three FP8 products in a row, each number has 4 % of noise."""
        for a, b in zip(run(), with_gradients(plain, x.float(), factors, *weights)(), strict=True):
            assert (a.float() - b).norm() < 0.1 * b.norm()

    def bf16(x: Tensor, factors: Tensor, *weights: Tensor) -> Tensor:
        return _experts_bf16(x, factors, offsets[1:], *weights)

    peers = {"_grouped_mm BF16": with_gradients(bf16, x, factors, *halves)} if device == "cuda" else {}
    work = 3 * 6 * size.rows * d * f
    yield Case("MoE experts, forward + backward", run, check, 0, work, peers, (("over _grouped_mm BF16", 1.25),))


def moving(size: Sizes, device: str) -> Iterator[Case]:
    slots, tokens = 8, size.rows // 8
    ids = torch.rand(tokens, size.routed, device=device).topk(slots).indices
    order = permute.padded_order_triton(ids, size.routed)
    x = quantize.quantize_triton(torch.randn(tokens, size.hidden, device=device, dtype=torch.bfloat16), ROWS, True)
    permuted = permute.permute_fp8_triton(*x, order)
    rows = torch.randn(order.capacity, size.hidden, device=device, dtype=torch.bfloat16)
    used = int(order.offsets_E1[-1])

    def order_check() -> None:
        found, expected = (
            form(ids, size.routed) for form in (permute.padded_order_triton, permute.padded_order_reference)
        )
        assert torch.equal(found.positions_TK, expected.positions_TK)
        assert torch.equal(found.offsets_E1, expected.offsets_E1)

    def permute_check() -> None:
        found, expected = (form(*x, order) for form in (permute.permute_fp8_triton, permute.permute_fp8_reference))
        assert torch.equal(found[0][:used].view(torch.uint8), expected[0][:used].view(torch.uint8))
        assert torch.equal(found[1][:used], expected[1][:used])

    def sum_check() -> None:
        places = order.positions_TK
        near(permute.sum_slots_triton(rows, places), permute.sum_slots_reference(rows, places.long()), 2.0**-7)

    def transpose_check() -> None:
        found, expected = (f(*permuted) for f in (fp8_rows.transpose_fp8_triton, fp8_rows.transpose_fp8_reference))
        assert torch.equal(found[0][:, :used].view(torch.uint8), expected[0][:, :used].view(torch.uint8))
        assert torch.equal(found[1][:, : used // 128], expected[1][:, : used // 128])

    def unfused_order() -> None:
        _, sort = ids.flatten().sort(stable=True)
        sort.argsort()
        torch.bincount(ids.flatten(), minlength=size.routed)

    yield Case(
        "order of pairs", partial(permute.padded_order_triton, ids, size.routed), order_check, 12 * ids.numel(), 0,
        {"sort, argsort, bincount": unfused_order},
    )  # fmt: skip
    each = size.hidden + size.hidden // 32
    yield Case(
        "spread fp8 rows", partial(permute.permute_fp8_triton, *x, order), permute_check,
        (tokens + used) * each, 0, {"PyTorch": partial(permute.permute_fp8_reference, *x, order)},
    )  # fmt: skip
    yield Case(
        "transpose fp8 rows", partial(fp8_rows.transpose_fp8_triton, *permuted), transpose_check,
        2 * order.capacity * each, 0, {"PyTorch": partial(fp8_rows.transpose_fp8_reference, *permuted)},
    )  # fmt: skip
    places = order.positions_TK
    yield Case(
        "sum over slots", partial(permute.sum_slots_triton, rows, places), sum_check,
        2 * size.hidden * (ids.numel() + tokens), 0,
        {"PyTorch": partial(permute.sum_slots_reference, rows, places.long())},
    )  # fmt: skip


def routers(size: Sizes, device: str) -> Iterator[Case]:
    tokens = size.rows
    logits = torch.randn(tokens, size.routed, device=device)
    bias = torch.randn(size.routed, device=device) * 0.01
    options = {"top_k": 4, "n_group": 4, "topk_group": 2} if size is SMALL else (
        {"top_k": 8, "n_group": 8, "topk_group": 4}
    )  # fmt: skip

    def check() -> None:
        found, expected = (form(logits, bias, **options) for form in (router.route_triton, router.route_reference))
        assert torch.equal(found[2].cpu(), torch.bincount(found[0].flatten().cpu(), minlength=size.routed))
        assert (found[0] == expected[0]).float().mean() > 0.999  # the sigmoids may differ in the last bit
        near(found[1].sum(1), expected[1].sum(1), 1e-5)

    yield Case(
        "route", partial(router.route_triton, logits, bias, **options), check, tokens * (4 * size.routed + 12 * 8), 0,
        {"PyTorch": partial(router.route_reference, logits, bias, **options)},
    )  # fmt: skip


def attentions(size: Sizes, device: str) -> Iterator[Case]:
    a, v = (48, 32) if size is SMALL else (192, 128)
    length, heads, scale = size.length, size.heads, a**-0.5
    q, k = torch.randn(2, 1, length, heads, a, device=device, dtype=torch.bfloat16).unbind(0)
    values = torch.randn(1, length, heads, v, device=device, dtype=torch.bfloat16)
    work = length * length // 2 * heads * 2 * (a + v)

    def sdpa(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, values))
        return F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale).transpose(1, 2)

    ours = with_gradients(lambda *x: attention.causal_attention_triton(x[0], x[1], x[2], scale), q, k, values)
    theirs = with_gradients(sdpa, q, k, values)

    def check() -> None:
        near(ours()[0], attention.causal_attention_reference(q.float(), k.float(), values.float(), scale), 2.0**-6)

    yield Case(
        f"attention forward, {length} tokens", partial(attention.causal_attention_triton, q, k, values, scale), check,
        0, work, {"SDPA": partial(sdpa, q, k, values)},
    )  # fmt: skip
    yield Case(
        f"attention forward + backward, {length} tokens", ours, check, 0, work * 7 // 2, {"SDPA": theirs},
    )  # fmt: skip
    yield from decoding(size, device)


def decoding(size: Sizes, device: str) -> Iterator[Case]:
    batch, slots, width, rank = size.batch, 64, 576, 512
    blocks = -(-size.context // slots)
    cache = torch.randn(batch * blocks, slots, width, device=device, dtype=torch.bfloat16)
    tables = torch.randperm(batch * blocks, device=device).view(batch, blocks)
    positions = torch.full((batch, 1), size.context - 1, device=device)
    q = torch.randn(batch, 1, size.heads, width, device=device, dtype=torch.bfloat16)
    call = (q, cache, tables, positions, width**-0.5, rank)

    def check() -> None:
        wide = (q.float(), cache.float(), *call[2:])
        near(mla_decode.mla_decode_triton(*call), mla_decode.mla_decode_reference(*wide), 2.0**-6)

    yield Case(
        f"decode {batch} x {size.context}", partial(mla_decode.mla_decode_triton, *call), check,
        batch * size.context * width * 2, batch * size.context * size.heads * 2 * (width + rank),
        {"PyTorch": partial(mla_decode.mla_decode_reference, *call)}, (("of copy", 0.75),),
    )  # fmt: skip


def rowwise(size: Sizes, device: str) -> Iterator[Case]:
    tokens = size.rows // 4
    x = torch.randn(tokens, size.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.ones(size.hidden, device=device, dtype=torch.bfloat16)
    norms = [with_gradients(lambda *a, f=f: f(*a, 1e-6), x, weight) for f in (
        rms_norm.rms_norm_triton, rms_norm.rms_norm_reference,
    )]  # fmt: skip
    yield Case(
        "rms norm, forward + backward", norms[0],
        lambda: all_near(norms[0], norms[1], 2.0**-6), 10 * x.numel(), 0, {"PyTorch": norms[1]},
    )  # fmt: skip
    heads = torch.randn(1, tokens, size.heads, 64, device=device, dtype=torch.bfloat16)
    angles = torch.rand(1, tokens, 1, 32, device=device)[:, :, 0] * 6
    turn = (heads, angles.cos(), angles.sin())
    yield Case(
        "rope", partial(rope.rope_triton, *turn),
        lambda: near(rope.rope_triton(*turn), rope.rope_reference(*turn), 2.0**-7), 4 * heads.numel(), 0,
        {"PyTorch": partial(rope.rope_reference, *turn)},
    )  # fmt: skip
    hidden = torch.randn(tokens, size.hidden, device=device, dtype=torch.bfloat16) * 0.1
    head = torch.randn(size.vocabulary, size.hidden, device=device, dtype=torch.bfloat16) * 0.02
    targets = torch.randint(0, size.vocabulary, (tokens,), device=device)
    keep = torch.ones(tokens, dtype=torch.bool, device=device)

    def loss(form: Callable[..., Any]) -> Callable[[], tuple[Tensor, ...]]:
        return with_gradients(lambda h, w: form(h, w, targets, keep)[0], hidden, head)

    ours = loss(cross_entropy.cross_entropy_sum_triton)
    plain = loss(lambda h, w, t, _: (F.cross_entropy((h @ w.t()).float(), t, reduction="sum"),))
    yield Case(
        "cross entropy, forward + backward", ours,
        lambda: near(ours()[0], cross_entropy.cross_entropy_sum_reference(hidden, head, targets, keep)[0], 1e-3),
        0, 6 * tokens * size.hidden * size.vocabulary, {"PyTorch, whole logits": plain},
    )  # fmt: skip


def optimizers(size: Sizes, device: str) -> Iterator[Case]:
    count = size.parameters
    # Small like real weights. On larger ones, FP32 rounds a step of 1e-3 by more than the check's tolerance.
    master, gradient = (torch.randn(count, device=device) * scale for scale in (2e-2, 1e-3))
    numbers = {"step": 7, "rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}

    def fresh(part: int) -> tuple[adamw_fp8.Fp8Moment, adamw_fp8.Fp8Moment]:
        return adamw_fp8.compress(gradient[:part]), adamw_fp8.compress(gradient[:part].square())

    held = fresh(count)

    def check() -> None:
        part = min(count, 1 << 20)
        masters = []
        for form in (adamw_fp8.adamw_fp8_triton, adamw_fp8.adamw_fp8_reference):
            masters.append(master[:part].clone())
            form(masters[-1], gradient[:part].clone(), *fresh(part), **numbers)
        near(masters[0] - master[:part], masters[1] - master[:part], 1e-4)

    wide = torch.nn.Parameter(master.clone())
    wide.grad = gradient
    peer = torch.optim.AdamW([wide], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    run = partial(adamw_fp8.adamw_fp8_triton, master, gradient, *held, **numbers)
    moved = int(16.25 * count)
    yield Case("AdamW in FP8", run, check, moved, 0, {"torch, fused, FP32 moments": peer.step}, (("of copy", 0.8),))


GROUPS = (
    quantisers, swiglus, products, grouped_products, layers, moving, routers, attentions, rowwise, optimizers,
)  # fmt: skip
