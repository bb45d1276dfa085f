import subprocess
import sys

import pytest
import torch

from moray.models.model import DeepseekV3
from moray.models.presets import PRESETS, parameter_count, preset


def test_v3_has_671_billion_parameters_of_which_37_are_active():
    count = parameter_count(preset("v3"))
    assert round(count.total / 1e9) == 671
    assert round(count.active / 1e9) == 37


def test_small_has_16_billion_parameters_of_which_2_4_are_active():
    count = parameter_count(preset("small"))
    assert round(count.total / 1e9) == 16
    assert 2.4 <= count.active / 1e9 < 2.5


def test_the_count_is_the_modules():
    with torch.device("meta"):
        model = DeepseekV3(preset("tiny"))
    assert sum(p.numel() for p in model.parameters()) == parameter_count(preset("tiny")).total


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'small'"):
        preset("smal")


def test_all_presets_are_named_in_order_of_size():
    sizes = [parameter_count(config).total for config in PRESETS.values()]
    assert sizes == sorted(sizes)


def test_configs_and_presets_need_no_torch():
    code = "import sys; import moray.models.presets, moray.models.tensors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=_root(), check=False).returncode == 0


def _root():
    import moray

    return moray.__path__[0]
