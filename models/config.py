"""The config of a DeepSeek-V3 model, with the field names of its Hugging Face `config.json`.

Pure Python: the planner reads it where torch is not installed. `to_hf` writes a complete `config.json` that
transformers, vLLM and SGLang accept. `from_hf` reads one, and raises an error with the field's name if the field means
a different architecture (another activation, scoring, rotary scaling or weight tying). The storage format of weights is
not part of the config: `checkpoint.py` reads `quantization_config`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moray.models.yarn import Yarn

# Fields of config.json with one supported value, which is written, and required on reading. A config that
# lacks the field is assumed to have it, as in transformers.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_interleave": True,
    "tie_word_embeddings": False,
}

# Values of fields that a config.json lacks: the defaults of `DeepseekV3Config`, DeepSeek's own and
# transformers', which differ from those of `ModelConfig`. Sizes are required.
_CLASS: dict[str, Any] = {
    "q_lora_rank": 1536,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Alternative names in transformers 5.
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
)
_NOT_NEGATIVE = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
_REAL_POSITIVE = ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and hyperparameters of a model. A value out of range raises ValueError with field, value and rule."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # from `asdict` or from a recipe
            object.__setattr__(self, "rope_scaling", Yarn.from_fields(self.rope_scaling))
        for name in _POSITIVE:
            self._check_int(name, 1)
        for name in _NOT_NEGATIVE:
            self._check_int(name, 0)
        for name in ("q_lora_rank", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is not None:
                self._check_int(name, 1 if name == "q_lora_rank" else 0)
        for name in _REAL_POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                self._refuse(name, "must be a positive number")
        if not isinstance(self.norm_topk_prob, bool):
            self._refuse("norm_topk_prob", "must be true or false")
        self._check_relations()

    def _check_relations(self) -> None:
        per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest:
            self._refuse("n_routed_experts", f"must be divisible by n_group = {self.n_group}")
        if per_group < 2:
            self._refuse("n_group", "must leave at least 2 experts per group: its score is the sum of its two best")
        if self.topk_group > self.n_group:
            self._refuse("topk_group", f"must not exceed n_group = {self.n_group}")
        reachable = self.topk_group * per_group
        if self.num_experts_per_tok > reachable:
            self._refuse("num_experts_per_tok", f"must not exceed the {reachable} experts of topk_group groups")
        if self.first_k_dense_replace > self.num_hidden_layers:
            self._refuse("first_k_dense_replace", f"must not exceed num_hidden_layers = {self.num_hidden_layers}")
        if self.qk_rope_head_dim % 2:
            self._refuse("qk_rope_head_dim", "must be even: rotary embedding rotates pairs")
        if self.v_head_dim > self.qk_head_dim:
            self._refuse("v_head_dim", f"must not exceed qk_nope_head_dim + qk_rope_head_dim = {self.qk_head_dim}")
        if not isinstance(self.rope_scaling, Yarn | None):
            self._refuse("rope_scaling", "must be a mapping of YaRN's fields, or absent")
        if self.rope_scaling is not None and self.rope_theta <= 1:
            self._refuse("rope_theta", "must be above 1 where rope_scaling is set")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(name, f"must be an integer of at least {least}")

    def _refuse(self, name: str, rule: str) -> None:
        raise ValueError(f"{name} = {getattr(self, name)!r} {rule}")

    @property
    def qk_head_dim(self) -> int:
        """Elements of a query or key head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def mtp_layers(self) -> range:
        """The multi-token prediction layers, numbered after the model's own."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    @property
    def moe_layers(self) -> range:
        """The layers that hold experts: all after the first dense ones, including the MTP layers."""
        return range(self.first_k_dense_replace, self.mtp_layers.stop)

    @property
    def softmax_scale(self) -> float:
        """The factor of attention scores."""
        correction = 1.0 if self.rope_scaling is None else self.rope_scaling.score_magnitude**2
        return correction * self.qk_head_dim**-0.5

    def without_mtp(self) -> "ModelConfig":
        """The same config without multi-token prediction layers."""
        return dataclasses.replace(self, num_nextn_predict_layers=0)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """A complete `config.json`; `dtype` is the weights' ("float32", "bfloat16")."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **dataclasses.asdict(self),
            **_FIXED,
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_hf(),
            "pretraining_tp": 1,
            "ep_size": 1,
            "use_cache": True,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a `config.json`. Unknown fields are ignored; unsupported values raise ValueError.

        A missing field has its default in `DeepseekV3Config`. So `num_nextn_predict_layers` is then 1, and the
        checkpoint's tensors determine whether the layer exists.
        """
        if not isinstance(hf, Mapping):
            raise ValueError(f"config.json holds {_kind(hf)}, expected an object")
        _refuse_foreign(hf)
        hf = {**_CLASS, **{_ALIASES[name]: hf[name] for name in _ALIASES if name in hf}, **hf}
        values = {field.name: hf[field.name] for field in dataclasses.fields(cls) if field.name in hf}
        values["rope_theta"], values["rope_scaling"] = _rotary(hf)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = _only_eos(values["eos_token_id"])
        values["num_nextn_predict_layers"] = values.get("num_nextn_predict_layers") or 0
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        return cls(**values)


def _refuse_foreign(hf: Mapping[str, Any]) -> None:
    if hf.get("model_type") != "deepseek_v3":
        raise ValueError(f"model_type = {hf.get('model_type')!r} must be 'deepseek_v3'")
    for name, only in _FIXED.items():
        if hf.get(name, only) != only:
            raise ValueError(f"{name} = {hf[name]!r} must be {only!r}")
    heads = hf.get("num_key_value_heads")
    if heads is not None and heads != hf.get("num_attention_heads"):
        raise ValueError(f"num_key_value_heads = {heads!r} must equal num_attention_heads")


def _rotary(hf: Mapping[str, Any]) -> tuple[Any, Yarn | None]:
    """The base of the rotary angles and their scaling, as separate fields or within `rope_parameters` (transformers
    5)."""
    theta, scaling = hf.get("rope_theta", 10000.0), None
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name} = {rope!r} must be an object, or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise ValueError(f"{name} = {dict(rope)!r}: rotary scaling {kind!r} must be 'default' or 'yarn'")
        theta = rope.get("rope_theta", theta)
        scaling = Yarn.from_hf(rope) if kind == "yarn" else scaling
    return theta, scaling


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _only_eos(ids: list[int]) -> int:
    if len(ids) != 1:
        raise ValueError(f"eos_token_id = {ids!r} must be one id")
    return ids[0]
