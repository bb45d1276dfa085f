"""GPUs are used or refused by name, and every worker finds room."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.cluster.pending import Demand, Machine, PendingReport
from moray.pipelines.pretrain.config import PretrainConfig
from moray.pipelines.pretrain.devices import cpu_share, device_text, resolved
from moray.pipelines.pretrain.layout import usable_layout
from moray.pipelines.pretrain.step import step
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError
from tests.pipelines.pretrain.settings import pretrain_config


def config(**settings: Any) -> PretrainConfig:
    return pretrain_config(**{"steps": 1, "batch_sequences": 48, **settings})


def machine(gpus: int, cpus: int = 8) -> Topology:
    return Topology(cpus, gpus, 1 << 30)


def test_without_a_gpu_the_default_is_two_workers_on_cpus() -> None:
    assert device_text(resolved(config(), machine(0))) == "2 workers on CPUs"


@pytest.mark.parametrize(("gpus", "workers", "ep"), [(1, 1, 1), (2, 2, 2), (3, 3, 1), (5, 5, 1), (8, 8, 2)])
def test_the_default_uses_the_gpus_there_are(gpus: int, workers: int, ep: int) -> None:
    """One GPU meets the default of two workers, and is used."""
    chosen = resolved(config(), machine(gpus))
    assert (chosen.parallel.device, chosen.parallel.workers, chosen.parallel.expert_parallel) == ("gpu", workers, ep)


def test_a_given_expert_parallel_is_kept_or_refused() -> None:
    chosen = resolved(config(expert_parallel=4), machine(8))
    assert (chosen.parallel.workers, chosen.parallel.expert_parallel) == (8, 4)
    assert resolved(config(expert_parallel=4), machine(7)).parallel.workers == 4
    with pytest.raises(InputError, match=r"expert_parallel: 4 ranks require a GPU each, and the cluster has 3"):
        resolved(config(expert_parallel=4), machine(3))


def test_the_default_is_no_more_workers_than_sequences() -> None:
    odd = config(batch_sequences=3)
    step.check(odd, {})
    assert step.placement(odd, machine(8)) == "3 workers with a GPU each"
    assert step.placement(odd, machine(0)) == "2 workers on CPUs"


@pytest.mark.parametrize(
    ("ranks", "ep", "layout"),
    [(1016, 64, (960, 64)), (2040, 256, (1792, 256)), (7, 4, (4, 4)), (3, 4, (2, 2)), (5, 1, (5, 1))],
)
def test_lost_ranks_leave_whole_groups_of_experts(ranks: int, ep: int, layout: tuple[int, int]) -> None:
    assert usable_layout(ranks, ep) == layout


def test_too_few_gpus_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"\.workers: 16 workers require a GPU each, and the cluster has 8 GPUs"):
        resolved(config(workers=16), machine(8))
    with pytest.raises(InputError, match="requires a GPU, and the cluster has none"):
        resolved(config(device="gpu"), machine(0))
    assert device_text(resolved(config(workers=16, device="cpu"), machine(8))) == "16 workers on CPUs"
    assert device_text(resolved(config(workers=8), machine(8))) == "8 workers with a GPU each"
    assert device_text(resolved(config(workers=16, min_workers=4), machine(8))) == "4 to 16 workers with a GPU each"
    with pytest.raises(InputError, match=r"pretrain\.resilience\.min_workers: 12 workers"):
        resolved(config(workers=16, min_workers=12), machine(8))


@given(st.integers(1, 512), st.integers(1, 4096))
def test_all_workers_can_be_placed(cpus: int, workers: int) -> None:
    """In Ray's own arithmetic of 1/10,000: rounded up, 3 workers of 0.667 did not fit into 2 CPUs."""
    share = cpu_share(workers, cpus)
    assert 0 < round(share * 10_000) <= 10_000
    assert round(share * 10_000) * workers <= cpus * 10_000 or cpus >= workers
    gang = Demand(((("CPU", share),),) * min(workers, 64))
    room = Machine({"CPU": float(cpus)}, {"CPU": float(cpus)})
    found = PendingReport(15.0).update(0.0, {gang: 1}, [room])
    assert not found or cpus < min(workers, 64) * share, "sums of fractions are off in their last digits"
