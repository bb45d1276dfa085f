import dataclasses
import json

import pytest

from moray.models.config import ModelConfig


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
        ("n_group", 8, "at least 2 experts a group"),
        ("topk_group", 5, "n_group = 4"),
        ("num_experts_per_tok", 5, "4 experts of topk_group groups"),
        ("first_k_dense_replace", 4, "num_hidden_layers = 3"),
        ("qk_rope_head_dim", 3, "even"),
        ("v_head_dim", 11, "= 10"),
        ("num_nextn_predict_layers", 1, "multi-token prediction"),
    ],
)
def test_a_bad_value_is_refused_by_field_value_and_rule(config, field, value, rule):
    with pytest.raises(ValueError, match=rule) as error:
        dataclasses.replace(config, **{field: value})
    assert str(error.value).startswith(f"{field} = {value!r} ")


def test_survives_hugging_faces_json(config):
    for original in (config, dataclasses.replace(config, q_lora_rank=None, eos_token_id=None)):
        assert ModelConfig.from_hf(json.loads(json.dumps(original.to_hf()))) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rotary scaling 'yarn' is not supported yet"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary scaling 'linear'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
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


def test_prediction_layers_are_left_out_with_a_warning(config, caplog):
    assert ModelConfig.from_hf(config.to_hf() | {"num_nextn_predict_layers": 1}) == config
    assert "1 multi-token prediction layers" in caplog.text
