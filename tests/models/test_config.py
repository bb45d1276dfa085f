import dataclasses
import itertools
import json

import pytest

from moray.models.config import _CLASS, ModelConfig
from moray.models.yarn import Yarn


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("vocab_size", 0, "at least 1"),
        ("hidden_size", 1.5, "integer"),
        ("num_attention_heads", True, "integer"),
        ("n_shared_experts", -1, "at least 0"),
        ("q_lora_rank", 0, "at least 1"),
        ("rope_theta", -1.0, "positive number"),
        ("rms_norm_eps", float("nan"), "positive number"),
        ("norm_topk_prob", 1, "true or false"),
        ("n_routed_experts", 9, "divisible by n_group = 4"),
        ("n_group", 8, "at least 2 experts per group"),
        ("topk_group", 5, "n_group = 4"),
        ("num_experts_per_tok", 5, "4 experts of topk_group groups"),
        ("first_k_dense_replace", 4, "num_hidden_layers = 3"),
        ("qk_rope_head_dim", 3, "even"),
        ("v_head_dim", 11, "= 10"),
        ("num_nextn_predict_layers", -1, "at least 0"),
        ("rope_scaling", "yarn", "mapping"),
    ],
)
def test_a_bad_value_is_refused_by_field_value_and_rule(config, field, value, rule):
    with pytest.raises(ValueError, match=rule) as error:
        dataclasses.replace(config, **{field: value})
    assert str(error.value).startswith(f"{field} = {value!r} ")


def test_survives_hugging_faces_json(config):
    yarn = Yarn(40.0, 4096, mscale_all_dim=1.0)
    others = {"q_lora_rank": None, "eos_token_id": None, "rope_scaling": yarn, "num_nextn_predict_layers": 2}
    for original in (config, dataclasses.replace(config, **others)):
        assert ModelConfig.from_hf(json.loads(json.dumps(original.to_hf()))) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor = 0.5 must be at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_slow": 64}}, "rope_scaling.beta_slow = 64"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 2}}, "attention_factor = 2 is not"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fats": 2}}, r"unknown fields \['beta_fats'\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary scaling 'linear'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' must be 'sigmoid'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"eos_token_id": [1, 2]}, "eos_token_id = "),
    ],
)
def test_a_foreign_config_is_refused_by_field(config, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(config.to_hf() | changes)


def test_a_missing_field_is_named(config):
    hf = config.to_hf()
    del hf["kv_lora_rank"]
    with pytest.raises(ValueError, match="lacks kv_lora_rank"):
        ModelConfig.from_hf(hf)


def test_rope_theta_is_read_from_either_place(config):
    hf = config.to_hf() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    del hf["rope_theta"]
    assert ModelConfig.from_hf(hf).rope_theta == 5000.0


def test_yarn_is_read_from_either_place_and_from_json(config):
    fields = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.707}
    expected = Yarn(**fields)
    for place, kind in (("rope_scaling", "type"), ("rope_parameters", "rope_type")):
        assert ModelConfig.from_hf(config.to_hf() | {place: {kind: "yarn", **fields}}).rope_scaling == expected
    scaled = dataclasses.replace(config, rope_scaling=expected)
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(scaled)))) == scaled


OTHERS = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("scales", "read"),
    [
        ({}, (1.0, 0.0)),
        ({"mscale": 1}, (1.0, 0.0)),
        ({"mscale": 1.0, "mscale_all_dim": 0}, (1.0, 0.0)),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, (0.707, 0.707)),
        ({"mscale": 0.5}, None),
        ({"mscale_all_dim": 1.0}, None),
        ({"mscale": 0, "mscale_all_dim": 0}, None),
    ],
)
def test_yarn_that_others_read_as_another_model_is_refused(config, scales, read):
    """DeepSeek's code gives mscale_all_dim that is not there 0, transformers then sets both parts by mscale 1."""
    hf = config.to_hf() | {"rope_scaling": OTHERS | scales}
    if read is None:
        with pytest.raises(ValueError, match="different models"):
            ModelConfig.from_hf(hf)
    else:
        yarn = ModelConfig.from_hf(hf).rope_scaling
        assert (yarn.mscale, yarn.mscale_all_dim) == read


def test_the_default_of_a_recipes_yarn_is_v3s(config):
    """1 and 1: llama.cpp reads 1 and 0 as another model."""
    yarn = dataclasses.replace(config, rope_scaling={"factor": 4}).rope_scaling
    assert (yarn.mscale, yarn.mscale_all_dim, yarn.original_max_position_embeddings) == (1.0, 1.0, 4096)
    with pytest.raises(ValueError, match="lacks original_max_position_embeddings"):
        ModelConfig.from_hf(config.to_hf() | {"rope_scaling": {"type": "yarn", "factor": 4}})


def test_a_field_that_is_not_there_has_the_default_of_transformers(config):
    """For each field that may be left out, what transformers' class takes for it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV3Config()
    hf = config.to_hf() | {"n_routed_experts": 16, "num_hidden_layers": 4}
    for name in [*sorted(_CLASS), "rope_theta"]:
        without = {key: value for key, value in hf.items() if key != name}
        assert getattr(ModelConfig.from_hf(without), name) == (
            theirs.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(theirs, name)
        ), name
    optional = {field.name for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING}
    assert optional == {*_CLASS, "rope_theta", "rope_scaling"}


@pytest.mark.parametrize(
    ("hf", "says"),
    [
        ([], "config.json holds a list"),
        ("deepseek", "config.json holds a text"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\] must be an object"),
        ({"n_group": None}, "n_group = None must be an integer"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id = "),
        ({"eos_token_id": ["a"]}, "eos_token_id = "),
        ({"hidden_size": "64"}, "hidden_size = '64' must be an integer"),
    ],
)
def test_json_of_another_kind_is_refused_by_name(config, hf, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_hf(config.to_hf() | hf if isinstance(hf, dict) else hf)


def test_yarns_published_numbers():
    """DeepSeek-V3: factor 40, both magnitudes 1 (sqrt(t) = 0.1 ln 40 + 1); 64 elements at theta 10000."""
    yarn = Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    assert yarn.rotary_magnitude == 1.0
    assert yarn.score_magnitude == pytest.approx(1.3689, abs=1e-4)
    scales = yarn.frequency_scales(64, 10000.0)
    # beta_fast = 32 turns falls on pair 10.5, beta_slow = 1 on pair 22.5.
    assert scales[:11] == [1.0] * 11
    assert scales[23:] == pytest.approx([1 / 40] * 9)
    assert all(a > b for a, b in itertools.pairwise(scales[10:24]))
