"""Invalid training jobs are one error before Ray and workers start."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from moray.actors.data.token_set import TokenVocabulary, write_index, write_token_shard
from moray.models import checkpoint
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.pretrain.step import step
from moray.pipelines.tokenize.sequence_packing import pack_documents, plan_sequences
from moray.platform.core.cluster import Topology
from moray.platform.core.errors import InputError, RecipeError
from moray.platform.core.home import Home
from moray.platform.store.artifacts import Artifact
from tests.actors.data.test_token_set import documents_of
from tests.pipelines.pretrain.settings import pretrain_config
from tests.s3 import BUCKET, Request, faulty_proxy
from tests.step_contexts import context_for, manifest_of

LENGTH = 16
VOCABULARY = TokenVocabulary(tokenizer="t", size=100, bos=0, eos=1, pad=2)


class NeverStarted:
    """A cluster that must not be started."""

    logs = Path()
    gpus = 0

    def topology(self) -> Topology:
        return Topology(2, self.gpus, 1 << 30)

    def ensure(self) -> NoReturn:
        pytest.fail("Ray was started")


def artifact(folder: Path, step_name: str, produces: str) -> Artifact:
    manifest = manifest_of(step_name, "ab12", produces)
    return Artifact(folder, manifest)


@pytest.fixture
def tokens(tmp_path: Path) -> Artifact:
    folder = tmp_path / "tokens"
    documents = documents_of([[5, 99]] * 64, vocabulary=VOCABULARY)
    pieces = plan_sequences(np.diff(documents.bounds), LENGTH, "concatenate")
    shard = write_token_shard(folder / "train" / "a", 0, *pack_documents(documents, pieces, LENGTH, VOCABULARY))
    write_index(folder / "train" / "a", [shard], LENGTH, VOCABULARY)
    return artifact(folder, "tokenize", "tokens")


def error_of(tmp_path: Path, inputs: dict[str, Artifact], **settings: Any) -> InputError:
    config = pretrain_config(**{"steps": 2, "batch_sequences": 2, **settings})
    context = context_for(
        "pretrain", config, inputs, tmp_path / "out", Home(tmp_path / "home"), tmp_path / "run", NeverStarted()
    )
    with pytest.raises(InputError) as caught:
        step.run(context)
    return caught.value


def change(index: Path, **fields: Any) -> None:
    index.write_text(json.dumps(json.loads(index.read_text()) | fields))


def test_tokens_beyond_their_vocabulary(tmp_path: Path, tokens: Artifact) -> None:
    vocabulary = dataclasses.asdict(VOCABULARY) | {"size": 99}
    change(tokens.folder / "train" / "a" / "index.json", vocabulary=vocabulary)
    error = error_of(tmp_path, {"tokens": tokens})
    assert "a/tokens-00000.bin: token id 99 is outside the vocabulary of 99" in error.message
    assert "tokenize again" in error.hint


def test_tokens_that_are_cut_off_or_none(tmp_path: Path, tokens: Artifact) -> None:
    path = tokens.folder / "train" / "a" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "its index requires" in error_of(tmp_path, {"tokens": tokens}).message
    path.unlink()
    assert "tokens-00000.bin" in error_of(tmp_path, {"tokens": tokens}).message
    (path.parent / "index.json").unlink()
    assert "contains no token set" in error_of(tmp_path, {"tokens": tokens}).message


def model_of(folder: Path, **fields: Any) -> Artifact:
    model = DeepseekV3(dataclasses.replace(preset("tiny"), **{"vocab_size": VOCABULARY.size, **fields}))
    model.init_weights(1)
    checkpoint.save(model, folder)
    return artifact(folder, "export", "model")


def test_a_checkpoint_of_another_model(tmp_path: Path, tokens: Artifact) -> None:
    """With a smaller vocabulary, with another shape than the recipe, and with tensors that do not match its config."""
    small = {"tokens": tokens, "model": model_of(tmp_path / "small", vocab_size=50)}
    assert "vocabulary (100) is larger than the input model's (50)" in error_of(tmp_path, small).message
    other = {"tokens": tokens, "model": model_of(tmp_path / "other")}
    error = error_of(tmp_path, other, model={"hidden_size": 64})
    assert "the overrides change tensor shapes of the input model" in error.message
    change(other["model"].folder / "config.json", hidden_size=32)
    assert "shape" in error_of(tmp_path, other).message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"n_routed_experts": 7}, "workers": 2, "expert_parallel": 2}, "n_routed_experts (7)"),
        ({"mixture": {"wiki": 1.0}}, "wiki"),
        ({"schedule": {"warmup_tokens": 10_000}}, "warmup_tokens"),
    ],
)
def test_errors_that_only_the_tokens_reveal(
    tmp_path: Path, tokens: Artifact, settings: dict[str, Any], message: str
) -> None:
    if "model" in settings:
        inputs = {"tokens": tokens, "model": model_of(tmp_path / "odd", n_routed_experts=7, n_group=1, topk_group=1)}
        settings = {key: value for key, value in settings.items() if key != "model"}
    else:
        inputs = {"tokens": tokens}
    assert message in error_of(tmp_path, inputs, **settings).message


def test_deepep_without_gpus_or_not_installed(
    tmp_path: Path, tokens: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = error_of(tmp_path, {"tokens": tokens}, dispatch="deepep", precision="bf16")
    assert error.message == "pretrain.parallel.dispatch: deepep requires a GPU for each of 2 workers; the cluster has 0"
    monkeypatch.setattr(NeverStarted, "gpus", 2)
    error = error_of(tmp_path, {"tokens": tokens}, dispatch="deepep", precision="bf16")
    assert error.message == "pretrain.parallel.dispatch: deepep requires the package deep_ep, which is not installed"


@pytest.mark.parametrize(("beta2", "refused"), [(0.95, False), (0.97, False), (0.98, True), (0.999, True)])
def test_fp8_moments_require_a_small_beta2(beta2: float, refused: bool) -> None:
    config = pretrain_config(steps=2, moments="fp8", beta2=beta2)
    if refused:
        with pytest.raises(RecipeError, match=f"optimizer.moments: fp8 requires beta2 of at most 0.97, not {beta2}"):
            step.check(config, {"tokens": "tokens"})
    else:
        step.check(config, {"tokens": "tokens"})
    step.check(pretrain_config(steps=2, beta2=beta2), {"tokens": "tokens"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"precision": "float32"}, "dispatch: deepep requires precision bf16 or fp8, not float32"),
        ({"precision": "fp8", "model": {"hidden_size": 136}}, r"requires hidden_size \(136\) to be a multiple of 16"),
    ],
)
def test_hidden_states_that_deepep_does_not_support(settings: dict[str, Any], says: str) -> None:
    config = pretrain_config(steps=2, dispatch="deepep", **settings)
    with pytest.raises(RecipeError, match=says):
        step.check(config, {"tokens": "tokens"})


def test_an_archive_that_cannot_be_written(
    tmp_path: Path, tokens: Artifact, s3_url: str, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(request: Request) -> str | tuple[int, str]:
        denied = (403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
        return denied if request.method == "PUT" else "pass"

    missing = error_of(tmp_path, {"tokens": tokens}, archive="s3://no-such-bucket/archive")
    assert "no-such-bucket" in missing.message
    with faulty_proxy(s3_url, deny) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert "access denied" in error_of(tmp_path, {"tokens": tokens}, archive=f"s3://{BUCKET}/archive").message
