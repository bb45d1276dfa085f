"""evaluate: held-out bits per byte by source, compared with a unigram token model and an order-2 byte model.

Every token of every held-out document is scored once, including the end of the document, in windows of the training
length that do not overlap; the first scored token of a later window has only its predecessor as context. Bits per byte,
the total bits over the documents' UTF-8 bytes, makes models with different tokenizers comparable. The byte model needs
the text of all documents. It is left out if tokens of a source came without it (`tokenize.pretokenized`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from moray.actors.data.token_set import TokenSet, open_token_sets
from moray.pipelines.evaluate.baselines import LN2, ByteCounts, ByteModel, UnigramModel
from moray.pipelines.evaluate.eval_report import EvalReport, EvalRow
from moray.pipelines.shared.documents import read_shard, shard_paths
from moray.pipelines.split import PARTS
from moray.platform.core.errors import InputError
from moray.platform.core.processes import usable_cores
from moray.platform.plan.config import StepConfig
from moray.platform.plan.context import StepContext
from moray.platform.plan.step import Step

if TYPE_CHECKING:
    from moray.models.model import DeepseekV3

BYTE_MODEL = "order-2 bytes"
MODELS = ("model", "unigram", BYTE_MODEL)
METRIC = "eval_bits_per_byte"


class EvaluateConfig(StepConfig):
    batch_windows: int = Field(8, gt=0, description="windows per forward pass")
    resamples: int = Field(200, gt=0, description="bootstrap resamples of documents, for confidence intervals")
    seed: int = Field(1, ge=0, description="seed of the bootstrap")


@dataclass
class Scores:
    """Bytes of each held-out document of one source, and its bits by model."""

    bytes: list[int] = field(default_factory=list)
    bits: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MODELS})


class Evaluate(Step[EvaluateConfig]):
    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 1
    Config = EvaluateConfig
    inputs: ClassVar[dict[str, str]] = {"model": "model", "tokens": "tokens", "documents": "split-documents"}
    optional: ClassVar[frozenset[str]] = frozenset({"documents"})
    produces: ClassVar[str] = "evaluation"

    def reads_in_place(self, config: EvaluateConfig) -> frozenset[str]:
        return frozenset({"documents"})

    def run(self, ctx: StepContext[EvaluateConfig]) -> None:
        try:
            train, heldout = (open_token_sets(f"{ctx.inputs['tokens'].folder}/{part}") for part in PARTS)
        except (ValueError, FileNotFoundError) as error:
            raise InputError(f"evaluate: {error}", "tokenize again (step tokenize)") from error
        scores = {source: Scores() for source in heldout}
        self._score_model(ctx, heldout, scores)
        self._score_unigram(ctx, train, heldout, scores)
        if "documents" in ctx.inputs:
            self._score_bytes(ctx, scores)
        models = _scored_models(scores)
        if BYTE_MODEL not in models:
            ctx.note(f"no {BYTE_MODEL}: it needs the text of every source")
        report = self._report(ctx, scores, models)
        report.write(ctx.folder)
        (ctx.folder / "closing.txt").write_text(_table(report, sorted(scores), models))
        overall = {name: report.value(METRIC, model=name, source="all") for name in models}
        ours, unigram = overall["model"], overall["unigram"]
        ctx.metric(METRIC, ours, source="all", model="model")
        ctx.counts |= {
            "in:documents": sum(len(s.bytes) for s in scores.values()),
            "bits_per_byte": ours,
            "unigram_bits_per_byte": unigram,
        }
        ctx.outcome = f"{ours:.3f} bits/byte; unigram {unigram:.3f}"
        if BYTE_MODEL in overall:
            ctx.counts["order2_bits_per_byte"] = overall[BYTE_MODEL]
            ctx.outcome += f", {BYTE_MODEL} {overall[BYTE_MODEL]:.3f}"

    def _score_model(
        self, ctx: StepContext[EvaluateConfig], heldout: dict[str, TokenSet], scores: dict[str, Scores]
    ) -> None:
        import torch

        from moray.models import checkpoint

        torch.set_num_threads(min(ctx.cluster.topology().cpus, usable_cores()))
        folder = ctx.inputs["model"].folder
        model = checkpoint.load(folder, mtp=False)
        total, done = sum(token_set.tokens for token_set in heldout.values()), 0
        for source, token_set in heldout.items():
            if token_set.vocabulary.size > model.config.vocab_size:
                raise InputError(
                    f"evaluate: the tokens' vocabulary ({token_set.vocabulary.size}) is larger than the model's "
                    f"({model.config.vocab_size})",
                    "use tokens of the model's own tokenizer",
                )
            for ids, size in heldout_documents(token_set):
                windows = list(split_windows(ids, token_set.sequence_length))
                bits = sum(
                    window_bits(model, windows[i : i + ctx.config.batch_windows])
                    for i in range(0, len(windows), ctx.config.batch_windows)
                )
                scores[source].bits["model"].append(bits)
                scores[source].bytes.append(size)
                done += len(ids)
                ctx.progress("scoring", done, total, "tokens")

    def _score_unigram(
        self,
        ctx: StepContext[EvaluateConfig],
        train: dict[str, TokenSet],
        heldout: dict[str, TokenSet],
        scores: dict[str, Scores],
    ) -> None:
        first = next(iter(heldout.values()))
        unigram = UnigramModel(first.vocabulary.size)
        shards = [(token_set, shard) for token_set in train.values() for shard in token_set.shards]
        for done, (token_set, shard) in enumerate(shards):
            ids = token_set.stream(shard)
            unigram.add(ids[(ids != token_set.vocabulary.bos) & (ids != token_set.vocabulary.pad)])
            ctx.progress("unigram", done + 1, len(shards), "shards")
        for source, token_set in heldout.items():
            scores[source].bits["unigram"] = [unigram.bits(ids[1:]) for ids, _ in heldout_documents(token_set)]

    def _score_bytes(self, ctx: StepContext[EvaluateConfig], scores: dict[str, Scores]) -> None:
        folder, counts = ctx.inputs["documents"].location, ByteCounts()
        paths = shard_paths(folder / "train")
        for done, path in enumerate(paths):
            for text in read_shard(path, ["text"])["text"]:
                counts.add(text.as_py().encode())
            ctx.progress("order 2", done + 1, len(paths), "shards")
        model = ByteModel(counts)
        for path in shard_paths(folder / "heldout"):
            table = read_shard(path, ["text", "source"])
            for text, source in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True):
                scores[source].bits[BYTE_MODEL].append(model.bits(text.encode()))

    def _report(self, ctx: StepContext[EvaluateConfig], scores: dict[str, Scores], models: Sequence[str]) -> EvalReport:
        rows = []
        everything = Scores(
            bytes=[size for s in scores.values() for size in s.bytes],
            bits={name: [b for s in scores.values() for b in s.bits[name]] for name in models},
        )
        for source, score in {**scores, "all": everything}.items():
            size = np.array(score.bytes, np.float64)
            for name in models:
                bits = np.array(score.bits[name])
                rows.append(
                    EvalRow(
                        metric=METRIC,
                        labels={"source": source, "model": name},
                        value=float(bits.sum() / size.sum()),
                        n=len(size),
                        interval=bootstrap(bits, size, ctx.config.resamples, ctx.config.seed),
                        data=ctx.inputs["tokens"].fingerprint,
                    )
                )
        return EvalReport(model=ctx.inputs["model"].reference, rows=tuple(rows))


def _scored_models(scores: Mapping[str, Scores]) -> list[str]:
    """The models that have scored every document."""
    return [name for name in MODELS if all(len(score.bits[name]) == len(score.bytes) for score in scores.values())]


def heldout_documents(token_set: TokenSet) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """(token ids with bos and eos, UTF-8 bytes) of every document, in order."""
    for shard in token_set.shards:
        for _, ids, size in token_set.documents(shard):
            yield ids, size


def split_windows(ids: npt.NDArray[np.int64], length: int) -> Iterator[npt.NDArray[np.int64]]:
    """Windows of at most `length` + 1 tokens. Consecutive windows share a token, so that all tokens except the first of
    the document are scored."""
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + length + 1]


def window_bits(model: DeepseekV3, windows: list[npt.NDArray[np.int64]]) -> float:
    """Bits of all tokens except the first of each window."""
    import torch

    longest = max(len(window) for window in windows)
    ids = torch.zeros((len(windows), longest), dtype=torch.int64)
    targets = torch.full((len(windows), longest), -100)
    for row, window in enumerate(windows):
        values = torch.from_numpy(window)
        ids[row, : len(window)] = values
        targets[row, : len(window) - 1] = values[1:]
    with torch.inference_mode():
        nll, _ = model.loss_sum(ids, targets)
    return float(nll) / LN2


def bootstrap(
    bits: npt.NDArray[np.float64], size: npt.NDArray[np.float64], resamples: int, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval of sum(bits) / sum(size), resampling documents."""
    draws = np.random.default_rng(seed).integers(0, len(bits), (resamples, len(bits)))
    low, high = np.percentile(bits[draws].sum(axis=1) / size[draws].sum(axis=1), (2.5, 97.5))
    return float(low), float(high)


def _table(report: EvalReport, sources: list[str], models: Sequence[str]) -> str:
    width = max(len(source) for source in [*sources, "all"]) + 2
    lines = ["held-out bits per byte (lower is better)"]
    lines.append(" " * width + "".join(f"{name:>16}" for name in models) + f"{'documents':>12}")
    for source in [*sources, "all"]:
        values = "".join(f"{report.value(METRIC, model=name, source=source):16.3f}" for name in models)
        n = next(row.n for row in report.rows if row.labels["source"] == source)
        lines.append(f"{source:<{width}}{values}{n:12,}")
    ours, unigram = (report.value(METRIC, model=name, source="all") for name in MODELS[:2])
    lines.append(f"the model needs {1 - ours / unigram:.0%} fewer bits than the unigram model")
    return "\n".join(lines) + "\n"


step = Evaluate()
