"""The table of metrics: names, labels, units and descriptions for the terminal, MLflow, Prometheus and the page.

`EventLog` refuses a metric whose name is not in this table, so every metric has one spelling, one label and one unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moray.platform.core.errors import nearest

# unit -> its words in Prometheus' HELP texts. Values are stored in these units; the page scales shares to percent and
# bytes to KiB, MiB, GiB or TiB.
UNITS = {
    "": "dimensionless",
    "nats/token": "nats per token",
    "bits/byte": "bits per byte",
    "tokens": "tokens",
    "tokens/s": "tokens per second",
    "share": "ratio from 0 to 1",
    "s": "seconds",
    "bytes": "bytes",
    "documents": "documents",
    "batches": "batches",
    "ranks": "ranks",
}
_LABEL_VALUES = {"whole": "full attention", "groups": "process groups"}  # label values with other words in titles


@dataclass(frozen=True)
class Metric:
    """One metric.

    name: without the `moray_` prefix of Prometheus. label: its title on the page. unit: a key of `UNITS`. labels: names
    of its Prometheus labels. digits: decimal places in tables.
    """

    name: str
    label: str
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    digits: int = 3

    @property
    def prometheus_help(self) -> str:
        """The HELP text in Prometheus: the description and the unit."""
        return f"{self.help} ({UNITS[self.unit]})"

    def title(self, values: Iterable[str] = ()) -> str:
        """The label followed by label values, for example `MFU (full attention)`."""
        shown = ", ".join(_LABEL_VALUES.get(value, value) for value in values)
        return f"{self.label} ({shown})" if shown else self.label


TABLE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("train_loss", "Loss", "nats/token", "Mean next-token loss of the global batch"),
        Metric("train_prediction_loss", "MTP loss", "nats/token", "Multi-token prediction loss, mean over MTP depths"),
        Metric(
            "train_balance_loss",
            "Balance loss",
            "",
            "Sequence-wise balance loss per MoE layer, before its factor; 1 is a uniform load",
        ),
        Metric(
            "train_loss_by_source",
            "Loss by source",
            "nats/token",
            "Mean next-token loss of a source's tokens since the last report",
            ("source",),
        ),
        Metric(
            "train_heldout_loss",
            "Held-out loss",
            "nats/token",
            "Mean next-token loss of held-out tokens, of a source or of all",
            ("source",),
        ),
        Metric("train_heldout_seconds", "Held-out time", "s", "Duration of a measurement of the held-out loss"),
        Metric("train_grad_norm", "Gradient norm", "", "Global gradient norm before clipping"),
        Metric("train_learning_rate", "Learning rate", "", "Learning rate of the training step", digits=6),
        Metric(
            "train_bias_speed",
            "Router bias update speed",
            "",
            "Router bias update speed of the step",
            digits=5,
        ),
        Metric("train_tokens", "Tokens trained", "tokens", "Tokens trained on so far", digits=0),
        Metric(
            "train_tokens_per_second",
            "Throughput",
            "tokens/s",
            "Throughput of all workers since the last report",
            digits=0,
        ),
        Metric(
            "train_tokens_per_second_per_worker",
            "Throughput per worker",
            "tokens/s",
            "Throughput of one worker (one GPU) since the last report",
            digits=0,
        ),
        Metric(
            "train_mfu",
            "MFU",
            "share",
            "Model FLOPs utilization: model FLOPs over the device's peak, with causal or full attention FLOPs",
            ("attention",),
        ),
        Metric(
            "train_exposed_communication",
            "Exposed communication",
            "share",
            "Share of wall time that rank 0 waits in communication",
        ),
        Metric(
            "train_busy_seconds",
            "Busy time per step",
            "s",
            "Time per step outside of collectives, waits for data included, of the median and of the slowest rank",
            ("rank",),
        ),
        Metric("train_slowest_rank", "Slowest rank", "", "Rank with the longest busy time", digits=0),
        Metric(
            "train_slowest_rank_excess",
            "Excess of the slowest rank",
            "",
            "Busy time of the slowest rank over that of the median rank, minus 1",
        ),
        Metric(
            "train_bias_range",
            "Router bias range",
            "",
            "Largest difference between two biases of one router, over all MoE layers",
            digits=4,
        ),
        Metric(
            "train_memory_bytes",
            "Memory of rank 0",
            "bytes",
            "Peak GPU memory allocated on rank 0; on a CPU, resident memory of the process",
            digits=0,
        ),
        Metric("train_data_wait", "Data loader wait", "share", "Share of wall time spent waiting for the data loader"),
        Metric(
            "train_max_violation",
            "Expert overload (MaxVio)",
            "",
            "Largest (max - mean) / mean expert load over all MoE layers (MaxVio)",
        ),
        Metric(
            "train_expert_load",
            "Expert load, max/mean",
            "",
            "Load of the most loaded expert of a MoE layer over the mean; 1 is a uniform load",
            ("layer",),
        ),
        Metric("train_workers", "Workers", "ranks", "Ranks that train", digits=0),
        Metric(
            "train_start_seconds",
            "Startup time",
            "s",
            "Time from the start of the worker process to the end of its first training step, by phase",
            ("phase",),
        ),
        Metric(
            "train_skipped_batches",
            "Skipped batches",
            "batches",
            "Batches skipped so far because they were harmful",
            digits=0,
        ),
        Metric(
            "train_rollbacks",
            "Rollbacks",
            "",
            "Rollbacks to an earlier checkpoint so far, because weights were bad",
            digits=0,
        ),
        Metric("train_checkpoint_seconds", "Checkpoint stall", "s", "Time that a checkpoint stalled training"),
        Metric(
            "train_checkpoint_write_seconds",
            "Checkpoint write time",
            "s",
            "Time from the start of a checkpoint until it was on disk",
        ),
        Metric("train_checkpoint_bytes", "Checkpoint size", "bytes", "Size of a checkpoint over all ranks", digits=0),
        Metric("train_checkpoint_failures", "Failed checkpoints", "", "Checkpoint writes that failed so far", digits=0),
        Metric(
            "train_archive_failures",
            "Failed archive copies",
            "",
            "Copies of checkpoints to the archive that failed so far",
            digits=0,
        ),
        Metric(
            "task_accuracy",
            "Accuracy on a task",
            "share",
            "Share of items whose right choice is the most likely one",
            ("task",),
        ),
        Metric(
            "task_accuracy_per_byte",
            "Accuracy on a task, per byte",
            "share",
            "The same with log-likelihoods divided by the choices' bytes",
            ("task",),
        ),
        Metric(
            "task_complete",
            "Complete answers on a task",
            "share",
            "Share of items whose answer is complete JSON of their schema",
            ("task",),
        ),
        Metric(
            "harness_score",
            "Score on a harness task",
            "",
            "Score of the Language Model Evaluation Harness",
            ("task", "score"),
        ),
        Metric(
            "eval_bits_per_byte",
            "Held-out bits per byte",
            "bits/byte",
            "Cross-entropy on held-out documents",
            ("source", "model"),
        ),
        Metric("documents", "Documents", "documents", "Documents after a step", ("step",), digits=0),
        Metric("step_seconds", "Step time", "s", "Wall time of a step", ("step",)),
    )
}


def metric(name: str) -> Metric:
    """Returns the table's row for `name`. Raises ValueError with the nearest name if there is none."""
    try:
        return TABLE[name]
    except KeyError:
        raise ValueError(f"unknown metric {name!r}: {nearest(name, TABLE)}") from None


def describe(name: str) -> Metric:
    """Returns the table's row for `name`, or a row with a readable label for metrics of other versions and packages."""
    words = name.replace("_", " ").strip()
    return TABLE.get(name) or Metric(name, words[:1].upper() + words[1:], "", "")
