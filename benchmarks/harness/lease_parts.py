"""The parts of `lease.py`. Each yields rows and bars as it measures them.

Shapes: B sequences, T tokens of a sequence, E experts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import gpu_cases
from harness.gpu_cases import SMALL, V3, Sizes, near, with_gradients
from harness.result import RESULTS, Bar
from kernels_gpu import Clock
from torch import Tensor
from tune_gpu import check_gradients, weight_gradients

from moray.kernels import attention, fp8_gemm, mla_decode, quantize, rms_norm
from moray.kernels.mla_decode import DecodeBlocks
from moray.kernels.util.document_bounds import find_documents
from moray.models.config import ModelConfig
from moray.models.expert_parallel.dispatcher import ProcessGroupDispatcher
from moray.models.flops import token_flops
from moray.models.loss import LossWeights
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.pretrain.memory.launches import metered
from moray.pipelines.pretrain.memory.meter import MemoryMeter
from moray.pipelines.pretrain.peak_flops import peak_flops
from moray.platform.core.ports import free_port

Found = Iterator[tuple[dict[str, Any], list[Bar]]]


class SmallClock:
    """A `Clock` without a GPU: runs once. Its times mean nothing."""

    def milliseconds(self, run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3


@dataclass(frozen=True)
class Scale:
    """Sizes of a run: those of a GPU, or small ones for a CPU."""

    device: str
    sizes: Sizes
    model: ModelConfig
    sequences: int
    length: int
    seconds: float  # of each training
    least_steps: int
    clock: Clock | SmallClock

    @classmethod
    def gpu(cls) -> Scale:
        return cls("cuda", V3, moe_1b(), 4, 4096, 75.0, 8, Clock())

    @classmethod
    def dry(cls) -> Scale:
        sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        experts = {
            "first_k_dense_replace": 0,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        }
        model = dataclasses.replace(preset("tiny"), **sizes, **experts, num_nextn_predict_layers=0)
        return cls("cpu", SMALL, model, 2, 8, 0.0, 2, SmallClock())


@dataclass(frozen=True)
class Part:
    """A part. least, most: seconds without which it is not started, and after which it is stopped."""

    run: Callable[[Scale], Found]
    least: float
    most: float


def moe_1b() -> ModelConfig:
    """The model of `recipes/moe-1b.yaml`, whose file a machine without a YAML reader cannot read. A test compares."""
    return dataclasses.replace(
        preset("small"),
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        moe_intermediate_size=512,
        num_hidden_layers=18,
        num_attention_heads=8,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
        kv_lora_rank=256,
        num_nextn_predict_layers=1,
        max_position_embeddings=4096,
        initializer_range=0.02,
    )


class Training:
    """A model with FP32 weights, trained by PyTorch's AdamW: the model's code of a training rank, and nothing else."""

    def __init__(self, config: ModelConfig, fp8: bool, device: str, dispatcher: Any = None) -> None:
        with torch.device("meta"):
            model = DeepseekV3(config, dispatcher=dispatcher)
        model.to_empty(device=device)
        if device != "meta":
            model.init_weights(1)
        model.reset_counters()
        model.compute_in(torch.bfloat16)
        if fp8:
            model.train_in_fp8()
        model.set_recompute("v3")
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=device == "cuda")

    def gradients(self, ids_BT: Tensor) -> Tensor:
        """Computes the gradients of the mean loss. Returns the loss."""
        targets_BT = F.pad(ids_BT[:, 1:], (0, 1), value=-100)
        weights = LossWeights(mtp=0.3, balance=1e-4)
        terms = self.model.training_loss(ids_BT, targets_BT, weights=weights)
        weights.of(terms).backward()
        torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], float(ids_BT.numel()))
        return terms.main.detach() / terms.count

    def step(self, ids_BT: Tensor) -> Tensor:
        loss = self.gradients(ids_BT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def batch(scale: Scale, step: int, device: str | None = None) -> Tensor:
    """Evenly spaced ids, each row with its own start and stride: int64 [B, T]."""
    generator = torch.Generator().manual_seed(step)
    starts, strides = torch.randint(0, 997, (2, scale.sequences, 1), generator=generator)
    ids_BT = (starts + (strides % 8 + 1) * torch.arange(scale.length)) % min(scale.model.vocab_size, 997)
    return ids_BT.to(device or scale.device)


def expected_memory(scale: Scale, fp8: bool) -> int:
    """Bytes at the peak of two steps, by the same code on the meta device."""
    meter = MemoryMeter()
    with metered(meter):
        training = Training(scale.model, fp8, "meta")
        for step in range(2):
            training.step(batch(scale, step, "meta"))
    return meter.device.peak


def train(scale: Scale, fp8: bool) -> Found:
    """Trains for some time on synthetic tokens: the loss must fall, and memory be as expected."""
    name = "fp8" if fp8 else "bf16"
    expected = expected_memory(scale, fp8)
    yield {"precision": name, "expected_GB": expected / 1e9}, []
    training = Training(scale.model, fp8, scale.device)
    began, losses, times = time.monotonic(), [], []
    while len(losses) < scale.least_steps or time.monotonic() - began < scale.seconds:
        started = time.perf_counter()
        losses.append(training.step(batch(scale, len(losses))).item())
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[scale.least_steps // 2 :])
    tokens = scale.sequences * scale.length
    flops = token_flops(scale.model, scale.length).training * tokens
    row = {"precision": name, "steps": len(losses), "losses": losses, "ms": seconds * 1e3, "tokens_s": tokens / seconds}
    row["mfu"] = flops / seconds / peak_flops(torch.device(scale.device))
    bars = [Bar(f"{name}: losses that are not finite", sum(not math.isfinite(loss) for loss in losses), 0, "lower")]
    if scale.device == "cuda":
        row["GB"] = torch.cuda.max_memory_allocated() / 1e9
        bars.append(Bar(f"{name}: last loss over the first", losses[-1] / losses[0], 0.8, "lower"))
        bars.append(Bar(f"{name}: memory over the expected", row["GB"] * 1e9 / expected, 1.05, "lower"))
    yield row, bars


def one_rank_group(scale: Scale) -> Found:
    """The dispatcher between ranks, in a group of one, against the local one; then a step in which any synchronization
    of the host with the device is an error."""
    on_gpu = scale.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else None
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=address, rank=0, world_size=1, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    model = dataclasses.replace(scale.model, num_hidden_layers=min(scale.model.num_hidden_layers, 4))
    ids_BT = batch(scale, 0)
    for fp8 in (False, True):
        name = "fp8" if fp8 else "bf16"
        found = []
        for dispatcher in (None, ProcessGroupDispatcher(group, model.n_routed_experts)):
            training = Training(model, fp8, scale.device, dispatcher)
            loss = training.gradients(ids_BT)
            found.append((loss.item(), _norm(training.model)))
        apart = max(abs(a / b - 1) for a, b in zip(*found, strict=True))
        yield (
            {"precision": name, "local": found[0], "one rank": found[1]},
            [Bar(f"{name}: loss and gradient norm off the local dispatcher", apart, 1e-3, "lower")],
        )
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            training.gradients(ids_BT)
            why = ""
        except RuntimeError as error:
            why = str(error).splitlines()[0][:200]
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        yield (
            {"precision": name, "synchronizes": why or "nowhere"},
            [Bar(f"{name}: the host waits for the device outside an event", float(bool(why)), 0, "lower")],
        )
    dist.destroy_process_group()


def _norm(model: DeepseekV3) -> float:
    return sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5


def quantisers(scale: Scale) -> Found:
    """The quantization kernels, beside the last committed result of the same device."""
    committed = RESULTS / f"kernels_gpu-{_device_name(scale)}.json"
    before = {}
    if committed.exists():
        before = {row["kernel"]: row.get("ms") for row in json.loads(committed.read_text())["rows"]}
    for group in (gpu_cases.quantisers, gpu_cases.moving):
        for case in group(scale.sizes, scale.device):
            case.check()
            ms = scale.clock.milliseconds(case.run)
            yield {"kernel": case.name, "ms": ms, "before_ms": before.get(case.name)}, []


def _device_name(scale: Scale) -> str:
    return torch.cuda.get_device_name().replace(" ", "-") if scale.device == "cuda" else "none"


def gradient_forms(scale: Scale) -> Found:
    """The weight gradients of a layer's experts: FP8 with its transposes, without them, and BF16."""
    forms = weight_gradients(scale.sizes, scale.device)
    check_gradients(forms)
    offsets = gpu_cases.offsets_of(scale.sizes, False, scale.device)

    def factor(columns: int) -> tuple[Tensor, Tensor]:
        wide = torch.randn(scale.sizes.rows, columns, device=scale.device, dtype=torch.bfloat16)
        return quantize.quantize_both(wide, True)[1]

    hidden, inner = scale.sizes.hidden, scale.sizes.inner
    pairs = ((factor(2 * inner), factor(hidden)), (factor(hidden), factor(inner)))
    forms["fp8, transposed before"] = lambda: [fp8_gemm.fp8_gemm_k_grouped(*a, *b, offsets) for a, b in pairs]
    for name, run in forms.items():
        yield {"weight_gradient": name, "ms": scale.clock.milliseconds(run)}, []


