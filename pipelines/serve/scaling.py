"""The number of replicas of a deployment, by the tokens in flight: those that its open requests still read or write.

Ray Serve's controller runs this policy; limits and delays are those of the deployment (`cluster/serve_api.py`). The
module imports nothing heavy.
"""

from __future__ import annotations

import math
from typing import Any

TOKENS = "tokens"  # the metric that replicas report


class TokensPolicy:
    """An autoscaling policy of Ray Serve. target: tokens in flight for each replica."""

    def __init__(self, target: int) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas for the tokens in flight on all of them, averaged over some seconds."""
        by_replica = (context.aggregated_metrics or {}).get(TOKENS)
        if not by_replica:  # no report yet
            return int(context.target_num_replicas), {}
        return max(1, math.ceil(sum(by_replica.values()) / self._target)), {}
