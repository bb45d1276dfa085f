import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moray.models.flops import H800_BF16_PEAK, token_flops, utilisation
from moray.models.model import DeepseekV3
from moray.models.presets import preset


@pytest.mark.parametrize(("causal", "teraflops", "share"), [(True, 385, 0.3894), (False, 432, 0.4373)])
def test_deepseeks_published_utilisation(causal, teraflops, share):
    """2048 H800, 272.80B tokens a day, rows of 4096 tokens ("Insights into DeepSeek-V3", table 4), within 0.5 %."""
    found = utilisation(preset("v3"), 4096, 272.80e9 / 86400, 2048, H800_BF16_PEAK, causal)
    assert found.flops_per_second / 1e12 == pytest.approx(teraflops, rel=0.005)
    assert found.share == pytest.approx(share, rel=0.005)


@pytest.mark.parametrize("depths", [0, 2])
def test_the_count_is_the_models_matrix_products(config, depths):
    """Against torch's own counter, in the forms that pad nothing: value heads as wide as query heads, full rows."""
    sizes = {"v_head_dim": config.qk_head_dim, "num_nextn_predict_layers": depths, "n_shared_experts": 2}
    config = dataclasses.replace(config, **sizes)
    model = DeepseekV3(config)
    model.init_weights(0)
    ids = torch.randint(0, 50, (2, 16))
    plain = sdpa_kernel(SDPBackend.MATH)  # the fused forms are not counted on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model.training_loss(ids, ids)
    flops = token_flops(config, 16, causal=False)
    assert counter.get_total_flops() / ids.numel() == flops.forward + flops.mtp


def test_backward_is_twice_the_forward():
    flops = token_flops(preset("small"), 4096)
    assert flops.training == 3 * flops.forward == 1.5 * flops.backward
    assert token_flops(preset("small"), 1).attention == token_flops(preset("small"), 1, causal=False).attention


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="sequence_length = 0"):
        token_flops(preset("tiny"), 0)