def decode(scale: Scale) -> Found:
    """MLA decode with the default tile and with one that reads the queries half as often."""
    sizes = scale.sizes
    slots, width, rank = 64, 576, 512
    blocks = -(-sizes.context // slots)
    cache = torch.randn(sizes.batch * blocks, slots, width, device=scale.device, dtype=torch.bfloat16)
    tables = torch.randperm(sizes.batch * blocks, device=scale.device).view(sizes.batch, blocks)
    positions = torch.full((sizes.batch, 1), sizes.context - 1, device=scale.device)
    q = torch.randn(sizes.batch, 1, sizes.heads, width, device=scale.device, dtype=torch.bfloat16)
    run = partial(mla_decode.mla_decode_triton, q, cache, tables, positions, width**-0.5, rank)
    expected = mla_decode.mla_decode_reference(q.float(), cache.float(), tables, positions, width**-0.5, rank)
    for name, options in {
        "default": {},
        "64, 64, 8, 2": {"blocks": DecodeBlocks(64, 64, 8, 2)},
        "64, 64, 8, 2, one split": {"blocks": DecodeBlocks(64, 64, 8, 2), "splits": 1},
    }.items():
        near(run(**options), expected, 2.0**-6)
        ms = scale.clock.milliseconds(partial(run, **options))
        yield {"decode": name, "ms": ms, "TB/s": sizes.batch * sizes.context * width * 2 / ms / 1e9}, []


def peers(scale: Scale) -> Found:
    """PyTorch's block-scaled product, FlexAttention and torch.compile, beside our kernels."""
    if scale.device != "cuda":
        yield {"peer": "none without a GPU"}, []
        return
    for name, ours, theirs in (*_scaled_products(scale), *_flex_attention(scale), *_compiled(scale)):
        row: dict[str, Any] = {"peer": name, "ours_ms": scale.clock.milliseconds(ours)}
        try:
            near(theirs(), ours(), 2.0**-5)
            row["peer_ms"] = scale.clock.milliseconds(theirs)
        except Exception as error:  # of any kind: a peer may lack a size, and the others are still measured
            row["refused"] = " ".join(str(error).split())[:200]
        yield row, []


Compared = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def _scaled_products(scale: Scale) -> Iterator[Compared]:
    m, n, k = 4096, scale.sizes.inner, scale.sizes.hidden
    x, w = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
    a, b = quantize.quantize(x, power_of_two=True), quantize.quantize(w, quantize.WEIGHT_BLOCKS, True)
    a_scales = a[1].t().contiguous().t()  # as cuBLAS wants them: a column of tiles is contiguous

    def peer() -> Tensor:
        return torch._scaled_mm(a[0], b[0].t(), a_scales, b[1].t(), out_dtype=torch.bfloat16)

    yield f"_scaled_mm by blocks {m}x{n}x{k}", partial(fp8_gemm.fp8_gemm_triton, *a, *b), peer


def _flex_attention(scale: Scale) -> Iterator[Compared]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, heads = scale.sizes.length, scale.sizes.heads
    q, k = torch.randn(2, 1, length, heads, 192, device="cuda", dtype=torch.bfloat16).unbind(0)
    v = torch.randn(1, length, heads, 128, device="cuda", dtype=torch.bfloat16)
    ids_BT = (torch.arange(length, device="cuda") // (length // 6)).unsqueeze(0)
    documents = find_documents(ids_BT)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (ids_BT[0, i] == ids_BT[0, j])

    compiled = torch.compile(flex_attention)
    mask = create_block_mask(visible, None, None, length, length, device="cuda")
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    ours = partial(attention.causal_attention_triton, q, k, v, 0.07, documents)
    yield "FlexAttention, six documents", ours, lambda: compiled(*rows, block_mask=mask, scale=0.07).transpose(1, 2)


def _compiled(scale: Scale) -> Iterator[Compared]:
    x = torch.randn(scale.sizes.rows // 4, scale.sizes.hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(scale.sizes.hidden, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(rms_norm.rms_norm_reference)
    both = [with_gradients(lambda *a, f=f: f(*a, 1e-6), x, weight) for f in (rms_norm.rms_norm_triton, compiled)]
    yield "torch.compile of RMSNorm, forward + backward", lambda: both[0]()[1], lambda: both[1]()[1]
    quantizer = torch.compile(partial(quantize.quantize_reference, power_of_two=True))

    def numbers(form: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        return form(x)[0].float()

    ours = partial(quantize.quantize_triton, power_of_two=True)
    yield "torch.compile of quantize 1x128", partial(numbers, ours), partial(numbers, quantizer)


PARTS = {
    "one rank": Part(one_rank_group, 40, 120),
    "bf16": Part(partial(train, fp8=False), 60, 130),
    "fp8": Part(partial(train, fp8=True), 60, 130),
    "quantisers": Part(quantisers, 20, 90),
    "weight gradient": Part(gradient_forms, 20, 60),
    "decode": Part(decode, 20, 60),
    "peers": Part(peers, 30, 180),
}
