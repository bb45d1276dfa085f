"""Greedy decoding on one CPU thread: Moray's engine, transformers' `generate` and llama.cpp, on the same weights.

Models have random weights, large enough that routers and next ids differ. Each contestant reads prompts of 64 ids and
writes 64 more, at batch 1 and 8; rounds are interleaved. A rate is that of the ids after the first, over the CPU time
of the process, in the median round. transformers runs each implementation of experts and of attention once; the two
fastest run on, and the fastest counts. llama.cpp runs with flash attention and a cache in F16, its fastest form. vLLM
is reported where `make bench-vllm` has installed it.

The ids of 32 answers are compared with those of transformers in FP32: they may differ only from where its two best
logits differ by less than 1e-4. llama.cpp shows with a cache in F32 that it has the same weights. Rounded weights
belong to another model: BF16 and INT8 are compared with transformers on the weights as Moray rounds them.

The limit of a decode step is the time to read the weights that its rows use, once: the larger of two rates of reading,
of memory (over four times the last cache) and of the model's own packed weights. At batch n, n rows use
E (1 - (1 - K / E)^n) experts of a layer, on average over uniform routing.

Usage: python benchmarks/serving_engine.py [rounds=5]
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from harness.result import Bar, report
from harness.rounded import round_weights
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from moray.kernels.cached_step import padded
from moray.models import checkpoint
from moray.models.compiled import CompiledModel
from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3
from moray.models.presets import preset
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.scheduler import EngineLimits
from moray.pipelines.serve.sequence import Request
from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer
from moray.platform.core.home import Home

HERE = Path(__file__).resolve().parent
PROMPT, NEW = 64, 64
LONG = 4096  # positions of context, before each of the last ids is timed
_KEPT = 2
NEAR = 1e-4
MODELS = {
    "quickstart 3.7 M": preset("tiny"),
    "tiny 8 M": ModelConfig(
        8192,
        256,
        768,
        160,
        4,
        4,
        8,
        2,
        64,
        32,
        16,
        32,
        q_lora_rank=128,
        first_k_dense_replace=1,
        max_position_embeddings=8192,
    ),
    "mid 104 M": ModelConfig(
        8192,
        512,
        1536,
        256,
        8,
        8,
        32,
        4,
        128,
        64,
        32,
        64,
        q_lora_rank=256,
        first_k_dense_replace=1,
        max_position_embeddings=8192,
    ),
}
EXPERTS = ("eager", "batched_mm", "grouped_mm")
FORMS = ("float32", "bfloat16", "int8")
LLAMA = ("f32", "q8_0")
VLLM = ".venv-vllm"
GOALS = {("quickstart 3.7 M", 1): 12, ("quickstart 3.7 M", 8): 8, ("tiny 8 M", 1): 7, ("tiny 8 M", 8): 5}


@dataclass(frozen=True)
class Timed:
    """ids: generated, by prompt. first: CPU seconds until the first ids. rest: CPU seconds for the others."""

    ids: list[list[int]]
    first: float
    rest: float


Run = Callable[..., Timed]  # of prompts and, except for transformers, the number of ids to generate


class Clock(LogitsProcessor):
    """Notes the time of each forward's end, and how close the two best logits were."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.gaps: list[list[float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.process_time())
        best = scores.topk(2).values
        self.gaps.append((best[:, 0] - best[:, 1]).tolist())
        return scores


def theirs(folder: Path, experts: str, attention: str) -> tuple[Run, Clock]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
    model.set_experts_implementation(experts)
    clock = Clock()

    def run(prompts: list[list[int]]) -> Timed:
        clock.times, clock.gaps = [], []
        began = time.process_time()
        with torch.inference_mode():
            out = model.generate(
                torch.tensor(prompts), attention_mask=torch.ones(len(prompts), PROMPT, dtype=torch.int64),
                max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0,
                eos_token_id=None, logits_processor=LogitsProcessorList([clock]),
            )  # fmt: skip
        ended = time.process_time()
        return Timed(out[:, PROMPT:].tolist(), clock.times[0] - began, ended - clock.times[0])

    return run, clock


