"""When schedules tick, against a slow oracle that looks at every minute of the days on which clocks change."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moray.platform.control.choices import Catchup, Overlap
from moray.platform.control.ticks import (
    BATCH,
    GRACE,
    Cron,
    Every,
    ScheduleState,
    TickDecision,
    Trigger,
    decide_ticks,
    format_every,
    parse_every,
    parse_trigger,
)
from moray.platform.core.errors import InputError
from tests.examples import examples

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0

# (zone, a day on which its clock changes): by half an hour or two hours, at midnight, a minute past it, by a whole day.
CHANGES = [
    ("America/New_York", "2026-03-08"), ("America/New_York", "2026-11-01"),
    ("Europe/London", "2026-03-29"), ("Europe/London", "2026-10-25"),
    ("Australia/Lord_Howe", "2026-04-05"), ("Australia/Lord_Howe", "2026-10-04"),
    ("Antarctica/Troll", "2026-03-29"), ("Antarctica/Troll", "2026-10-25"),
    ("America/Sao_Paulo", "2018-11-04"), ("America/Sao_Paulo", "2018-02-18"),
    ("Africa/Cairo", "2026-04-24"), ("Africa/Cairo", "2026-10-30"),
    ("America/St_Johns", "2006-04-02"), ("America/St_Johns", "2006-10-29"),
    ("Asia/Kathmandu", "1986-01-01"), ("Asia/Singapore", "1982-01-01"), ("Pacific/Apia", "2011-12-30"),
    ("Pacific/Kwajalein", "1993-08-21"), ("Africa/Casablanca", "2026-02-15"), ("Africa/Casablanca", "2026-03-22"),
]  # fmt: skip
STEADY = [("Asia/Singapore", "2026-06-15"), ("UTC", "2026-02-28")]


@cache
def minutes(zone: str, day: str) -> tuple[tuple[float, datetime], ...]:
    """Every minute from two days before `day` to three days after, as an instant and on the wall clock."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp() - 2 * DAY
    instants = [start + i * MINUTE for i in range(5 * 1440)]
    return tuple((t, datetime.fromtimestamp(t, ZoneInfo(zone)).replace(tzinfo=None)) for t in instants)


@dataclass(frozen=True)
class Fields:
    """A cron expression and what it means, made together so that the oracle needs no parser."""

    text: str
    minute: AbstractSet[int]
    hour: AbstractSet[int]
    day: AbstractSet[int]
    month: AbstractSet[int]
    weekday: AbstractSet[int]  # 0 is Sunday

    def match(self, wall: datetime) -> bool:
        _, _, day, _, weekday = self.text.split()
        of_month, of_week = wall.day in self.day, wall.isoweekday() % 7 in self.weekday
        both = day.startswith("*") or weekday.startswith("*")
        of_day = (of_month and of_week) if both else (of_month or of_week)
        return wall.minute in self.minute and wall.hour in self.hour and of_day and wall.month in self.month


def oracle(fields: Fields, zone: str, day: str) -> list[float]:
    """The ticks in those five days: a minute counts when it is first shown, or when the clock has jumped over it."""
    ticks, shown = [], set[datetime]()
    last: datetime | None = None
    for instant, wall in minutes(zone, day):
        new = [wall] if wall not in shown else []
        while last is not None and last + timedelta(minutes=1) < wall:
            last += timedelta(minutes=1)
            new.append(last)
        if any(fields.match(local) for local in new):
            ticks.append(instant)
        shown.add(wall)
        last = wall
    return ticks


@st.composite
def field(draw: st.DrawFn, low: int, high: int) -> tuple[str, frozenset[int]]:
    kind = draw(st.sampled_from(["*", "*/n", "list", "range"]))
    if kind == "*":
        return "*", frozenset(range(low, high + 1))
    if kind == "*/n":
        step = draw(st.integers(1, high))
        return f"*/{step}", frozenset(range(low, high + 1, step))
    if kind == "list":
        values = draw(st.sets(st.integers(low, high), min_size=1, max_size=4))
        return ",".join(map(str, sorted(values))), frozenset(values)
    first = draw(st.integers(low, high))
    last = draw(st.integers(first, high))
    return f"{first}-{last}", frozenset(range(first, last + 1))


