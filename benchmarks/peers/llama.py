"""llama.cpp as a peer of `serving_engine.py`: a Hugging Face folder of the DeepSeek-V3 family, decoded greedily.

Writes the folder as GGUF, in F32 or Q8_0. Then answers each line of standard input, {"prompts": [ids, ...], "new": N},
with a line {"ids", "first", "rest"}: the generated ids, the process's CPU seconds until the first ids, and those for
the others. One thread. Runs in the peers' environment (`make bench-peers`).

Usage: python llama.py FOLDER f32|q8_0 exact|fast SEQUENCES CONTEXT
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

_BLOCK = 32  # values with one scale in Q8_0
_PLACES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}
# llama.cpp's names of the config's numbers.
_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "leading_dense_block_count": "first_k_dense_replace",
    "head_count": "num_attention_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "rope_dimension_count": "qk_rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "value_length_mla": "v_head_dim",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}


def tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The tensors by their names in GGUF, float32: the two halves of kv_b apart, and experts stacked."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: np.asarray(value, np.float32) for name, value in load_file(file).items()}
    yield "token_embd.weight", found["model.embed_tokens.weight"]
    yield "output_norm.weight", found["model.norm.weight"]
    yield "output.weight", found["lm_head.weight"]
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        prefix, to = f"model.layers.{layer}.", f"blk.{layer}."
        for name, place in _PLACES.items():
            if prefix + name in found:
                yield to + place, found[prefix + name]
        both = found[prefix + "self_attn.kv_b_proj.weight"].reshape(heads, -1, config["kv_lora_rank"])
        yield to + "attn_k_b.weight", np.ascontiguousarray(both[:, :nope].transpose(0, 2, 1))
        yield to + "attn_v_b.weight", np.ascontiguousarray(both[:, nope:])
        for part in ("gate", "up", "down"):
            if layer < config["first_k_dense_replace"]:
                yield to + f"ffn_{part}.weight", found[prefix + f"mlp.{part}_proj.weight"]
                continue
            experts = [
                f"{prefix}mlp.experts.{number}.{part}_proj.weight" for number in range(config["n_routed_experts"])
            ]
            yield to + f"ffn_{part}_exps.weight", np.stack([found[name] for name in experts])
            yield to + f"ffn_{part}_shexp.weight", found[prefix + f"mlp.shared_experts.{part}_proj.weight"]


def write(folder: Path, path: Path, form: str) -> None:
    """Writes the model as GGUF, without a tokenizer. Norms and routers stay F32, as in llama.cpp's own files."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_tokenizer_model("no_vocab")
    for name, field in _FIELDS.items():
        if config.get(field) is not None:
            getattr(writer, f"add_{name}")(config[field])
    writer.add_head_count_kv(1)  # all heads read one latent
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors(folder, config):
        wide = tensor.ndim == 1 or "ffn_gate_inp" in name or tensor.shape[-1] % _BLOCK
        if form == "f32" or wide:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """A loaded model with one context. sequences: in a batch, at most. context: positions of each.

    exact: a cache in F32. Otherwise its fastest form: a cache in F16, with flash attention.
    """

    def __init__(self, path: Path, exact: bool, sequences: int, context: int) -> None:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = sequences * context, sequences
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = 1
        options.flash_attn_type = int(not exact)
        kind = gguf.GGMLQuantizationType.F32 if exact else gguf.GGMLQuantizationType.F16
        options.type_k = options.type_v = int(kind)
        self._context = llama_cpp.llama_init_from_model(model, options)
        if not model or not self._context:
            raise SystemExit(f"error: llama.cpp does not load {path}")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)

    def answers(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        began = time.process_time()
        rows = [(one, place, id_) for one, prompt in enumerate(prompts) for place, id_ in enumerate(prompt)]
        ids: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(rows), 512):
            part = rows[start : start + 512]
            for sequence, best in self._best(part, [place == len(prompts[one]) - 1 for one, place, _ in part]):
                ids[sequence].append(best)
        first = time.process_time()
        for step in range(new - 1):
            part = [(one, len(prompt) + step, ids[one][-1]) for one, prompt in enumerate(prompts)]
            for sequence, best in self._best(part, [True] * len(part)):
                ids[sequence].append(best)
        ended = time.process_time()
        return {"ids": ids, "first": first - began, "rest": ended - first}

    def _best(self, rows: list[tuple[int, int, int]], wanted: list[bool]) -> list[tuple[int, int]]:
        """Runs rows of (sequence, position, id). Returns (sequence, likeliest next id) of those that are wanted."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, place, id_) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = id_, place, wanted[row]
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        return [(rows[row][0], self._argmax(row)) for row in range(len(rows)) if wanted[row]]

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._words,)).argmax())


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    if level == 4:  # errors
        sys.stderr.write(text.decode(errors="replace"))


def main(folder: str, form: str, arithmetic: str, sequences: str, context: str) -> None:
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        write(Path(folder), path, form)
        peer = Peer(path, arithmetic == "exact", int(sequences), int(context))
        print(json.dumps({"version": llama_cpp.__version__}), flush=True)
        for line in sys.stdin:
            print(json.dumps(peer.answers(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