def ours(folder: Path, form: str, vocabulary: ServingVocabulary) -> tuple[Run, CompiledModel]:
    model = CompiledModel.from_folder(folder, Home.from_environment().cache / "native", form)
    engine = Engine(model, vocabulary, EngineLimits(step_tokens=1024, max_running=256))

    def run(prompts: list[list[int]], new: int = NEW) -> Timed:
        request = Request((), new, temperature=0.0, ignore_eos=True, bare=True)
        began = time.process_time()
        sequences = [engine.submit(dataclasses.replace(request, prompt=tuple(prompt))) for prompt in prompts]
        while any(not sequence.generated for sequence in sequences):
            engine.step()
        first = time.process_time()
        while engine.busy:
            engine.step()
        ended = time.process_time()
        return Timed([one.ids[one.prompt_length :] for one in sequences], first - began, ended - first)

    return run, model


@contextlib.contextmanager
def elsewhere(environment: str, script: str, *arguments: str, sequences: int, context: int) -> Iterator[Run]:
    """A peer in a process and an environment of its own, which measures its own CPU time."""
    command = [str(HERE / "peers" / environment / "bin" / "python"), str(HERE / "peers" / script), *arguments]
    command += [str(sequences), str(context)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        asked, answered = process.stdin, process.stdout
        assert asked is not None
        assert answered is not None
        if not (version := answered.readline()):
            raise SystemExit(f"error: {script} did not start")
        print(f"{script}: {version.strip()}", file=sys.stderr)

        def run(prompts: list[list[int]], new: int = NEW) -> Timed:
            found = []
            for start in range(0, len(prompts), sequences):
                asked.write(json.dumps({"prompts": prompts[start : start + sequences], "new": new}) + "\n")
                found.append(json.loads(answered.readline()))
            ids = [one for part in found for one in part["ids"]]
            return Timed(ids, sum(part["first"] for part in found), sum(part["rest"] for part in found))

        yield run
        asked.close()


def llama(
    folder: Path, form: str, sequences: int = 8, context: int = 2 * (PROMPT + NEW)
) -> contextlib.AbstractContextManager[Run]:
    if not (HERE / "peers" / ".venv").exists():
        raise SystemExit("error: the peers are not installed: make bench-peers")
    weights, _, exact = form.partition(", ")
    arguments = (str(folder), weights, exact or "fast")
    return elsewhere(".venv", "llama.py", *arguments, sequences=sequences, context=context)


def vllm(folder: Path) -> contextlib.AbstractContextManager[Run]:
    return elsewhere(VLLM, "vllm_cpu.py", str(folder), sequences=8, context=2 * (PROMPT + NEW))


def words(config: ModelConfig) -> ServingVocabulary:
    """A vocabulary of the model's size, most of whose ids have no text."""
    tokenizer = train_tokenizer(iter(["the quick brown fox"] * 4), TokenizerConfig(vocab_size=300))
    tokenizer.add_tokens([f"<{index}>" for index in range(config.vocab_size - tokenizer.get_vocab_size())])
    return ServingVocabulary(tokenizer, bos=None, eos=None)


def save_random(config: ModelConfig, folder: Path) -> None:
    model = DeepseekV3(dataclasses.replace(config, initializer_range=1.2 * config.hidden_size**-0.5))
    model.init_weights(seed=1)
    checkpoint.save(model, folder)


def active_bytes(config: ModelConfig, form: str, batch: int) -> float:
    """Bytes of packed weights that a step of `batch` rows reads, each once."""
    wide, width = (1 if form == "int8" else 4), {"float32": 4, "bfloat16": 2, "int8": 1}[form]
    total = config.hidden_size * padded(config.vocab_size) * width
    heads, experts = config.num_attention_heads, config.n_routed_experts
    used = experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)

    def matrix(inputs: int, outputs: int) -> int:
        return inputs * padded(outputs) * width

    def swiglu(inner: int) -> int:
        return 2 * matrix(config.hidden_size, inner) + matrix(inner, config.hidden_size)

    for layer in range(config.num_hidden_layers):
        queries = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            total += matrix(config.hidden_size, queries)
        else:
            total += matrix(config.hidden_size, config.q_lora_rank) + matrix(config.q_lora_rank, queries)
        total += matrix(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim)
        total += heads * (matrix(config.qk_nope_head_dim, config.kv_lora_rank))
        total += heads * (matrix(config.kv_lora_rank, config.v_head_dim)) + matrix(
            heads * config.v_head_dim, config.hidden_size
        )
        if layer not in config.moe_layers:
            total += swiglu(config.intermediate_size)
            continue
        total += config.hidden_size * padded(experts) * wide + used * swiglu(config.moe_intermediate_size)
        total += swiglu(config.n_shared_experts * config.moe_intermediate_size)
    return total


