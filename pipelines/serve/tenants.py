"""Fair shares of the engine for tenants: those who send many requests get no more than those who send few.

A tenant's service is counted in the scheduler's unit. Of several tenants, the one that has had least comes first; a new
one begins where a tenant would be that always got its share (the virtual time of Parekh and Gallager, 1993).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from moray.pipelines.serve.sequence import Sequence as Answer


class Tenants:
    """What each tenant with an open sequence has had."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._clock = 0.0

    def order(self, answers: Sequence[Answer]) -> list[Answer]:
        """The sequences so that tenants take turns, each with its own in the given order. With one tenant: as given."""
        by_tenant: dict[str, list[Answer]] = {}
        for one in answers:
            by_tenant.setdefault(one.request.tenant, []).append(one)
        self._know(by_tenant)
        if len(by_tenant) < 2:
            return list(answers)
        queue = [(self._served[tenant], place, 0, own) for place, (tenant, own) in enumerate(by_tenant.items())]
        heapq.heapify(queue)
        ordered: list[Answer] = []
        while queue:
            served, place, index, own = queue[0]
            ordered.append(own[index])
            if index + 1 < len(own):
                heapq.heapreplace(queue, (served + own[index].cost, place, index + 1, own))
            else:
                heapq.heappop(queue)
        return ordered

    def serve(self, tenant: str, amount: float) -> None:
        """Counts what a tenant has had in this step."""
        self._served[tenant] += amount
        self._clock += amount / len(self._served)

    def _know(self, open_now: Iterable[str]) -> None:
        least = min((served for tenant, served in self._served.items() if tenant in open_now), default=0.0)
        self._served = {tenant: self._served.get(tenant, max(self._clock, least)) for tenant in open_now}