@st.composite
def expressions(draw: st.DrawFn) -> Fields:
    minute, hour = draw(field(0, 59)), draw(field(0, 23))
    anything = ("*", frozenset(range(32)))
    day, month, weekday = (
        draw(st.one_of(st.just(anything), field(low, high))) for low, high in ((1, 31), (1, 12), (0, 6))
    )
    parts = (minute, hour, day, month, weekday)
    return Fields(" ".join(text for text, _ in parts), *(values for _, values in parts))


def fixed(text: str) -> Fields:
    """Minute and hour as written, every day."""
    minute, hour, *_ = text.split()
    every = frozenset(range(60))
    shown = [every if part == "*" else frozenset(map(int, part.split(","))) for part in (minute, hour)]
    return Fields(text, shown[0], shown[1], every, every, every)


def chain(trigger: Trigger, start: float, end: float) -> list[float]:
    """The trigger's ticks in (start, end]."""
    found = []
    while (start := trigger.after(start)) <= end:
        found.append(start)
    return found


def possible(fields: Fields) -> bool:
    try:
        parse_trigger(fields.text, None, "UTC", 0.0)
    except InputError:
        return False
    return True


@pytest.mark.parametrize(("zone", "day"), CHANGES)
def test_the_windows_hold_a_change(zone: str, day: str) -> None:
    """Else the tests below would show nothing."""
    walls = [wall for _, wall in minutes(zone, day)]
    assert any(b - a != timedelta(minutes=1) for a, b in pairwise(walls))


@settings(max_examples=examples(100), deadline=None)
@given(fields=expressions(), where=st.sampled_from(CHANGES + STEADY))
@example(fields=fixed("30 1 * * *"), where=CHANGES[1])
@example(fields=fixed("0 0 * * *"), where=CHANGES[8])
def test_ticks_are_those_of_the_oracle(fields: Fields, where: tuple[str, str]) -> None:
    if not possible(fields):
        return
    shown = minutes(*where)
    start, end = shown[0][0], shown[-1][0]
    assert chain(Cron(fields.text, where[0]), start - 1, end) == oracle(fields, *where)


@pytest.mark.parametrize(("zone", "day"), CHANGES)
@pytest.mark.parametrize("text", ["0 * * * *", "30 1 * * *", "0,45 0,2,23 * * *"])
def test_after_from_minutes_all_over_the_change(zone: str, day: str, text: str) -> None:
    """Also from within the repeated hour, and from just before a minute."""
    expected = [*oracle(fixed(text), zone, day)]
    trigger = Cron(text, zone)
    # 37 has no divisor in common with 60: these instants meet every minute of an hour in the course of the three days.
    for instant, _ in minutes(zone, day)[1440 : 4 * 1440 : 37]:
        for moment in (instant - 0.5, instant):
            at = bisect_right(expected, moment)
            if at < len(expected):
                assert trigger.after(moment) == expected[at]


@settings(max_examples=examples(150), deadline=None)
@given(
    zone=st.sampled_from(sorted(available_timezones())),
    moment=st.floats(0, 4e9),
    text=st.sampled_from(["*/7 * * * *", "0 0 * * *", "30 2 * * SUN", "59 23 L * *", "@monthly"]),
)
def test_after_is_after_in_every_zone(zone: str, moment: float, text: str) -> None:
    first = Cron(text, zone).after(moment)
    assert first > moment
    assert Cron(text, zone).after(first) > first
    assert Cron(text, zone).after((moment + first) / 2) == first


def local(trigger: Trigger, zone: str, day: str, hours: int = 24) -> list[str]:
    """Its ticks in the `hours` from local midnight of `day` on, on the wall clock with the offset."""
    midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).timestamp()
    found = chain(trigger, midnight - 1, midnight + hours * HOUR - 1)
    return [datetime.fromtimestamp(t, ZoneInfo(zone)).strftime("%H:%M%z") for t in found]


