"""`moray plan --memory`: the memory of a training step's ranks as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moray.platform.core.errors import InputError
from moray.platform.plan.memory import MemoryRequest, StepMemoryPlan
from moray.platform.run.console import err, out, print_json, print_table


def show_memory(recipe: str, overrides: Sequence[str], request: MemoryRequest, as_json: bool) -> int:
    """Prints the plans; returns 1 if one does not fit. Raises InputError for a recipe without a training step."""
    from moray.platform.api import memory_plans

    with err().status("planning") as status:
        plans = memory_plans(recipe, overrides, request, lambda text: status.update(f"planning {text}"))
    if not plans:
        what = f"the step {request.step} of {recipe}" if request.step else recipe
        raise InputError(f"{what} trains no model", "--memory plans the steps `pretrain` of a recipe")
    if as_json:
        print_json([dataclasses.asdict(one) | {"needed": one.needed, "fits": one.fits} for one in plans])
    else:
        for plan in plans:
            _show(plan)
    return 0 if all(plan.fits for plan in plans) else 1


def _show(plan: StepMemoryPlan) -> None:
    ranks = "1 rank" if plan.world == 1 else f"rank 0 of {plan.world:,}"
    out().print(f"{plan.step}: {ranks}, {plan.gpu}", style="bold")
    rows = [(part, _gb(size), _gb(plan.largest[part])) for part, size in plan.device.items()]
    print_table(("part", "at the peak>", "largest>"), [*rows, ("sum", _gb(plan.needed), "")])
    host = ", ".join(f"{part} {_gb(size)}" for part, size in plan.host.items() if size > 1e7)
    waits = sum(plan.reads.values())
    out().print(f"host: {_gb(sum(plan.host.values()))}{f' ({host})' if host else ''}")
    out().print(f"the host waits for the device {waits} times in a step of this size")
    spare = plan.capacity - plan.needed
    if plan.fits:
        out().print(f"fits: {_gb(spare)} of {_gb(plan.capacity)} are free\n")
        return
    largest = next(iter(plan.device))
    out().print(f"does not fit: {_gb(-spare)} more than {_gb(plan.capacity)}; the largest part is {largest}")
    for change in plan.changes:
        out().print(f"  fits with {change.text}: {_gb(change.bytes)}")
    if not plan.changes:
        out().print(
            "  no change of `parallel` or `optimizer` makes it fit: use more ranks, larger GPUs or shorter sequences"
        )
    out().print()


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
