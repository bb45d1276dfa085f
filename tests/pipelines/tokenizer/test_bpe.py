"""Training in a child process gives the same tokenizer, reports progress, and can be cancelled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from moray.pipelines.tokenizer.bpe import train_bpe, train_in_subprocess
from moray.pipelines.tokenizer.train import DEEPSEEK_V3, TokenizerConfig
from moray.platform.core.errors import StepFailed

TEXTS = [f"number {i} of so many words, {i * i} of them: \u4e2d\u6587\n" for i in range(2000)]
SPECIAL = ["<|bos|>", "<|eos|>"]


class Stopped(Exception):
    """The run was cancelled."""


def test_a_child_trains_the_same_tokenizer_and_reports_progress(tmp_path: Path) -> None:
    told: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert done >= told.get(stage, (0, 0))[0]
        told[stage] = (done, total)

    train_in_subprocess(iter(TEXTS), DEEPSEEK_V3, 500, SPECIAL, tmp_path / "tokenizer.json", progress)
    here = train_bpe(iter(TEXTS), DEEPSEEK_V3, 500, SPECIAL)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(here.to_str())
    assert told.keys() == {"tokenize words", "count pairs", "compute merges"}
    assert all(done == total > 0 for done, total in told.values())


def test_a_child_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"tokenizer training failed with exit code 1: .*No such file"):
        train_in_subprocess(iter(TEXTS), DEEPSEEK_V3, 500, SPECIAL, tmp_path / "no" / "t.json", lambda *_: None)
    with pytest.raises(StepFailed, match=r"tokenizer training failed with exit code 1: .*pattern"):
        train_in_subprocess(iter(TEXTS * 50), ["(?<=a|b"], 500, SPECIAL, tmp_path / "t.json", lambda *_: None)


def test_cancelling_ends_the_child(tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        train_in_subprocess(iter(TEXTS), DEEPSEEK_V3, 500, SPECIAL, tmp_path / "tokenizer.json", progress)
    assert not list(tmp_path.iterdir()) or (tmp_path / "tokenizer.json").stat().st_size


def test_a_pattern_is_one_or_several_and_must_compile() -> None:
    assert TokenizerConfig.model_validate({"pattern": r"\p{L}+"}).pattern == (r"\p{L}+",)
    assert TokenizerConfig.model_validate({"pattern": ["a", "b"]}).pattern == ("a", "b")
    assert TokenizerConfig().pattern == DEEPSEEK_V3
    with pytest.raises(ValidationError, match=r"'\(' is not a valid Oniguruma regular expression"):
        TokenizerConfig.model_validate({"pattern": "("})


@pytest.mark.parametrize("piece", ["\n", " ", "a", ".", "\u0e01", "_"])
def test_a_run_without_a_split_takes_linear_time(piece: str) -> None:
    """As one word, a megabyte would take the trainer half an hour; in parts, it takes a second."""
    trained = train_bpe(iter([*TEXTS, piece * 1_000_000]), DEEPSEEK_V3, 500, SPECIAL)
    assert trained.get_vocab_size() == 500
    assert trained.decode(trained.encode(piece * 5000).ids, skip_special_tokens=False) == piece * 5000


def test_cutting_long_runs_changes_nothing_else() -> None:
    """Encoding splits text only by the recipe's pattern, and runs of up to a thousand characters are learnt whole."""
    here = json.loads(train_bpe(iter(TEXTS), DEEPSEEK_V3, 500, SPECIAL).to_str())
    splits = here["pre_tokenizer"]["pretokenizers"]
    assert [one["pattern"]["Regex"] for one in splits[:-1]] == list(DEEPSEEK_V3)
    assert splits[-1]["type"] == "ByteLevel"
