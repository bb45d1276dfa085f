"""Training on four hosts with 1 Gbit/s links, and with links without a limit: do the loader and the overlap hide them?

A head, an S3 server, a laptop and four nodes run in namespaces of one machine (cluster/drills/), one rank on each node,
EP 2 x EDP 2: CPU, gloo, emulated links. Tokens are read from the S3 server and checkpoints written to it. The four
ranks share the machine's cores, so a rank is often late and waits are long on any link; the difference between the two
runs is that of the links. Both train the same model on the same batches, so their losses must be equal. Needs root.

Usage: python benchmarks/cluster_training.py [STEPS=40]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.code_state import ROOT
from harness.result import Bar, report

from moray.cluster.drills.hosts import DrillHost, reason_against
from moray.cluster.drills.ray_cluster import WORK, RayDrill, ray_drill
from moray.cluster.drills.scenarios import Fault, Say, run_recipe

RATES = {"no limit": "", "1 Gbit/s": "1gbit"}
GBIT = 125e6  # bytes per second
WARM_UP = 5  # steps
BATCH, LENGTH = 32, 256
RECIPE = """
name: links
steps:
  corpus:
    with:
      sources:
        - {{name: python, path: "${{python:stdlib}}", include: ["*.py"], license: PSF-2.0}}
  split: {{inputs: {{documents: corpus}}, with: {{heldout: 0.05}}}}
  tokenizer: {{inputs: {{documents: split}}, with: {{vocab_size: 2048}}}}
  tokenize: {{inputs: {{documents: split, tokenizer: tokenizer}}, with: {{sequence_length: {length}}}}}
  pretrain:
    inputs: {{tokens: tokenize}}
    with:
      steps: {steps}
      batch_sequences: {batch}
      parallel: {{micro_batch_sequences: 4, workers: 4, expert_parallel: 2}}
      checkpoint: {{every: 10}}
      model: {{preset: tiny}}
"""
MEASURES = ("moray.pipelines.pretrain.train_step", "moray.pipelines.pretrain.worker", "moray.actors.data.token_files")
METRICS = {
    "train_data_wait": "data_wait",
    "train_exposed_communication": "exposed",
}


def sent(hosts: list[DrillHost]) -> int:
    """Bytes that the hosts have sent since they were switched on."""
    total = 0
    for host in hosts:
        command = ["ip", "-n", host.namespace, "-s", "-j", "link", "show", "eth0"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        total += found[0]["stats64"]["tx"]["bytes"]
    return total


def metrics(drill: RayDrill, name: str) -> dict[int, float]:
    """The values of a metric of the drill's only run, by training step."""
    found = {}
    for path in (drill.laptop.home / "moray" / "runs").glob("*/events/*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["kind"] == "metric" and event["name"] == name:
                found[int(event["at"])] = float(event["value"])
    return found


def one_run(link: str, steps: int) -> tuple[dict[str, Any], dict[int, float]]:
    """A result row, and the losses by step."""
    before: list[int] = []

    def count(drill: RayDrill, say: Say) -> None:
        before.append(sent(drill.nodes))

    with tempfile.TemporaryDirectory() as folder, ray_drill(Path(folder), 4, ROOT, RATES[link]) as drill:
        (drill.work / "links.yaml").write_text(RECIPE.format(steps=steps, batch=BATCH, length=LENGTH))
        code = run_recipe(drill, f"{WORK}/links.yaml", [Fault("pretrain", 0.0, count)], _say)
        if code:
            raise SystemExit(f"the run on links with {link} ended with exit code {code}")
        moved = sent(drill.nodes) - before[0]
        row: dict[str, Any] = {"link": link}
        for name, label in METRICS.items():
            row[label] = statistics.median(value for at, value in metrics(drill, name).items() if at > WARM_UP)
        rates = metrics(drill, "train_tokens_per_second")
        row["step_s"] = BATCH * LENGTH / statistics.median(rate for at, rate in rates.items() if at > WARM_UP)
        row["sent_mb_per_host_and_step"] = moved / 4 / steps / 1e6
        row["share_of_1_gbit"] = row["sent_mb_per_host_and_step"] * 1e6 / row["step_s"] / GBIT
        return row, metrics(drill, "train_loss")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main(steps: str = "40") -> int:
    if reason := reason_against():
        print(f"error: no hosts on this machine: {reason}", file=sys.stderr)
        return 2
    (free, losses), (limited, limited_losses) = (one_run(link, int(steps)) for link in RATES)
    differ = sum(losses[at] != limited_losses[at] for at in losses)
    more = limited["exposed"] - free["exposed"]
    bars = [
        Bar("steps whose losses differ", float(differ), 0.0, "lower"),
        Bar("share of a step waiting for batches, at 1 Gbit/s", limited["data_wait"], 0.02, "lower"),
        Bar("share of a step of exposed communication, at 1 Gbit/s more than without a limit", more, 0.09, "lower"),
        Bar("step time at 1 Gbit/s over that without a limit", limited["step_s"] / free["step_s"], 1.1, "lower"),
    ]
    return report("cluster_training", [free, limited], bars, MEASURES)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
