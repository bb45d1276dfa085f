"""Allowed values of a submission's fields, shared by the command line, the API and the database."""

from typing import Literal

LOCAL = "local"  # the name of the cluster of `moray up`

Priority = Literal["production", "interactive", "batch"]
Overlap = Literal["skip", "queue", "allow"]  # effect of a tick while an earlier job of its schedule is unfinished
Catchup = Literal["none", "last"]  # which missed ticks run late
