"""A store that fails: requests are repeated, then there is one error that names it. Nothing half-written counts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moray.cluster.drills.hosts import GATEWAY
from moray.cluster.drills.ray_cluster import RayDrill, ray_drill
from moray.cluster.drills.scenarios import Fault, Say, lose_store, run_recipe, stored_manifests
from tests import s3
from tests.checkout import ROOT
from tests.cluster.drill_checks import need_hosts, of_flow, prepare, prove
from tests.conftest import Flow

pytestmark = [pytest.mark.ray, pytest.mark.evidence]

Verdict = str | tuple[int, str]


@pytest.fixture(autouse=True)
def hosts() -> None:
    need_hosts()


@contextmanager
def drill_with_proxy(folder: Path, fault: Callable[[s3.Request], Verdict]) -> Iterator[RayDrill]:
    """A drill whose laptop and nodes reach the store through a proxy that asks `fault`."""
    with ray_drill(folder, 2, ROOT) as drill, s3.faulty_proxy(drill.endpoint, fault, GATEWAY) as url:
        drill.proxy = url
        drill.write_profile()
        yield drill


def failing(request: s3.Request) -> Verdict:
    """Every fourth request fails in one of five ways."""
    every: list[Verdict] = [*["pass"] * 15, (500, ""), (503, refusal("SlowDown")), "drop", "mute", "half"]
    return random.choice(every)


def slow(request: s3.Request) -> Verdict:
    """Every request takes a third of a second longer."""
    time.sleep(0.3)
    return "pass"


def refusal(code: str) -> str:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>from the drill</Message></Error>'


@pytest.mark.parametrize("fault", [failing, slow])
def test_a_store_that_fails_now_and_then(tmp_path: Path, flow: Flow, fault: Callable[[s3.Request], Verdict]) -> None:
    with drill_with_proxy(tmp_path / "drill", fault) as drill:
        assert run_recipe(drill, prepare(drill, "dedup")) == 0
        prove(drill, of_flow(flow, "dedup"))


@pytest.mark.parametrize(
    ("status", "code", "words"), [(403, "AccessDenied", "access denied"), (507, "XMinioStorageFull", "full")]
)
def test_a_store_that_refuses_from_one_moment_on(
    tmp_path: Path, flow: Flow, status: int, code: str, words: str
) -> None:
    """It refuses what writes: a full store can still be read."""
    refuses: list[bool] = []

    def fault(request: s3.Request) -> Verdict:
        return (status, refusal(code)) if refuses and request.method in ("PUT", "POST") else "pass"

    shown: list[str] = []
    with drill_with_proxy(tmp_path / "drill", fault) as drill:
        recipe = prepare(drill, "dedup")
        begins = Fault("filter", 0.0, lambda drill, say: refuses.append(True))
        assert run_recipe(drill, recipe, [begins], shown.append) == 1
        text = " ".join(" ".join(shown).split())  # without the terminal's line breaks
        assert f"{drill.root}/runs/" in text, text
        assert words in text, text
        assert set(stored_manifests(drill)) == {"corpus"}
        refuses.clear()
        assert run_recipe(drill, recipe) == 0
        prove(drill, of_flow(flow, "dedup"))


def test_a_store_that_refuses_connections_for_a_while(tmp_path: Path, flow: Flow) -> None:
    """Requests fail at once, so that a limited number of attempts would be used up in seconds."""
    until = [0.0]

    def fault(request: s3.Request) -> Verdict:
        return "drop" if time.monotonic() < until[0] else "pass"

    def begin(drill: RayDrill, say: Say) -> None:
        until[0] = time.monotonic() + 45

    with drill_with_proxy(tmp_path / "drill", fault) as drill:
        assert run_recipe(drill, prepare(drill, "dedup"), [Fault("dedup", 0.5, begin)]) == 0
        prove(drill, of_flow(flow, "dedup"))


def test_the_store_away_for_a_minute(tmp_path: Path, flow: Flow) -> None:
    with ray_drill(tmp_path / "drill", 2, ROOT) as drill:
        away = [Fault("dedup", 0.5, lambda drill, say: lose_store(drill, say, 60.0))]
        assert run_recipe(drill, prepare(drill, "dedup"), away) == 0
        prove(drill, of_flow(flow, "dedup"))