class TestNamedAfterBugs:
    """What schedulers have shipped."""

    NEW_YORK = "America/New_York"

    def test_half_past_one_runs_once_when_the_clock_goes_back(self) -> None:
        # croniter and APScheduler 3 run it at 01:30-0400 and again at 01:30-0500.
        assert local(Cron("30 1 * * *", self.NEW_YORK), self.NEW_YORK, "2026-11-01", 25) == ["01:30-0400"]

    def test_a_tick_in_the_gap_is_not_lost(self) -> None:
        assert local(Cron("30 2 * * *", self.NEW_YORK), self.NEW_YORK, "2026-03-08", 23) == ["03:00-0400"]

    def test_several_ticks_in_the_gap_are_one(self) -> None:
        assert local(Cron("*/20 2,3 * * *", self.NEW_YORK), self.NEW_YORK, "2026-03-08", 23) == [
            "03:00-0400",
            "03:20-0400",
            "03:40-0400",
        ]

    def test_midnight_that_does_not_exist(self) -> None:
        zone = "America/Sao_Paulo"
        assert local(Cron("@daily", zone), zone, "2018-11-03", 47) == ["00:00-0300", "01:00-0200"]

    def test_half_an_hour_of_change(self) -> None:
        zone = "Australia/Lord_Howe"
        assert local(Cron("15 2 * * *", zone), zone, "2026-10-04") == ["02:30+1100"]
        assert local(Cron("45 1 * * *", zone), zone, "2026-04-05") == ["01:45+1100"]

    def test_the_scheduler_does_not_get_stuck_at_a_change(self) -> None:
        for day, ticks in (("2026-03-08", 23), ("2026-11-01", 24)):
            hours = 23 if ticks == 23 else 25
            assert len(local(Cron("@hourly", self.NEW_YORK), self.NEW_YORK, day, hours)) == ticks

    def test_a_day_that_was_left_out(self) -> None:
        zone = "Pacific/Apia"
        assert local(Cron("0 12 30 12 *", zone), zone, "2011-12-29", 48) == ["00:00+1400"]

    def test_intervals_know_no_change_of_clocks(self) -> None:
        midnight = int(datetime(2026, 11, 1, tzinfo=ZoneInfo(self.NEW_YORK)).timestamp())
        ticks = chain(Every(900, midnight), midnight, midnight + 25 * HOUR)
        assert len(ticks) == 100
        assert {b - a for a, b in pairwise(ticks)} == {900.0}

    def test_the_table_in_the_documentation(self) -> None:
        quarters = Cron("*/15 * * * *", self.NEW_YORK)
        assert local(quarters, self.NEW_YORK, "2026-03-08", 23)[7:10] == ["01:45-0500", "03:00-0400", "03:15-0400"]
        assert local(quarters, self.NEW_YORK, "2026-11-01", 25)[7:9] == ["01:45-0400", "02:00-0500"]


@given(seconds=st.integers(60, 366 * 86400), anchor=st.integers(0, 2 * 10**9), moment=st.floats(0, 4e9))
def test_intervals(seconds: int, anchor: int, moment: float) -> None:
    found = Every(seconds, anchor).after(moment)
    assert found > moment
    assert found >= anchor + seconds
    assert (found - anchor) % seconds == 0
    assert found - seconds <= max(moment, anchor)


@given(minutes_=st.integers(1, 366 * 1440))
def test_an_interval_reads_as_it_is_written(minutes_: int) -> None:
    assert parse_every(format_every(minutes_ * 60)) == minutes_ * 60


