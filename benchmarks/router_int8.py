"""INT8 routers: size, agreement of the chosen experts, and held-out bits per byte.

Agreement is measured on the same hidden states, layer by layer. It is the share of a token's experts that both routers
choose.

Usage: python benchmarks/router_int8.py [MODEL=quickstart@newest]    an alias or an artifact of a model trained here
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import torch
from harness.heldout import heldout_windows, model_and_training
from harness.result import Bar, report

from moray.models import checkpoint
from moray.models.config import ModelConfig
from moray.models.model import DeepseekV3
from moray.models.presets import PRESETS
from moray.pipelines.evaluate.step import window_bits
from moray.platform.core.home import Home
from moray.platform.store.artifacts import ArtifactStore


class Agreement:
    """Compares each router with its INT8 copy on the hidden states that the model passes to it."""

    def __init__(self, model: DeepseekV3) -> None:
        self.both: list[float] = []
        for router in model.routers():
            twin = copy.deepcopy(router)
            twin.store_int8()
            router.register_forward_hook(lambda _, inputs, routing, twin=twin: self._compare(twin, inputs, routing))

    def _compare(self, twin: Any, inputs: tuple[Any, ...], routing: Any) -> None:
        same = (twin(*inputs).ids_TK.unsqueeze(-1) == routing.ids_TK.unsqueeze(-2)).any(-1)
        self.both.append(same.double().mean().item())


def router_bytes(config: ModelConfig, element: int) -> int:
    return len(config.moe_layers) * config.n_routed_experts * config.hidden_size * element


def main(model: str = "quickstart@newest") -> int:
    store = ArtifactStore(Home.from_environment())
    exported, trained = model_and_training(store, model)
    wide = checkpoint.load(exported.folder, mtp=False)
    small = checkpoint.load(exported.folder, mtp=False, int8_routers=True)
    agreement = Agreement(wide)
    bits, total = np.zeros(2), 0
    with torch.inference_mode():
        for batch, count in heldout_windows(store, trained):
            bits += [window_bits(wide, batch), window_bits(small, batch)]
            total += count
    wide_bits, small_bits = bits / total
    agreed = float(np.mean(agreement.both))
    rows: list[dict[str, Any]] = [
        {"model": model, "bits_per_byte": float(wide_bits), "with_int8_routers": float(small_bits)},
        {"model": model, "same_experts": agreed, "worst_layer_and_batch": float(np.min(agreement.both))},
    ]
    for name, config in (("this model", wide.config), ("DeepSeek-V3", PRESETS["v3"])):
        rows.append(
            {"routers_of": name, "bf16_MB": router_bytes(config, 2) / 1e6, "int8_MB": router_bytes(config, 1) / 1e6}
        )
    bars = [
        Bar("bits per byte with INT8 routers, ratio", float(small_bits / wide_bits), 1.001, "lower"),
        Bar("share of the same experts", agreed, 0.99, "higher"),
    ]
    return report("router_int8", rows, bars)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
