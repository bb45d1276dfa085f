"""Token dispatch to expert ranks: one fused permute, quantize and send pass, compared with separate operations.

Both variants start from the same BF16 hidden states and the same routing (DeepSeek-V3's, over the ranks' share of its
experts). Both end when the same bytes are in the receivers' memory. The separate variant packs hidden states in FP8
(`kernels/wire.py`), permutes them by receiver and sends them with `all_to_all_single`. The fused variant quantizes each
hidden state once and writes it straight into the receivers' memory (`kernels/push.py`), and a small collective signals
completion. Each hidden state carries the ids and weights of its experts. The bar compares both variants over the same
transport. Gloo's sockets have separate result rows.

On CPUs, two ranks with one core each compare gloo with shared memory. On GPUs with NVLink, the kernel is written in
Triton, the memory is torch's symmetric memory, and the peer is NCCL:
torchrun --nproc-per-node GPUS benchmarks/all_to_all.py --gpu

Usage: python benchmarks/all_to_all.py [TOKENS=4096] [ROUNDS=15]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from harness.result import Bar, report
from torch import Tensor

from moray.kernels.push import push_rows
from moray.kernels.router import route
from moray.kernels.util.host_memory import keep_freed_memory
from moray.kernels.wire import pack_rows, pack_rows_reference, packed_width
from moray.models.expert_parallel.all_to_all import AllToAll
from moray.models.expert_parallel.send_plan import SendPlan
from moray.models.expert_parallel.shared_memory import connect
from moray.models.presets import preset

Way = Callable[[], Tensor]  # runs one complete transfer and returns the received bytes
PORT = 29556


class Payload:
    """This rank's hidden states, their destination ranks, and the counts of sent and received hidden states."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        config, rank, self.ranks = preset("v3"), dist.get_rank(), dist.get_world_size()
        experts = config.n_routed_experts
        generator = torch.Generator().manual_seed(rank)
        self.rows_TD = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16().to(device)
        ids_TK, weights_TK, _ = route(
            torch.randn(tokens, experts, generator=generator),
            torch.zeros(experts),
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
        )
        self.plan = SendPlan.of(ids_TK.to(device), self.ranks, experts // self.ranks)
        counts = self.plan.send_counts()
        came = torch.empty_like(counts)
        dist.all_to_all_single(came, counts)
        self.sent, self.received = counts.tolist(), came.tolist()
        tails = (ids_TK.int(), weights_TK.contiguous())
        self.metadata_TN = torch.cat([tail.view(torch.uint8) for tail in tails], dim=1).to(device)
        self.width = packed_width(config.hidden_size) + self.metadata_TN.shape[1]


def separate(payload: Payload, all_to_all: AllToAll, pack: Callable[[Tensor], Tensor]) -> Tensor:
    bytes_TX = torch.cat((pack(payload.rows_TD), payload.metadata_TN), dim=1)
    rows_CX = payload.plan.gather(bytes_TX, sum(payload.sent))
    return all_to_all.start(rows_CX, payload.sent, payload.received).wait()


def cpu_ways(payload: Payload) -> dict[str, Way]:
    sockets, memory = AllToAll(dist.group.WORLD), connect(dist.group.WORLD)
    assert memory is not None, "the ranks share no memory"
    shared = AllToAll(dist.group.WORLD, memory=memory)
    sent, received, sent_PT = payload.sent, payload.received, payload.plan.sent_PT

    def fused() -> Tensor:
        return shared.start_fp8(payload.rows_TD, payload.metadata_TN, sent_PT, sent, received).wait()

    return {
        "separate, packed by torch": lambda: separate(payload, sockets, pack_rows_reference),
        "separate": lambda: separate(payload, sockets, pack_rows),
        "separate, by shared memory": lambda: separate(payload, shared, pack_rows),
        "fused": fused,
    }


def gpu_ways(payload: Payload) -> dict[str, Way]:
    from torch.distributed import _symmetric_memory as symmetric

    tokens, rank = len(payload.rows_TD), dist.get_rank()
    shape = (tokens, payload.width)
    mine = symmetric.empty(payload.ranks * tokens * payload.width, dtype=torch.uint8, device=payload.rows_TD.device)
    handle = symmetric.rendezvous(mine, dist.group.WORLD)
    begin = rank * tokens * payload.width
    inboxes = [handle.get_buffer(peer, shape, torch.uint8, begin) for peer in range(payload.ranks)]

    def fused() -> Tensor:
        push_rows(payload.rows_TD, payload.metadata_TN, payload.plan.sent_PT, inboxes)
        handle.barrier()
        parts = mine.view(payload.ranks, *shape)
        return torch.cat([part[:count] for part, count in zip(parts, payload.received, strict=True)])

    nccl = AllToAll(dist.group.WORLD)
    return {"separate": lambda: separate(payload, nccl, pack_rows), "fused": fused}


def seconds(way: Way, device: torch.device) -> tuple[float, Tensor]:
    """Seconds of the slowest rank, and the received bytes of this rank."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    arrived = way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item(), arrived


def rank_main(tokens: int, rounds: int, device: torch.device) -> int:
    payload = Payload(tokens, device)
    ways = gpu_ways(payload) if device.type == "cuda" else cpu_ways(payload)
    expected = seconds(ways["separate"], device)[1]
    for name, way in ways.items():
        assert torch.equal(seconds(way, device)[1], expected), f"{name}: other bytes arrived"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, device)[0])
    return say(payload, times, device) if dist.get_rank() == 0 else 0


def say(payload: Payload, times: dict[str, list[float]], device: torch.device) -> int:
    medians = {name: statistics.median(found) for name, found in times.items()}
    sent = sum(payload.sent) * payload.width
    rows: list[dict[str, Any]] = [
        {"way": name, "ms": took * 1e3, "GB_s": sent / took / 1e9, "over_fused": took / medians["fused"]}
        for name, took in medians.items()
    ]
    rows.append({"ranks": payload.ranks, "tokens": len(payload.rows_TD), "bytes_of_a_rank": sent})
    same = "separate, by shared memory" if device.type == "cpu" else "separate"
    ratio = medians[same] / medians["fused"]
    bar = Bar("separate operations over fused, same transport", ratio, 1.2, "higher")
    return report(f"all_to_all{'_gpu' if device.type == 'cuda' else ''}", rows, [bar])


def main(tokens: str = "4096", rounds: str = "15") -> int:
    command = [sys.executable, __file__, "--rank"]
    own = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(PORT),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [subprocess.Popen([*command, tokens, rounds], env={**own, "RANK": str(rank)}) for rank in (0, 1)]
    return max(process.wait() for process in ranks)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--gpu"]:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        result = rank_main(int((*sys.argv[2:], "4096")[0]), 50, device)
    elif sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        keep_freed_memory()
        dist.init_process_group("gloo")
        result = rank_main(int(sys.argv[2]), int(sys.argv[3]), torch.device("cpu"))
    else:
        sys.exit(main(*sys.argv[1:]))
    dist.destroy_process_group()
    sys.exit(result)
