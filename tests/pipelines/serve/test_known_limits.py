"""What a proxy knows of its clients' limits."""

from hypothesis import given
from hypothesis import strategies as st

from moray.pipelines.serve.known_limits import KnownLimits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_client_without_refusals_has_no_limit() -> None:
    limits = KnownLimits()
    assert all(limits.enter("a") for _ in range(10_000))


def test_one_more_is_tried_after_a_second_and_then_ever_more() -> None:
    clock = Clock()
    limits = KnownLimits(clock)
    assert all(limits.enter("a") for _ in range(11))
    limits.leave("a", refused=True)
    assert not limits.enter("a")
    assert limits.enter("b")
    clock.now += 0.9
    assert not limits.enter("a")
    clock.now += 0.1
    assert [limits.enter("a") for _ in range(2)] == [True, False]
    limits.leave("a", refused=True)
    clock.now += 0.5
    assert not limits.enter("a")
    clock.now += 10
    assert all(limits.enter("a") for _ in range(1000))  # the replicas have become more


def test_a_limit_is_forgotten_when_half_have_ended() -> None:
    """The queue was full of a few requests with many answers each."""
    limits = KnownLimits(Clock())
    assert all(limits.enter("a") for _ in range(5))
    limits.leave("a", refused=True)
    limits.leave("a", refused=False)
    assert [limits.enter("a") for _ in range(2)] == [True, False]
    for _ in range(2):
        limits.leave("a", refused=False)
    assert all(limits.enter("a") for _ in range(100))


@given(st.lists(st.integers(0, 8), min_size=30, max_size=60))
def test_as_many_are_open_as_a_server_takes_and_nothing_is_kept_of_clients_that_left(ends: list[int]) -> None:
    """A server that takes 5 requests; between arrivals some end."""
    clock = Clock()
    limits, inside, seen = KnownLimits(clock), 0, 0
    for end in ends:
        for _ in range(min(end, inside)):
            limits.leave("a", refused=False)
            inside -= 1
        for _ in range(8):
            if limits.enter("a"):
                if inside == 5:
                    seen += 1
                    limits.leave("a", refused=True)
                else:
                    inside += 1
        assert inside == 5
        clock.now += 0.01
    assert seen <= 1 + len(ends)
    for _ in range(inside):
        limits.leave("a", refused=False)
    assert not limits._clients
