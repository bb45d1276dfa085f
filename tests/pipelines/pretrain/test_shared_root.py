"""Training on a machine with only a shared root: tokens are read from it, and checkpoints are copied to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moray.pipelines.pretrain.checkpoint.stored_weights import read_weights
from moray.pipelines.pretrain.step import checkpoint_folder
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore
from tests.conftest import Flow
from tests.s3 import BUCKET, keys
from tests.small_run import recipe_text

pytestmark = pytest.mark.evidence


def test_a_fresh_machine_trains_from_the_bucket_to_the_same_bits(flow: Flow, tmp_path: Path, s3: Any) -> None:
    root = f"s3://{BUCKET}/shared"
    here = ArtifactStore(Home(flow.home.root, root))
    for step in ("corpus", "filter", "dedup", "split", "tokenizer", "tokenize"):
        here.publish(flow.artifact(step))
    (tmp_path / "small.yaml").write_text(recipe_text(flow.folder, until="pretrain"))
    archive = f"s3://{BUCKET}/archive"
    command = [sys.executable, "-m", "moray", "run", str(tmp_path / "small.yaml")]
    command += ["--set", "pretrain.stream_tokens=true", "--set", f"pretrain.checkpoint.archive={archive}"]
    environment = {**os.environ, "MORAY_HOME": str(tmp_path / "home"), "MORAY_ARTIFACTS": root}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    fresh = tmp_path / "home" / "artifacts"
    assert not list(fresh.glob("tokenize/*/train")), "tokens were copied here"
    there = dict(read_weights(checkpoint_folder(next(fresh.glob("pretrain/[!.]*")))))
    expected = dict(read_weights(checkpoint_folder(flow.artifact("pretrain").folder)))
    assert all(there[name].equal(weight) for name, weight in expected.items())
    whole = sorted(key.split("/")[2] for key in keys(s3, "archive/") if key.endswith("/checksums.json"))
    assert whole == ["step-00000004", "step-00000008", "step-00000012"]
