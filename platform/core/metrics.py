"""The one table of metric names. Terminal, MLflow, Prometheus and the page take names, units and help from here.

A metric event whose name is not in this table is refused, so no two places can spell one figure differently.
"""

from __future__ import annotations

from dataclasses import dataclass

from moray.platform.core.errors import nearest


@dataclass(frozen=True)
class Metric:
    """`name` without the `moray_` prefix; `unit` as shown to people ('' for a plain number)."""

    name: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    digits: int = 3


TABLE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("train_loss", "nats/token", "Mean next-token loss of the global batch"),
        Metric("train_prediction_loss", "nats/token", "Mean loss of multi-token prediction, over its depths"),
        Metric("train_balance_loss", "", "Sequence-wise balance loss per layer, without its factor; 1 is even"),
        Metric("train_grad_norm", "", "Global gradient norm before clipping"),
        Metric("train_learning_rate", "", "Learning rate of the step", digits=6),
        Metric("train_bias_speed", "", "Router bias update speed of the step", digits=5),
        Metric("train_tokens", "tokens", "Tokens trained on so far", digits=0),
        Metric("train_tokens_per_second", "tokens/s", "Throughput over all workers since the last report", digits=0),
        Metric(
            "train_tokens_per_second_per_worker", "tokens/s", "Throughput of one worker, which is one GPU", digits=0
        ),
        Metric("train_mfu", "share", "Model FLOPs over the device's peak, attention causal or whole", ("attention",)),
        Metric("train_exposed_communication", "share", "Share of the time that rank 0 stands in communication"),
        Metric("train_bias_range", "", "Largest difference of two biases of one router", digits=4),
        Metric("train_memory_bytes", "bytes", "Of rank 0: the most that its GPU held, or its process", digits=0),
        Metric("train_data_wait", "share", "Share of the step spent waiting for the data loader"),
        Metric("train_max_violation", "", "Largest (max - mean) / mean expert load over the MoE layers (MaxVio)"),
        Metric("train_expert_load", "", "Load of a layer's fullest expert over the mean; 1 is even", ("layer",)),
        Metric("train_workers", "", "Ranks that train", digits=0),
        Metric("train_start_seconds", "s", "Time from the start of a worker's process to its first step", ("phase",)),
        Metric("train_skipped_batches", "", "Batches left out so far, because they would have harmed", digits=0),
        Metric(
            "train_rollbacks", "", "Times so far that training went back because the weights had gone bad", digits=0
        ),
        Metric("train_checkpoint_seconds", "s", "Time training stood still for a checkpoint"),
        Metric("train_checkpoint_write_seconds", "s", "Time from a checkpoint's begin until it was on disk"),
        Metric("train_checkpoint_bytes", "bytes", "Size of a checkpoint", digits=0),
        Metric("train_checkpoint_failures", "", "Checkpoints that could not be written, so far", digits=0),
        Metric("train_archive_failures", "", "Copies of checkpoints to the archive that failed, so far", digits=0),
        Metric("eval_bits_per_byte", "bits/byte", "Held-out cross entropy", ("source", "model")),
        Metric("documents", "documents", "Documents after a step", ("step",), digits=0),
        Metric("step_seconds", "s", "Wall time of a step", ("step",)),
    )
}


def metric(name: str) -> Metric:
    """The table's row for `name`; ValueError naming the nearest one if there is none."""
    try:
        return TABLE[name]
    except KeyError:
        raise ValueError(f"unknown metric {name!r}: {nearest(name, TABLE)}") from None
