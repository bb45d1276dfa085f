"""Pretraining settings for tests: written flat, each in its section of the config."""

from __future__ import annotations

from typing import Any

from moray.pipelines.pretrain.config import PretrainConfig


def pretrain_config(**flat: Any) -> PretrainConfig:
    """The config with these fields, such as workers=2 for `parallel: {workers: 2}`."""
    fields: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, field = PretrainConfig.moved.get(name, name).partition(".")
        if field:
            fields.setdefault(section, {})[field] = value
        else:
            fields[section] = value
    return PretrainConfig.model_validate(fields)