@pytest.mark.parametrize(
    ("trigger", "english"),
    [
        (Every(60, 0), "Every minute"),
        (Every(5400, 0), "Every 1 hour 30 minutes"),
        (Every(86400, 0), "Every day"),
        (Every(6 * 3600, 0), "Every 6 hours"),
        (Cron("0 2 * * *", "Asia/Singapore"), "At 02:00 every day, Asia/Singapore time"),
        (Cron("@WEEKLY", "UTC"), "At 00:00 on Sunday, UTC time"),
    ],
)
def test_english(trigger: Trigger, english: str) -> None:
    assert trigger.english() == english


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("0 4-4/1 * * *", "0 4 * * *"), ("0 4-04/3,9 * * *", "0 4,9 * * *"), ("0 0 * * 5-5/2", "0 0 * * 5"),
        ("0 0 * * fri-FRI/1", "0 0 * * 5"), ("0 0 1 MAR-3/2 *", "0 0 1 3 *"), ("0-0/7 0 * * *", "0 0 * * *"),
        ("0 0 1-1/1 1-1/1 *", "0 0 1 1 *"),
    ],
)  # fmt: skip
def test_a_range_of_one_value_with_a_step_is_that_value(text: str, plain: str) -> None:
    """cronsim reads 4-4/1 as 4/1: every hour from 4 on."""
    one, other = (parse_trigger(cron, None, "UTC", 0.0) for cron in (text, plain))
    moment = 0.0
    for _ in range(20):
        assert one.after(moment) == other.after(moment)
        moment = other.after(moment)
    assert one.english() == other.english()


@pytest.mark.parametrize(
    ("macro", "text"),
    [
        ("@hourly", "0 * * * *"), ("@daily", "0 0 * * *"), ("@midnight", "0 0 * * *"), ("@weekly", "0 0 * * 0"),
        ("@monthly", "0 0 1 * *"), ("@yearly", "0 0 1 1 *"), ("@annually", "0 0 1 1 *"),
    ],
)  # fmt: skip
def test_macros(macro: str, text: str) -> None:
    assert chain(Cron(macro, "UTC"), 0, 500 * DAY) == chain(Cron(text, "UTC"), 0, 500 * DAY)


