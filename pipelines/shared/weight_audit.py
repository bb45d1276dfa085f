"""What was checked of a model's weights: a line for users, and counts for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moray.models.safetensors_folder import Audit  # imports torch


def audit_text(audit: Audit) -> str:
    """One clause: `91,991 tensors, 684.5 B values checked: ...`."""
    checked = f"{audit.tensors:,} tensors, {_short(audit.values)} values checked"
    return f"{checked}: all finite, with the names, shapes and dtypes of the config"


def audit_counts(audit: Audit) -> dict[str, float]:
    """Counts of a step."""
    return {"checked_tensors": audit.tensors, "checked_values": audit.values}


def _short(count: int) -> str:
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:,}"
