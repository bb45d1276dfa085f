"""The table of metrics: every metric has a label and a unit, everywhere it is shown."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from moray.pipelines.pretrain.gauges import Gauges
from moray.platform.core.events import MetricEvent
from moray.platform.core.metrics import TABLE, UNITS, describe
from tests.checkout import ROOT


def emitted() -> Iterator[str]:
    """Names of metrics that steps report: first arguments of `metric` and `_metric`, and keys of metrics by name."""
    for path in (ROOT / "pipelines").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", "") in ("metric", "_metric")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                yield node.args[0].value
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METRIC":
                yield ast.literal_eval(node.value)
            if path.name == "train_step.py" and isinstance(node, ast.Constant) and str(node.value).startswith("train_"):
                yield node.value


def test_every_metric_that_a_step_reports_has_a_label_and_a_unit() -> None:
    found = set(emitted())
    assert {"train_loss", "train_mfu", "train_memory_bytes", "train_grad_norm", "eval_bits_per_byte"} <= found
    assert found <= set(TABLE)


def test_labels_are_words_and_unique() -> None:
    labels = [row.label for row in TABLE.values()]
    assert len(set(labels)) == len(labels)
    for name, row in TABLE.items():
        assert row.name == name
        assert row.label[0].isupper(), name
        assert "_" not in row.label, name
        assert not row.label.lower().startswith("train "), name
        assert row.unit in UNITS, name
        assert row.help, name


def test_titles_name_the_values_of_labels() -> None:
    assert TABLE["train_mfu"].title(["causal"]) == "MFU (causal)"
    assert TABLE["train_mfu"].title(["whole"]) == "MFU (full attention)"
    assert TABLE["train_loss"].title() == "Loss"
    assert TABLE["eval_bits_per_byte"].title(["model", "all"]) == "Held-out bits per byte (model, all)"


def test_an_unknown_metric_has_a_readable_label() -> None:
    row = describe("reward_model_score")
    assert (row.title(), row.unit, row.help) == ("Reward model score", "", "")
    assert describe("reward").title(["math"]) == "Reward (math)"


def test_prometheus_help_names_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.util.metrics

    described: dict[str, str] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            described[name] = description

        def set(self, value: float, tags: dict[str, str]) -> None:
            pass

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)
    gauges = Gauges()
    for name, row in TABLE.items():
        gauges.show(MetricEvent(step="s", name=name, value=1.0, labels=dict.fromkeys(row.labels, "x")))
    assert len(described) == len(TABLE)
    assert described["moray_train_memory_bytes"].endswith("(bytes)")
    assert described["moray_train_mfu"].endswith("(ratio from 0 to 1)")
    assert described["moray_train_start_seconds"].endswith("(seconds)")
    for name, row in TABLE.items():
        assert described[f"moray_{name}"] == f"{row.help} ({UNITS[row.unit]})"