@pytest.mark.parametrize(
    ("cron", "every", "tz", "message", "hint"),
    [
        ("61 * * * *", None, "UTC", "invalid value '61' in field 1 (minute)", "0-59"),
        ("0 24 * * *", None, "UTC", "invalid value '24' in field 2 (hour)", "0-23"),
        ("0 0 0 * *", None, "UTC", "invalid value '0' in field 3 (day of month)", "1-31"),
        ("0 0 * SEPT *", None, "UTC", "invalid value 'SEPT' in field 4 (month)", "did you mean SEP?"),
        ("0 0 * * thursday", None, "UTC", "invalid value 'THURSDAY' in field 5 (day of week)", "did you mean THU?"),
        ("5-1 * * * *", None, "UTC", "field 1 (minute)", "ranges 1-5"),
        ("*/0 * * * *", None, "UTC", "field 1 (minute)", "steps */5"),
        ("0 0 31 2 *", None, "UTC", "no such date exists", "day of month"),
        ("0 0 */29 2 MON#3", None, "UTC", "no matching date", "check the day"),
        ("* * * *", None, "UTC", "4 fields instead of 5", "minute, hour"),
        ("0 * * * * *", None, "UTC", "6 fields instead of 5", "seconds are not supported"),
        ("", None, "UTC", "0 fields instead of 5", "minute, hour"),
        ("@dayly", None, "UTC", "unknown macro", "did you mean '@daily'?"),
        (None, "90s", "UTC", "every '90s': not an interval", "30m, 6h"),
        (None, "", "UTC", "not an interval", "30m, 6h"),
        (None, "0m", "UTC", "shorter than a minute", "1m"),
        (None, "366d1m", "UTC", "longer than a year", "366d"),
        (None, None, "UTC", "neither cron nor every", "every 6h"),
        ("@daily", "6h", "UTC", "both cron and every", "for example cron"),
        ("", "6h", "UTC", "both cron and every", ""),
        ("@daily", None, "asia/singapore", "tz 'asia/singapore'", "'Asia/Singapore'"),
        ("@daily", None, "New York", "tz 'New York'", "'America/New_York'"),
        ("@daily", None, "../etc/passwd", "unknown time zone", "Europe/London"),
        ("@daily", None, "", "unknown time zone", "Europe/London"),
    ],
)
def test_invalid_triggers_are_named(cron: str | None, every: str | None, tz: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_trigger(cron, every, tz, 1.7e9)
    whole = f"{caught.value.message} {caught.value.hint}"
    assert message in caught.value.message
    assert hint in whole


CRONISH = st.text(st.sampled_from("0123456789*/-,#L WMONFRIjan@"), max_size=30)


@settings(max_examples=examples(400), deadline=None)
@given(
    st.one_of(
        CRONISH,
        CRONISH.map(lambda text: f"{text} * * * *"),
        CRONISH.map(lambda text: f"0 0 {text} * *"),
        CRONISH.map(lambda text: f"0 0 * * {text}"),
    )
)
def test_any_text_is_refused_or_works(text: str) -> None:
    try:
        trigger = parse_trigger(text, None, "Europe/London", 1.7e9)
    except InputError:
        return
    assert trigger.english()
    assert trigger.after(1.7e9) > 1.7e9


# ------------------------------------------------------------------------------------------------ decisions


def state_of(trigger: Trigger, cursor: float, overlap: Overlap = "skip", catchup: Catchup = "none") -> ScheduleState:
    return ScheduleState(trigger, cursor, held="", overlap=overlap, catchup=catchup, busy="")


def settle(state: ScheduleState, now: float, ends_at_once: bool = True) -> tuple[ScheduleState, list[TickDecision]]:
    """Applies decisions until nothing is due, as `Schedules` does."""
    made = []
    while (decision := decide_ticks(state, now)) is not None:
        made.append(decision)
        busy = f"job-{decision.tick:.0f}" if decision.run and not ends_at_once else state.busy
        state = replace(state, cursor=decision.until, busy=busy)
    return state, made


HOURLY = Every(3600, 0)


class TestDowntime:
    def test_nothing_that_was_missed_runs_by_default(self) -> None:
        _, made = settle(state_of(HOURLY, 0), 24 * HOUR + 100)
        assert made == [TickDecision(HOUR, 24 * HOUR, 24, run=False, reason="missed")]

    def test_catchup_last_runs_the_newest_alone(self) -> None:
        _, made = settle(state_of(HOURLY, 0, catchup="last"), 24 * HOUR + 100)
        assert [(d.tick, d.until, d.count, d.run) for d in made] == [
            (HOUR, 23 * HOUR, 23, False),
            (24 * HOUR, 24 * HOUR, 1, True),
        ]

    def test_a_tick_within_the_grace_is_not_missed(self) -> None:
        for late, run in ((0.0, True), (GRACE, True), (GRACE + 0.5, False)):
            _, (decision,) = settle(state_of(HOURLY, 0), HOUR + late)
            assert decision.run is run

    def test_thousands_of_missed_ticks_are_settled_in_batches(self) -> None:
        for catchup in ("none", "last"):
            _, made = settle(state_of(Every(60, 0), 0, catchup=catchup), 10_000 * MINUTE + 30)
            assert max(d.count for d in made) <= BATCH
            assert sum(d.count for d in made) == 10_000
            # The tick of this very minute is not late; with `last` the newest late one runs before it.
            assert [d.tick for d in made if d.run] == [
                t * MINUTE for t in ((9999, 10_000), (10_000,))[catchup == "none"]
            ]

    def test_a_paused_schedule_does_not_make_up_for_it_on_resume(self) -> None:
        state = state_of(HOURLY, 0, catchup="last")
        state, paused = settle(replace(state, held="paused"), 10 * HOUR + 5)
        assert paused == [TickDecision(HOUR, 10 * HOUR, 10, run=False, reason="paused")]
        assert settle(replace(state, held=""), 10 * HOUR + 5)[1] == []

    def test_a_clock_set_back_repeats_nothing(self) -> None:
        state, made = settle(state_of(HOURLY, 0), HOUR)
        assert [d.run for d in made] == [True]
        assert settle(state, HOUR - 1)[1] == []
        assert settle(state, HOUR)[1] == []


class TestOverlap:
    @pytest.mark.parametrize(
        ("overlap", "run", "exclusive"), [("skip", False, False), ("queue", True, True), ("allow", True, False)]
    )
    def test_a_job_at_work(self, overlap: Overlap, run: bool, exclusive: bool) -> None:
        decision = decide_ticks(replace(state_of(HOURLY, 0, overlap), busy="old-job"), HOUR)
        assert decision is not None
        assert (decision.run, decision.exclusive) == (run, exclusive)
        assert ("old-job" in decision.reason) is not run

    def test_the_job_that_catches_up_counts(self) -> None:
        _, made = settle(state_of(Every(60, 0), 0, catchup="last"), 5 * MINUTE + 1, ends_at_once=False)
        assert [(d.tick, d.run) for d in made] == [(60, False), (240, True), (300, False)]


ACTIONS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0, 4000)),
    st.tuples(st.just("jump"), st.floats(-90_000, 90_000)),
    st.tuples(st.just("downtime"), st.floats(0, 400_000)),
    st.tuples(st.sampled_from(["tick", "tick", "tick", "pause", "resume", "end"]), st.just(0.0)),
)
TRIGGERS: list[Trigger] = [
    Every(60, 1_793_000_000), Every(5400, 1_793_000_000), Cron("*/15 * * * *", "America/New_York"),
    Cron("30 1 * * *", "America/New_York"), Cron("0 */2 * * *", "Europe/London"),
]  # fmt: skip


