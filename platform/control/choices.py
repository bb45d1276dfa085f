"""What a submission may choose from; the command line, the API and the database share these."""

from typing import Literal

Priority = Literal["production", "interactive", "batch"]
Overlap = Literal["skip", "queue", "allow"]  # what a tick does while an earlier job of its schedule has not ended
Catchup = Literal["none", "last"]  # which of the ticks that were missed still runs
