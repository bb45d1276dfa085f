"""The line about checked weights."""

from __future__ import annotations

from moray.models.safetensors_folder import Audit
from moray.pipelines.shared.weight_audit import audit_text


def test_large_numbers_are_short() -> None:
    says = "checked: all finite, with the names, shapes and dtypes of the config"
    assert audit_text(Audit(91_991, 684_531_386_000)) == f"91,991 tensors, 684.5 B values {says}"
    assert audit_text(Audit(12, 3_740_480)) == f"12 tensors, 3.7 M values {says}"
    assert audit_text(Audit()) == f"0 tensors, 0 values {says}"