@settings(max_examples=examples(150), deadline=None)
@given(
    trigger=st.sampled_from(TRIGGERS),
    overlap=st.sampled_from(["skip", "queue", "allow"]),
    catchup=st.sampled_from(["none", "last"]),
    actions=st.lists(ACTIONS, max_size=40),
)
def test_every_tick_is_decided_exactly_once(
    trigger: Trigger, overlap: Overlap, catchup: Catchup, actions: list[tuple[str, float]]
) -> None:
    """Whatever clocks, people and jobs do: each tick once, in order, at most one run, and for the reason given."""
    begin = now = 1_793_500_000.0  # the autumn in which both zones change their clocks
    state = state_of(trigger, now, overlap, catchup)
    log: list[TickDecision] = []

    def step() -> None:
        nonlocal state
        while (decision := decide_ticks(state, now)) is not None:
            assert decision.tick > state.cursor, "the cursor only moves forward"
            check(state, decision, now)
            log.append(decision)
            busy = f"job-{decision.tick}" if decision.run else state.busy
            state = replace(state, cursor=decision.until, busy=state.busy or busy)

    for action, value in [*actions, ("tick", 0.0)]:
        now += value
        if action not in {"jump", "downtime"}:
            step()
        if action in ("pause", "resume"):
            state = replace(state, held="paused" if action == "pause" else "")
        if action == "end":
            state = replace(state, busy="")
    covered = [t for decision in log for t in chain(trigger, decision.tick - 1, decision.until)]
    assert covered == chain(trigger, begin, state.cursor)
    assert sum(decision.count for decision in log) == len(covered)
    assert trigger.after(state.cursor) > now, "nothing that is due is left"
    ran = [decision.tick for decision in log if decision.run]
    assert len(ran) == len(set(ran))


def check(state: ScheduleState, decision: TickDecision, now: float) -> None:
    """One decision against docs/schedules.md."""
    assert decision.until <= now
    late = decision.until < now - GRACE
    newer_missed = state.trigger.after(decision.until) < now - GRACE
    if decision.run:
        assert decision.count == 1
        assert not state.held
        assert not (state.busy and state.overlap == "skip")
        assert not late or (state.catchup == "last" and not newer_missed)
        assert decision.exclusive is (state.overlap == "queue")
    elif state.held:
        assert decision.reason == state.held
    elif decision.reason == "missed":
        assert late
        assert state.catchup == "none"
    elif decision.reason == "missed; replaced by a later missed tick":
        assert late
        assert newer_missed
        assert state.catchup == "last"
    else:
        assert decision.reason == f"job {state.busy} has not ended"
        assert state.overlap == "skip"
        assert decision.count == 1
