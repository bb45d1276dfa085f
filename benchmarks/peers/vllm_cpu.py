"""vLLM's build for CPUs as a peer of `serving_engine.py`, in FP32, on one thread and without speculation.

Answers each line of standard input, {"prompts": [ids, ...], "new": N}, with a line {"ids", "first", "rest"}: the
generated ids, the process's CPU seconds until the first ids, and those for the others. vLLM's latent attention needs
heads of other sizes than these models have, so it keeps whole keys and values. Runs in an environment of its own
(`make bench-vllm`).

Usage: python vllm_cpu.py FOLDER SEQUENCES CONTEXT
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(folder: str, sequences: str, context: str) -> None:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0",
        "OMP_NUM_THREADS": "1", "VLLM_MLA_DISABLE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    answers, sys.stdout = sys.stdout, sys.stderr  # it prints
    import vllm

    model = vllm.LLM(
        model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=int(context),
        max_num_seqs=int(sequences), enable_prefix_caching=False, seed=0,
    )  # fmt: skip

    def run(prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        options = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.process_time()
        found: Any = model.generate([{"prompt_token_ids": one} for one in prompts], options, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found], time.process_time() - began

    run([[5] * 8] * int(sequences), 8)
    answers.write(json.dumps({"version": vllm.__version__}) + "\n")
    answers.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        _, first = run(asked["prompts"], 1)
        ids, whole = run(asked["prompts"], asked["new"])
        answers.write(json.dumps({"ids": ids, "first": first, "rest": whole - first}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
