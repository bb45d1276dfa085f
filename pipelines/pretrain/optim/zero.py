"""DeepSpeed's ZeRO as a backend of the ShardedOptimizer contract, for `optimizer.offload`. The only file that imports
deepspeed.

Stage 1 partitions masters and moments of a flat group over the ranks that hold the same parameters: dense parameters
over all ranks, experts over EDP. Stage 2 also reduces gradients during the backward, and keeps only the partition's.

Notable:
- DeepSpeed's optimizer runs without its engine. It recognises experts by two attributes of their parameters. Without
  these it would silently average an expert group over all ranks, so the reduction groups are checked.
- Gradients are summed, not averaged (`gradient_average=False`), and divided once by the number of tokens, which is
  passed as the loss scale. A sum over ranks does not depend on the layout.
- DeepSpeed silently skips a step whose norm is not finite. Here `clip` returns that norm, and `step` raises.
- DeepSpeed would silently train float64 weights with float32 masters, so float64 is refused.
- On CPUs, DeepSpeed would spend a minute compiling an operation that is not used here, and would require a compiler for
  it. That is disabled.
- Fragments come from our own layout (`flat.py`), which is checked against DeepSpeed's. DeepSpeed's own mapping from
  parameters to optimizer state loses the state of all groups but one, and FP8 moments altogether.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from moray.models.fp8 import weights_changed
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.mesh import Mesh
from moray.pipelines.pretrain.optim.adamw import adamw, set_rate
from moray.pipelines.pretrain.optim.flat import FlatGroup
from moray.pipelines.pretrain.optim.optimizer import Fragment, fragments_of

_BUCKET = 1 << 26  # elements per reduction


class ZeroOptimizer:
    """Masters are FP32 partitions. The model's weights are float32 and are gathered after each step."""

    takes_gradients_in_place = False  # hooks of autograd reduce them

    def __init__(self, groups: list[FlatGroup], mesh: Mesh, config: PretrainConfig, device: torch.device) -> None:
        """Raises ValueError for weights that are not float32."""
        for parameter in (parameter for group in groups for parameter in group.parameters):
            unset = torch.full_like(parameter, float("nan"), device=device)
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(unset))  # type: ignore[no-untyped-call]
        dtype = groups[0].parameters[0].dtype
        if dtype != torch.float32:
            raise ValueError(f"ZeRO requires float32 weights, not {dtype}; set zero_stage to 0")
        self._groups = groups
        self._stage = config.parallel.zero_stage
        self._clock = mesh.clock
        self._norm: torch.Tensor | None = None
        self._pads: list[torch.nn.Parameter] = []
        self._inner = adamw([self._torch_group(group, config) for group in groups], config)
        self._zero = _deepspeed_optimizer(self._inner, groups, mesh, config)
        self._check_layout()
        self._inner.prepare()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self._zero.set_gradient_accumulation_boundary(last)
        torch.autograd.backward(loss)
        if self._stage == 2:  # completes the reductions that hooks started, and adds them to the partition's gradients
            self._zero.overlapping_partition_gradients_reduce_epilogue()

    def reduce(self, tokens: torch.Tensor) -> None:
        if self._stage == 1:
            with self._clock.over(tokens.device):
                self._zero.reduce_gradients()
        self._zero.override_loss_scale(float(tokens))

    def clip(self, largest: float) -> torch.Tensor:
        self._zero.clip_grad = largest
        norm: torch.Tensor = self._zero.scaled_global_norm() / self._zero.loss_scale
        self._norm = norm
        return norm

    def step(self, learning_rate: float) -> None:
        assert self._norm is not None, "clip comes before step"
        if not math.isfinite(self._norm):
            raise FloatingPointError(f"the gradient norm is {float(self._norm)}")
        set_rate(self._inner, learning_rate)
        self._zero.step()
        self._zero.zero_grad()
        self._norm = None
        weights_changed()

    def skip(self) -> None:
        """Clears gradients in the same way as DeepSpeed after an overflow."""
        zero = self._zero
        zero.micro_step_id = -1
        zero.zero_grad()
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero._wait_for_offload_copies()
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        self._norm = None

    def fragments(self, owned: bool = False) -> Iterator[Fragment]:  # a rank holds only the part that it owns
        for index, (group, master) in enumerate(zip(self._groups, self._masters(), strict=True)):
            begin = dist.get_rank(self._zero.real_dp_process_group[index]) * group.partition
            yield from fragments_of(group, begin, begin + group.partition, master, self._inner, begin)

    def refresh_weights(self) -> None:
        self._zero.update_lp_params()
        weights_changed()

    def set_steps(self, steps: int) -> None:
        self._inner.set_steps(steps)

    def _masters(self) -> list[torch.Tensor]:
        masters: list[torch.Tensor] = self._zero.single_partition_of_fp32_groups
        return masters

    def _torch_group(self, group: FlatGroup, config: PretrainConfig) -> dict[str, Any]:
        """The group as a torch parameter group. Parameters that never get a gradient fill its gaps."""
        parameters: list[torch.nn.Parameter] = []
        for parameter, gap in zip(group.parameters, group.gaps, strict=True):
            parameters.append(parameter)
            if gap:
                pad = torch.nn.Parameter(torch.zeros(gap, device=parameter.device))
                self._pads.append(pad)
                parameters.append(pad)
        if group.expert:
            for parameter in parameters:
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = group.name  # type: ignore[attr-defined]
        decay = config.optimizer.weight_decay if group.decays else 0.0
        return {"params": parameters, "weight_decay": decay, "name": group.name, "moe": group.expert}

    def _check_layout(self) -> None:
        """Asserts that DeepSpeed's layout and process groups are the expected ones."""
        for index, group in enumerate(self._groups):
            flat = self._zero.bit16_groups_flat[index]
            assert flat.numel() == group.numel, (group.name, flat.numel(), group.numel)
            assert dist.get_world_size(self._zero.real_dp_process_group[index]) == group.replicas, group.name
            for parameter, start in zip(group.parameters, group.starts, strict=True):
                assert parameter.data_ptr() == flat.data_ptr() + start * flat.element_size(), group.name


def _deepspeed_optimizer(inner: Any, groups: list[FlatGroup], mesh: Mesh, config: PretrainConfig) -> Any:
    device = groups[0].parameters[0].device
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed|torch.distributed")
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import logger
    from deepspeed.utils.timer import NoopTimer

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    names = {p: f"{group['name']}.{i}" for group in inner.param_groups for i, p in enumerate(group["params"])}
    experts = [group.name for group in groups if group.expert]
    offload = DeepSpeedZeroOffloadOptimizerConfig(device="cpu", pin_memory=device.type != "cpu")
    return DeepSpeedZeroOptimizer(
        inner,
        names,
        NoopTimer(),
        {},
        verbose=False,
        reduce_bucket_size=min(_BUCKET, max(group.numel for group in groups)),
        dp_process_group=dist.group.WORLD,
        expert_parallel_group={name: mesh.ep_group or _alone(mesh) for name in experts},
        expert_data_parallel_group={name: mesh.edp_group or _alone(mesh) for name in experts},
        offload_optimizer_config=offload if config.optimizer.offload else None,
        communication_data_type=torch.float32,
        gradient_accumulation_dtype=torch.float32,
        gradient_average=False,
        partition_grads=config.parallel.zero_stage == 2,
        has_moe_layers=bool(experts),
    )


def _alone(mesh: Mesh) -> dist.ProcessGroup:
    """A group of this rank."""
    group = dist.new_group([mesh.rank], use_local_synchronization=True)
    assert group is not None
    return group
