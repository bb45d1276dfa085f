"""Computes the ticks of a schedule and the outcome of each tick. Pure functions, without clock or database.

docs/schedules.md has the rules. A cron expression is a set of wall-clock minutes in one time zone. `cronsim` enumerates
them without a zone, and `_first_instant` maps each to an instant: the first of two, or the first that exists after a
gap. This map is monotonic, so local minutes in order give instants in order. (With a zone, cronsim follows Debian's
cron and repeats expressions with wildcards in the repeated hour; here, one rule applies to all expressions.)
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from functools import cache, lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from moray.platform.control.choices import Catchup, Overlap
from moray.platform.core.errors import InputError, nearest

GRACE = 60.0  # seconds; a tick decided later than this counts as missed
BATCH = 1000  # ticks decided at once: some 30 ms of work for a cron expression
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_LONGEST_DAYS = 366
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_WEEKDAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_FIELDS: tuple[tuple[str, str, list[str]], ...] = (
    ("minute", "0-59", []),
    ("hour", "0-23", []),
    ("day of month", "1-31, L or LW", []),
    ("month", "1-12 or JAN-DEC", _MONTHS),
    ("day of week", "0-7 or SUN-SAT (0 and 7 are Sunday), also FRI#2 or 5L", _WEEKDAYS),
)
_EVERY = re.compile(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?")


@dataclass(frozen=True)
class Cron:
    """Ticks at the wall-clock minutes given by the cron expression `text` in the time zone `tz`."""

    text: str
    tz: str

    def after(self, moment: float) -> float:
        """The first tick strictly after `moment`, in seconds since the epoch. Raises InputError if there is none."""
        return _cron_after(self.text, self.tz, moment)

    def english(self) -> str:
        return f"{CronSim(_expanded(self.text), datetime(2000, 1, 1)).explain()}, {self.tz} time"


@dataclass(frozen=True)
class Every:
    """Ticks at `anchor` + 1, 2, 3, ... times `seconds`, in absolute time, regardless of zone and daylight saving."""

    seconds: int
    anchor: int

    def after(self, moment: float) -> float:
        """The first tick strictly after `moment`, both in seconds since the epoch."""
        elapsed = max(0, (math.floor(moment) - self.anchor) // self.seconds)
        return float(self.anchor + (elapsed + 1) * self.seconds)

    def english(self) -> str:
        parts = [f"{n} {unit}{'s' if n > 1 else ''}" for n, unit in _split(self.seconds) if n]
        return f"Every {' '.join(parts)}".replace("Every 1 ", "Every ", int(len(parts) == 1))


Trigger = Cron | Every


@dataclass(frozen=True)
class ScheduleState:
    """The input of `decide_ticks`.

    cursor: all ticks up to this time are decided. held: the reason to skip every tick ("paused"), or empty. busy: id of
    the schedule's oldest unfinished job, or empty.
    """

    trigger: Trigger
    cursor: float
    held: str
    overlap: Overlap
    catchup: Catchup
    busy: str


@dataclass(frozen=True)
class TickDecision:
    """One tick that runs, or `count` consecutive ticks from `tick` to `until` skipped for the same reason."""

    tick: float
    until: float
    count: int
    run: bool
    reason: str = ""
    exclusive: bool = False


def decide_ticks(state: ScheduleState, now: float) -> TickDecision | None:
    """Decides the oldest due ticks that are not yet decided; None if there are none.

    Apply the decision, move the cursor to `until`, then call again: the job of one tick may be the running job that
    makes the next tick be skipped. A call considers at most `BATCH` ticks, however many were missed.
    """
    first = state.trigger.after(state.cursor)
    if first > now:
        return None
    if state.held:
        return _skipped(_ticks(state.trigger, first, now), state.held)
    late = math.ceil(now - GRACE) - 1  # the newest second, so the newest possible tick, outside the grace period
    if first <= late:
        missed = _ticks(state.trigger, first, late)
        if state.catchup == "none":
            return _skipped(missed, "missed")
        if len(missed) > 1:  # the last one is the newest, or becomes the first of the next batch
            return _skipped(missed[:-1], "missed; replaced by a later missed tick")
    if state.busy and state.overlap == "skip":
        return _skipped([first], f"job {state.busy} has not ended")
    return TickDecision(first, first, 1, run=True, exclusive=state.overlap == "queue")


def parse_trigger(cron: str | None, every: str | None, tz: str, anchor: float) -> Trigger:
    """Returns the trigger of a new schedule. Raises InputError that names the invalid field."""
    if (cron is None) == (every is None):
        given = "both cron and every" if cron is not None else "neither cron nor every"
        raise InputError(f"{given} given; exactly one is required", 'for example cron "0 2 * * *", or every 6h')
    if tz not in _zones():
        raise InputError(f"tz {tz!r:.80}: unknown time zone", _nearest_zone(tz))
    if every is not None:
        return Every(parse_every(every), math.floor(anchor))
    assert cron is not None
    _check_cron(cron)
    trigger = Cron(" ".join(cron.split()), tz)
    trigger.after(anchor)
    return trigger


def parse_every(text: str) -> int:
    """Parses `30m`, `6h`, `1d`, `1h30m` into seconds. Raises InputError below one minute and above 366 days."""
    match = _EVERY.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise InputError(f"every {text!r:.80}: not an interval", "write days, hours, minutes: 30m, 6h, 1d, 1h30m")
    days, hours, minutes = (int(part or 0) for part in match.groups())
    seconds = days * _DAY + hours * _HOUR + minutes * _MINUTE
    if seconds < _MINUTE:
        raise InputError(f"every {text!r}: shorter than a minute", "the shortest interval is 1m")
    if seconds > _LONGEST_DAYS * _DAY:
        raise InputError(f"every {text!r}: longer than a year", f"the longest interval is {_LONGEST_DAYS}d")
    return seconds


def format_every(seconds: float) -> str:
    """The inverse of `parse_every`: 5400 gives `1h30m`."""
    return "".join(f"{n}{unit[0]}" for n, unit in _split(seconds) if n)


def local_text(moment: float, tz: str) -> str:
    """Formats an instant as local time in `tz` with its UTC offset: 2026-11-25T02:00:00+08:00."""
    return datetime.fromtimestamp(moment, _zone(tz)).isoformat(timespec="seconds")


def _skipped(ticks: list[float], reason: str) -> TickDecision:
    return TickDecision(ticks[0], ticks[-1], len(ticks), run=False, reason=reason)


def _ticks(trigger: Trigger, first: float, last: float) -> list[float]:
    """The ticks from `first` to `last`, at most `BATCH`."""
    found = [first]
    while len(found) < BATCH and (tick := trigger.after(found[-1])) <= last:
        found.append(tick)
    return found


# Cached, because the control loop asks for the same next tick of every schedule in every round.
@lru_cache(maxsize=8192)
def _cron_after(text: str, tz: str, moment: float) -> float:
    zone = _zone(tz)
    wall = datetime.fromtimestamp(math.floor(moment), zone).replace(tzinfo=None, fold=0)
    # A local minute whose instant is after `moment` is later than `wall` on the clock. The converse fails in the
    # repeated hour, whose minutes map to the first occurrence, so the loop skips those.
    for local in CronSim(_expanded(text), wall):
        instant = _first_instant(local, zone)
        if instant > moment:
            return instant
    raise InputError(f"cron {text!r}: no matching date in the next 50 years", "check the day and the month")


def _first_instant(local: datetime, zone: ZoneInfo) -> float:
    """The instant at which the clock in `zone` first shows `local`; in a gap, the first minute after the gap."""
    while True:
        instant = local.replace(tzinfo=zone, fold=0).timestamp()
        if datetime.fromtimestamp(instant, zone).replace(tzinfo=None) == local:
            return instant
        local += timedelta(minutes=1)  # Samoa skipped a whole day in 2011; most gaps take 60 iterations


def _expanded(text: str) -> str:
    """The expression for cronsim: macros expanded, and 4-4/1 as 4, because cronsim reads it as 4/1, all from 4 on."""
    parts = _MACROS.get(text.lower(), text).upper().split()
    fields = [names for _, _, names in _FIELDS]
    return " ".join(
        ",".join(_without_step(term, names) for term in part.split(","))
        for part, names in zip(parts, fields, strict=True)
    )


def _without_step(term: str, names: list[str]) -> str:
    found = re.fullmatch(r"(\w+)-(\w+)/0*[1-9]\d*", term)
    if not found:
        return term
    first, last = (str(names.index(one) + (names is _MONTHS)) if one in names else one for one in found.groups())
    return first if first.lstrip("0") == last.lstrip("0") else term


def _zone(tz: str) -> ZoneInfo:
    try:
        return ZoneInfo(tz)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise InputError(f"tz {tz!r:.80}: time zone not found on this machine", "install the tzdata package") from None


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())  # reads hundreds of files


def _nearest_zone(tz: str) -> str:
    known = _zones()
    if not known:
        return "this machine has no time zone data; install the tzdata package"
    # Handles bare city names such as "Tokyo" and "new york" as well as misspelt zones such as "Asia/Tokio".
    by_city = {name.rpartition("/")[2].replace("_", " ").lower(): name for name in sorted(known)}
    by_name = {name.lower(): name for name in sorted(known)}
    for names in (by_name, by_city):
        if close := get_close_matches(tz.lower(), names, n=1, cutoff=0.75):
            return f"did you mean {names[close[0]]!r}?"
    return "examples of zones: Europe/London, Asia/Singapore, UTC"


def _check_cron(text: str) -> None:
    """Raises InputError that names the invalid field, its position and its valid values."""
    where = f"cron {text!r:.120}"
    if text.strip().startswith("@"):
        if text.strip().lower() not in _MACROS:
            raise InputError(f"{where}: unknown macro", nearest(text.strip().lower(), _MACROS))
        return
    parts = text.upper().split()
    if len(parts) != len(_FIELDS):
        fields = ", ".join(name for name, _, _ in _FIELDS)
        raise InputError(f"{where}: {len(parts)} fields instead of 5", f"fields: {fields}; seconds are not supported")
    for i, (part, (name, values, names)) in enumerate(zip(parts, _FIELDS, strict=True)):
        alone = ["*"] * len(_FIELDS)
        alone[i] = part
        if not _readable(" ".join(alone)):
            raise InputError(
                f"{where}: invalid value {part!r:.40} in field {i + 1} ({name})",
                f"{_suggestion(part, names)}{name} takes {values}; also *, lists 1,2, ranges 1-5 and steps */5",
            )
    if not _readable(" ".join(parts)):
        raise InputError(f"{where}: never ticks, because no such date exists", "change the day of month or the month")


def _readable(expression: str) -> bool:
    # int() raises an error on numbers of thousands of digits; no valid expression is that long.
    if len(expression) > 500:
        return False
    try:
        CronSim(expression, datetime(2000, 1, 1)).explain()
    except CronSimError:
        return False
    return True


def _suggestion(part: str, names: list[str]) -> str:
    """A hint for a misspelt or written-out name: THURSDAY, SEPT."""
    for word in re.findall("[A-Z]{2,}", part):
        if word not in names and (close := get_close_matches(word[:3], names, n=1, cutoff=0.6)):
            return f"did you mean {close[0]}? "
    return ""


def _split(seconds: float) -> tuple[tuple[int, str], tuple[int, str], tuple[int, str]]:
    days, rest = divmod(int(seconds), _DAY)
    return (days, "day"), (rest // _HOUR, "hour"), (rest % _HOUR // _MINUTE, "minute")