@numba.njit(fastmath=True)
def total_of(values: Any) -> float:
    total = np.float32(0)
    for index in range(len(values)):
        total += values[index]
    return total


def read_rate(arrays: list[np.ndarray[Any, Any]]) -> float:
    """Bytes per second of CPU time, the best of five passes over all arrays."""
    size, best = sum(array.nbytes for array in arrays), 0.0
    for _ in range(6):
        began = time.process_time()
        for array in arrays:
            total_of(array)
        best = max(best, size / (time.process_time() - began))
    return best


def packed(model: CompiledModel) -> list[np.ndarray[Any, Any]]:
    return [tensor.view(torch.float32).flatten().numpy() for tensor in model.packed() if tensor.nbytes % 4 == 0]


def agreement(found: list[list[int]], expected: list[list[int]], gaps: list[list[float]]) -> tuple[int, int]:
    """(sequences that differ where nothing was near, sequences that differ where the two best were near)."""
    wrong = near = 0
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        place = next((place for place in range(NEW) if one[place] != other[place]), None)
        if place is not None and gaps[place][number] < NEAR:
            near += 1
        elif place is not None:
            wrong += 1
    return wrong, near


def measured(name: str, config: ModelConfig, rounds: int, memory: float) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(0, config.vocab_size, (32, PROMPT), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "model"
        save_random(config, folder)
        mine = {form: ours(folder, form, words(config)) for form in FORMS}
        rows = correctness(name, folder, prompts, {form: run for form, (run, _) in mine.items()})
        peers = {f"transformers {e}, {a}": theirs(folder, e, a)[0] for e in EXPERTS for a in ("eager", "sdpa")}
        peers |= {f"llama.cpp {form}": stack.enter_context(llama(folder, form)) for form in LLAMA}
        if (HERE / "peers" / VLLM).exists():
            peers["vLLM float32"] = stack.enter_context(vllm(folder))
        runs = peers | {f"Moray {form}": run for form, (run, _) in mine.items()}
        gc.collect()
        gc.freeze()  # as a server does: else the garbage collector visits the models' objects again and again
        for batch in (1, 8):
            times = timed(name, runs, prompts, batch, rounds)
            rates = {who: statistics.median(batch * (NEW - 1) / one.rest for one in times[who]) for who in times}
            best = max(rate for who, rate in rates.items() if who.startswith("transformers"))
            rows.append(
                {"model": name, "who": "all", "batch": batch, "transformers": best}
                | {re.sub(r"\W", "_", who): rate for who, rate in rates.items() if not who.startswith("tr")}
            )
            for who, rate in rates.items():
                first = statistics.median(batch * PROMPT / one.first for one in times[who])
                row = {"model": name, "who": who, "batch": batch, "tokens_s": rate, "prompt_tokens_s": first}
                if who.startswith("Moray"):
                    form = who.removeprefix("Moray ")
                    limit = max(memory, read_rate(packed(mine[form][1])))
                    row |= {"over_transformers": rate / best, "over_llama": rate / rates["llama.cpp f32"]}
                    row |= {"over_llama_q8": rate / rates["llama.cpp q8_0"], "limit_bytes_s": limit}
                    row["share_of_limit"] = rate / batch * active_bytes(config, form, batch) / limit
                rows.append(row)
    return rows


def correctness(name: str, folder: Path, prompts: list[list[int]], mine: dict[str, Run]) -> list[dict[str, Any]]:
    """How many answers differ from those of transformers on the same, or as Moray rounds them, weights."""
    rows = []
    for form, run in mine.items():
        with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
            checkpoint.save(round_weights(checkpoint.load(folder), form), Path(temporary) / "model", "float32")
            reference, clock = theirs(Path(temporary) / "model", "eager", "eager")
            expected = reference(prompts).ids
            found = {f"Moray {form}": run}
            if form == "float32":
                found["llama.cpp f32, exact"] = stack.enter_context(llama(folder, "f32, exact"))
                if (HERE / "peers" / VLLM).exists():
                    found["vLLM float32"] = stack.enter_context(vllm(folder))
            for who, contestant in found.items():
                wrong, near = agreement(contestant(prompts).ids, expected, clock.gaps)
                rows.append({"model": name, "who": who, "batch": 32, "different": wrong, "near": near})
    return rows


def timed(name: str, runs: dict[str, Run], prompts: list[list[int]], batch: int, rounds: int) -> dict[str, list[Timed]]:
    """All rounds of each contestant but the first, which chooses the fastest forms of transformers."""
    times: dict[str, list[Timed]] = {who: [] for who in runs}
    for round_ in range(rounds + 1):
        some = prompts[round_ * batch % 24 : round_ * batch % 24 + batch]
        for who, found in times.items():
            found.append(runs[who](some))
        if not round_:
            peers = sorted((who for who in times if who.startswith("transformers")), key=lambda who: times[who][0].rest)
            times = {who: [] for who in times if who not in peers[_KEPT:]}
        print(f"{name}, batch {batch}: round {round_} of {rounds}", file=sys.stderr, flush=True)
    return times


def long_context(name: str, rounds: int) -> list[dict[str, Any]]:
    """The time of one id after 4,096 others."""
    config, new = MODELS[name], 33
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, config.vocab_size, (1, LONG), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary) / "model"
        save_random(config, folder)
        forms = [*LLAMA, "f32, exact"]
        runs = {f"llama.cpp {form}": stack.enter_context(llama(folder, form, 1, LONG + 256)) for form in forms}
        runs |= {f"Moray {form}": ours(folder, form, words(config))[0] for form in FORMS}
        times: dict[str, list[float]] = {who: [] for who in runs}
        for round_ in range(rounds):
            for who, run in runs.items():
                fresh = [[(prompt[0][0] + round_) % config.vocab_size, *prompt[0][1:]]]  # not in the prefix cache
                times[who].append(run(fresh, new).rest / (new - 1))
            print(f"{name}, {LONG} positions: round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
    return [
        {"model": name, "who": who, "context": LONG, "token_ms": 1e3 * statistics.median(found)}
        for who, found in times.items()
    ]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    memory = read_rate([np.ones(1 << 26, np.float32)])
    rows: list[dict[str, Any]] = [{"memory_bytes_s": memory}]
    for name, config in MODELS.items():
        rows += measured(name, config, rounds, memory)
        gc.collect()
    rows += long_context("tiny 8 M", rounds)
    found = {(row.get("model"), row.get("who"), row.get("batch")): row for row in rows}
    bars = [
        Bar(f"{name}, batch {batch}, FP32 over transformers", found[name, "Moray float32", batch]["over_transformers"],
            goal, "higher")
        for (name, batch), goal in GOALS.items()
    ]  # fmt: skip
    long = {
        who: min(row["token_ms"] for row in rows if "context" in row and row["who"] in forms)
        for who, forms in (("Moray", ("Moray float32",)), ("llama.cpp", ("llama.cpp f32", "llama.cpp f32, exact")))
    }
    mid = "mid 104 M"
    wide, int8 = (found[mid, f"Moray {form}", 1] for form in ("float32", "int8"))
    bars += [
        Bar(f"{mid}, batch 1, FP32, share of the limit", wide["share_of_limit"], 0.8, "higher"),
        Bar(f"{mid}, batch 1, INT8 over transformers", int8["over_transformers"], 7, "higher"),
        *(
            Bar(f"{name}, batch {batch}, FP32 over llama.cpp", found[name, "Moray float32", batch]["over_llama"],
                {1: 1.1, 8: 1.5}[batch], "higher")
            for name in ("tiny 8 M", mid) for batch in (1, 8)
        ),
        Bar(f"tiny 8 M, FP32, an id after {LONG}, over llama.cpp", long["llama.cpp"] / long["Moray"], 1.5, "higher"),
        Bar(
            "answers that differ where no two ids are near",
            sum(row.get("different", 0) for row in rows if "Moray" in row.get("who", "")), 0, "lower",
        ),
        Bar("the same for llama.cpp in its exact form", sum(
            row.get("different", 0) for row in rows if "llama" in row.get("who", "")), 0, "lower"),
    ]  # fmt: skip
    return report("serving_engine", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
