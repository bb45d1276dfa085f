"""Engines of a folder: compiled, quantized, or by PyTorch where there is no compiler."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from moray.models.checkpoint import save
from moray.models.compiled import CompiledModel
from moray.models.eager import EagerModel
from moray.pipelines.serve.loading import load_engine
from moray.pipelines.serve.sequence import Delta, Request
from moray.platform.core.errors import InputError
from moray.platform.core.serve_options import ServeOptions
from tests.native import NATIVE


@pytest.fixture
def folder(model, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "native").symlink_to(NATIVE)
    NATIVE.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("MORAY_HOME", str(home))
    save(model, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ids_of(engine) -> list[int]:
    sequence = engine.submit(Request((5, 6, 7), 12, temperature=0.0, ignore_eos=True))
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert all(isinstance(output.result, Delta) for output in outputs)
    return sequence.ids[-12:]


def test_a_folder_is_compiled_or_run_by_pytorch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [load_engine(folder, ServeOptions(cache_bytes=1 << 22, threads=threads)) for threads in (1, 2)]
    assert all(isinstance(engine.model, CompiledModel) for engine in engines)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("MORAY_HOME", str(folder))
    with caplog.at_level(logging.WARNING):
        engines.append(load_engine(folder, ServeOptions(cache_bytes=1 << 22)))
    assert isinstance(engines[-1].model, EagerModel)
    assert "there is no C compiler" in caplog.text
    assert len({tuple(ids_of(engine)) for engine in engines}) == 1


def test_quantized_weights_need_the_compiled_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(folder, ServeOptions(cache_bytes=1 << 22, quantize="int8"))
    assert len(ids_of(engine)) == 12
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("MORAY_HOME", str(folder))
    with pytest.raises(InputError, match="--quantize int8 needs the compiled step"):
        load_engine(folder, ServeOptions(cache_bytes=1 << 22, quantize="int8"))
