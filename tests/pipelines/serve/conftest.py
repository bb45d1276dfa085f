"""A tiny model with random weights, a byte-level tokenizer trained on a few sentences, engines over them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moray.models.compiled import CompiledModel
from moray.models.eager import EagerModel
from moray.models.model import DeepseekV3
from moray.models.presets import PRESETS
from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.openai_api import build_serving_app
from moray.pipelines.serve.scheduler import EngineLimits
from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer
from tests.loopback import serve_app
from tests.native import NATIVE

TEXT = (
    "In the beginning was the word. Grüße aus Zürich, naïve café. こんにちは世界 🙂🙃 def main(argument): return 42\n"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(iter([TEXT] * 20), TokenizerConfig(vocab_size=340))


@pytest.fixture(scope="session")
def vocabulary(tokenizer) -> ServingVocabulary:
    return ServingVocabulary(tokenizer, bos=0, eos=1)


@pytest.fixture(scope="session")
def model(tokenizer) -> DeepseekV3:
    """Weights ten times as large as usual: next tokens then differ clearly, so greedy answers have no near-ties."""
    config = replace(
        PRESETS["tiny"],
        vocab_size=tokenizer.get_vocab_size(),
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = DeepseekV3(config).eval()
    model.init_weights(seed=3)
    return model


@pytest.fixture
def folder(model, tokenizer, tmp_path) -> Path:
    from moray.models import checkpoint

    checkpoint.save(model, tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


@pytest.fixture(scope="session")
def compiled(model) -> CompiledModel:
    return CompiledModel.of(model, NATIVE)


@pytest.fixture
def make_engine(model, compiled, vocabulary) -> Callable[..., Engine]:
    def make(limits: EngineLimits | None = None, blocks: int | None = None, eager: bool = False) -> Engine:
        limits = limits or EngineLimits(step_tokens=64, max_running=8, block_size=16)
        if blocks is not None:
            width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
            block_bytes = model.config.num_hidden_layers * limits.block_size * width * 4
            limits = replace(limits, cache_bytes=blocks * block_bytes)
        return Engine(EagerModel(model) if eager else compiled, vocabulary, limits)

    return make


@pytest.fixture(scope="session")
def shared_engine(compiled, vocabulary) -> Engine:
    return Engine(compiled, vocabulary, EngineLimits(step_tokens=64, max_running=8, block_size=16))


@pytest.fixture(scope="session")
def url(shared_engine) -> Iterator[str]:
    """A real server on loopback."""
    with serve_app(build_serving_app(AsyncEngine(shared_engine), "tiny")) as served:
        yield served
