"""The whole flow on real text and a real Ray, contract by contract: each test reads the output of another room."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moray.actors.data.token_set import open_token_sets
from moray.pipelines.evaluate.eval_report import EvalReport
from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights
from moray.pipelines.pretrain.step import checkpoint_folder, loss_curve
from moray.pipelines.shared.documents import document_id, read_shard, shard_paths
from moray.platform.core.events import MetricEvent, NoteEvent, ProgressEvent, RunEvent, StepEvent, read_events
from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.manifest import hash_file
from moray.platform.store.search import find_artifact
from tests.conftest import Flow
from tests.small_run import STEPS, run_small


def column(folder: Path, name: str) -> list[Any]:
    return [value for path in shard_paths(folder) for value in read_shard(path, [name])[name].to_pylist()]


def test_manifests_describe_the_files_that_are_there(flow: Flow) -> None:
    for step in STEPS:
        artifact = flow.artifact(step)
        assert artifact.manifest.files, step
        for entry in artifact.manifest.files:
            path = artifact.folder / entry.path
            assert path.stat().st_size == entry.size
            assert hash_file(path) == entry.sha256
        assert not [path for path in artifact.folder.rglob(".*") if path.name != ".metadata"], "leftovers"


def test_documents_have_ids_by_source_and_key_and_exclusions_are_counted(flow: Flow) -> None:
    corpus = flow.artifact("corpus").folder
    ids = dict(zip(column(corpus, "id"), column(corpus, "source"), strict=True))
    assert ids[document_id("code", "json/decoder.py")] == "code"
    assert ids[document_id("lines", "a.jsonl#7")] == "lines"
    counts = flow.artifact("corpus").manifest.counts
    empty = len([path for path in flow.folder.rglob("*.py") if not path.read_bytes().strip()])
    assert {k: v for k, v in counts.items() if k.startswith("dropped:")} == {
        "dropped:binary": 1,
        "dropped:empty": empty,
        "dropped:malformed": 1,
    }


def test_every_document_is_kept_or_removed_with_a_reason(flow: Flow) -> None:
    before, after = set(column(flow.artifact("corpus").folder, "id")), set(column(flow.artifact("filter").folder, "id"))
    removed = {
        name: reason
        for path in flow.artifact("filter").folder.glob("removed-*.parquet")
        for name, reason in zip(*(read_shard(path)[c].to_pylist() for c in ("id", "reason")), strict=True)
    }
    assert before == after | set(removed)
    assert not after & set(removed)
    kept = set(column(flow.artifact("dedup").folder, "id"))
    gone = [row for path in flow.artifact("dedup").folder.glob("removed-*") for row in read_shard(path).to_pylist()]
    assert after == kept | {row["id"] for row in gone}
    pair = {document_id("code", "copy.py"), document_id("code", "json/decoder.py")}
    exact = [row for row in gone if row["reason"] == "exact"]
    assert {exact[0]["id"], exact[0]["representative"]} == pair
    train, heldout = (set(column(flow.artifact("split").folder / part, "id")) for part in ("train", "heldout"))
    assert kept == train | heldout
    assert not train & heldout


def test_tokens_spell_the_documents(flow: Flow) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(flow.artifact("tokenizer").folder / "tokenizer.json"))
    texts = {
        name: text
        for part in ("train", "heldout")
        for path in shard_paths(flow.artifact("split").folder / part)
        for name, text in zip(*(read_shard(path)[c].to_pylist() for c in ("id", "text")), strict=True)
    }
    spelled = {}
    for part in ("train", "heldout"):
        folder = flow.artifact("tokenize").folder / part
        for token_set in open_token_sets(str(folder)).values():
            assert token_set.vocabulary.tokenizer == flow.artifact("tokenizer").fingerprint
            for shard in token_set.shards:
                assert hash_file(folder / token_set.source / f"tokens-{shard.number:05d}.bin") == shard.sha256
                for name, ids, _ in token_set.documents(shard):
                    assert (ids[0], ids[-1]) == (token_set.vocabulary.bos, token_set.vocabulary.eos)
                    spelled[name] = tokenizer.decode(ids[1:-1].tolist())
    assert spelled == texts


def test_training_learns_and_its_events_reach_the_runner(flow: Flow) -> None:
    losses = [e.value for e in flow.events if isinstance(e, MetricEvent) and e.name == "train_loss"]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(np.log(512), abs=0.3), "an untrained model knows nothing"
    assert losses[-1] < losses[0] - 0.5
    assert [v for _, v in loss_curve(read_events(flow.result.folder), "pretrain")] == losses
    loads = [e for e in flow.events if isinstance(e, MetricEvent) and e.name == "train_expert_load"]
    assert {e.labels["layer"] for e in loads} == {"1", "2", "3"}, "the first of three is dense, a fourth predicts ahead"
    assert all(e.value >= 1 for e in loads), "the fullest expert has at least the mean"
    further = {e.name: e.value for e in flow.events if isinstance(e, MetricEvent)}
    assert 3 < further["train_prediction_loss"] < np.log(512) + 0.3
    assert 1 <= further["train_balance_loss"] < 2, "1 is even"
    phases = {e.phase for e in flow.events if isinstance(e, ProgressEvent)}
    assert {"reading", "filtering", "signing", "tokenizing", "training", "scoring"} <= phases
    assert [e.state for e in read_events(flow.result.folder) if isinstance(e, RunEvent)] == ["started", "succeeded"]


def test_the_checkpoint_names_logical_tensors_without_a_trace_of_the_layout(flow: Flow) -> None:
    names = [name for name, _ in read_weights(checkpoint_folder(flow.artifact("pretrain").folder))]
    experts = [name for name in names if ".mlp.experts." in name]
    assert len(experts) == len(set(experts)) == 3 * 8 * 3, "three MoE layers of eight experts with three matrices"
    assert [name for name in names if name.endswith("e_score_correction_bias")]


def test_router_biases_were_trained_and_are_exported(flow: Flow) -> None:
    """Others shipped balancers whose bias is never updated, or not saved."""
    weights = dict(read_weights(checkpoint_folder(flow.artifact("pretrain").folder)))
    biases = [bias for name, bias in weights.items() if name.endswith("e_score_correction_bias")]
    assert all(bias.abs().max() > 0 for bias in biases)


def test_transformers_gives_the_same_logits(flow: Flow) -> None:
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM

    import moray.models

    folder = flow.artifact("export").folder
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    ours = moray.models.load(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode("def decode(self, s):\n    return 1")])
    with torch.no_grad():
        difference = (ours(ids).logits - theirs.eval()(ids).logits).abs().max()
    assert difference < 1e-4


def test_the_report_is_read_by_the_registry(flow: Flow) -> None:
    report = EvalReport.read(flow.artifact("evaluate").folder)
    ours, unigram, order2 = (
        report.value("eval_bits_per_byte", model=name, source="all") for name in ("model", "unigram", "order-2 bytes")
    )
    assert 0 < ours < 8.5
    assert 0 < order2 < unigram + 8
    for row in report.rows:
        assert row.interval[0] <= row.value <= row.interval[1]
        assert row.n > 0
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{flow.home.mlflow_db}", f"sqlite:///{flow.home.mlflow_db}")
    version = client.get_model_version_by_alias("small", "newest")
    logged = client.get_run(version.run_id).data.metrics
    assert logged["moray_eval_bits_per_byte/model/all"] == pytest.approx(ours)
    assert len(client.get_metric_history(version.run_id, "moray_train_loss")) == 12
    assert find_artifact(ArtifactStore(flow.home), "small@newest").reference == flow.artifact("export").reference


def test_the_served_model_answered_over_http(flow: Flow) -> None:
    transcript = json.loads((flow.artifact("smoke-serve").folder / "transcript.json").read_text())
    assert transcript
    closing = (flow.artifact("smoke-serve").folder / "closing.txt").read_text()
    assert "HTTP" in closing


def test_a_second_run_reuses_everything(flow: Flow) -> None:
    result, events = flow.run()
    assert all(row.reused for row in result.steps.values())
    assert {e.state for e in events if isinstance(e, StepEvent)} == {"reused"}


def test_other_workers_reuse_and_a_changed_file_runs_again(flow: Flow) -> None:
    result, _ = flow.run("pretrain.data_workers=2", "pretrain.checkpoint.every=7")
    assert all(row.reused for row in result.steps.values())


def weights_of(artifact: Path) -> str:
    return hashlib.sha256((artifact / "model.safetensors").read_bytes()).hexdigest()


def strike_a_training_worker(flow_home: Path, number: signal.Signals, struck: list[int]) -> None:
    """Waits for a checkpoint to appear, then sends a signal to one of the training workers."""
    import psutil

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(flow_home.glob("artifacts/pretrain/*/checkpoints/step-00000004")):
            for process in psutil.process_iter(["pid", "cmdline"]):
                if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                    os.kill(process.info["pid"], number)
                    struck.append(process.info["pid"])
                    return
        time.sleep(0.02)


@pytest.mark.evidence
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_worker_changes_no_bit_of_the_result(
    flow: Flow, tmp_path: Path, number: signal.Signals
) -> None:
    """After the first checkpoint: the weights are those of the undisturbed run. A hung rank is named and killed."""
    from moray.platform.core.home import Home

    home = Home(tmp_path / "home")
    home.root.mkdir()
    for step in ("corpus", "filter", "dedup", "split", "tokenizer", "tokenize"):
        (home.artifacts / step).mkdir(parents=True)
        for found in (flow.home.artifacts / step).iterdir():
            os.symlink(found, home.artifacts / step / found.name)
    struck: list[int] = []
    striker = threading.Thread(target=strike_a_training_worker, args=(home.root, number, struck))
    striker.start()
    result, _ = run_small(home, flow.folder, flow.cluster, ("pretrain.resilience.hang_seconds=4",), until="export")
    striker.join()
    assert struck, "no worker was struck"
    said = [e.text for e in read_events(result.folder) if isinstance(e, NoteEvent)]
    assert any("resuming from the checkpoint" in text for text in said)
    if number == signal.SIGSTOP:
        named = re.compile(
            r"rank [01] has not reported for [4-9] s; rank [01] waiting in gloo:\w+ number \d+ of group .*, at step"
        )
        assert [text for text in said if named.match(text)], said
    assert weights_of(result.steps["export"].artifact.folder) == weights_of(flow.artifact("export").folder)


def test_every_parquet_file_is_zstd(flow: Flow) -> None:
    path = shard_paths(flow.artifact("corpus").folder)[0]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
