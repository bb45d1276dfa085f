"""Decides the next state of a deployment and of its versions. Pure functions, called in every round of the controller.

A new version becomes live when all of its replicas run. It has failed if its replicas do not start, if it does not
become ready in time, or, soon after it became live, if its answers fail; then the version before serves again, and the
alias is followed again when it names yet another model. docs/deployments.md has the states.
"""

from __future__ import annotations

from dataclasses import dataclass

from moray.platform.control.deployments import Deployment, DeploymentState, Version, VersionState
from moray.platform.core.serving import DeploymentSeen

START_SECONDS = 1800.0  # for a version to become ready, while its replicas have room
PROBATION_SECONDS = 600.0  # after which failing answers no longer roll a version back
_LEAST_ANSWERS = 5  # of a version, before its failures count
_MOST_FAILED = 0.2  # share of failed answers


@dataclass(frozen=True)
class Answers:
    """Requests that a version has answered, and those of them that failed by the server's fault."""

    requests: int = 0
    failed: int = 0


@dataclass(frozen=True)
class DeploymentSight:
    """Everything known about a deployment at one moment.

    seen: Serve's report; None if Serve does not list it. ordered, live_ordered: Serve was told to run the desired
    version, or the live one. target: what the alias names now; "" if it names nothing that can be served, or if there
    is none to follow. blocked: why Serve cannot be told now. gone, live_gone: why the model of the desired version, or
    of the live one, cannot be read. room: why a replica waits for resources. retry_in: seconds until a live version
    that failed to start is tried again. starts_for: seconds for which replicas of the desired version have had their
    places without being ready. lives_for: seconds since the desired version became live. answers: of the desired
    version since then.
    """

    seen: DeploymentSeen | None
    ordered: bool
    live_ordered: bool = False
    target: str = ""
    blocked: str = ""
    gone: str = ""
    live_gone: str = ""
    room: str = ""
    retry_in: float = 0.0
    starts_for: float = 0.0
    lives_for: float = 0.0
    answers: Answers = Answers()


@dataclass(frozen=True)
class VersionMove:
    """A version gets another state."""

    number: int
    state: VersionState
    reason: str = ""


@dataclass(frozen=True)
class DeploymentAction:
    """What to do for a deployment: set its state, move versions, add the version of `target`, order a version.

    order: the desired version is to run. live: instead of it, the live one. back_to: the version that serves again
    because the current one failed for `reason`. pause: the live version did not start; it is tried again after a pause.
    """

    state: DeploymentState
    reason: str = ""
    order: bool = False
    live: bool = False
    moves: tuple[VersionMove, ...] = ()
    add: bool = False
    back_to: Version | None = None
    pause: bool = False


def decide_deployment(deployment: Deployment, sight: DeploymentSight) -> DeploymentAction:
    """Returns the actions for one deployment that is to run."""
    if _is_new(deployment, sight.target):
        return DeploymentAction(deployment.state, deployment.reason, order=sight.ordered, add=True)
    version = deployment.desired
    if version is None:
        return DeploymentAction("failed", deployment.versions[-1].reason)
    if _live_first(deployment, version, sight):
        return DeploymentAction(
            "starting", sight.blocked or f"version {version.number} follows", live=not sight.blocked
        )
    if sight.seen is None or not sight.ordered:
        return _unordered(deployment, version, sight)
    return _ordered(deployment, version, sight, sight.seen)


def _is_new(deployment: Deployment, target: str) -> bool:
    """Whether the alias names a model that is neither the desired version nor one that failed under this alias. (Once
    it has named another model, one that failed is tried again.)"""
    if not target or (deployment.desired and deployment.desired.reference == target):
        return False
    last = deployment.versions[-1]
    return last.reference != target or not (last.state == "failed" or deployment.goes_back)


def _live_first(deployment: Deployment, version: Version, sight: DeploymentSight) -> bool:
    """Whether the live version has to run again before another one replaces it: Serve has forgotten both."""
    if version.state != "starting" or deployment.live is None or sight.ordered or sight.live_gone:
        return False
    if sight.seen is None:
        return True
    return sight.live_ordered and sight.seen.state in ("starting", "degraded") and not _answers(sight)


def _answers(sight: DeploymentSight) -> bool:
    return sight.seen is not None and any(one.state == "running" for one in sight.seen.replicas)


def _unordered(deployment: Deployment, version: Version, sight: DeploymentSight) -> DeploymentAction:
    """Serve does not run the desired version yet, or no longer."""
    if sight.gone and version.state == "starting":
        return _give_up(deployment, version, sight.gone)
    if sight.gone:
        return DeploymentAction("failed", sight.gone)
    if sight.retry_in > 0:
        reason = f"version {version.number} did not start; next try in {sight.retry_in:.0f} s: {version.reason}"
        return DeploymentAction("failed", reason)
    if sight.blocked:
        state: DeploymentState = "rolling" if _answers(sight) else "pending"
        return DeploymentAction(state, sight.blocked)
    return DeploymentAction(_on_the_way(sight), _earlier_failure(deployment, version), order=True)


def _ordered(
    deployment: Deployment, version: Version, sight: DeploymentSight, seen: DeploymentSeen
) -> DeploymentAction:
    """Serve was told to run the desired version."""
    if seen.state == "failed":
        return _failed(deployment, version, seen)
    if seen.state == "running":
        return _running(deployment, version, sight)
    return _starting(deployment, version, sight, seen)


def _failed(deployment: Deployment, version: Version, seen: DeploymentSeen) -> DeploymentAction:
    if version.state == "starting":
        return _give_up(deployment, version, seen.message or "its replicas did not start")
    move = VersionMove(version.number, "live", seen.message)
    moves = (move,) if version.reason != seen.message else ()
    return DeploymentAction("failed", seen.message, moves=moves, pause=True)


def _running(deployment: Deployment, version: Version, sight: DeploymentSight) -> DeploymentAction:
    if version.state == "starting":
        moves = [VersionMove(version.number, "live")]
        for one in deployment.versions:
            if one.state == "live":
                failed = one.number > version.number  # a rollback
                moves.append(VersionMove(one.number, *(("failed", one.reason) if failed else ("replaced", ""))))
        return DeploymentAction("running", order=True, moves=tuple(moves))
    failing = sight.answers.failed > _MOST_FAILED * sight.answers.requests
    on_probation = sight.lives_for <= PROBATION_SECONDS and sight.answers.requests >= _LEAST_ANSWERS
    if failing and on_probation and (previous := deployment.previous):
        reason = f"{sight.answers.failed} of {sight.answers.requests} answers failed"
        return DeploymentAction("rolling", reason, order=True, back_to=previous)
    reason = sight.blocked or _earlier_failure(deployment, version)
    return DeploymentAction("running", reason, order=True)


def _starting(
    deployment: Deployment, version: Version, sight: DeploymentSight, seen: DeploymentSeen
) -> DeploymentAction:
    ready = sum(one.state == "running" for one in seen.replicas)
    if version.state == "starting" and sight.starts_for > START_SECONDS:
        return _give_up(deployment, version, f"not ready after {START_SECONDS / 60:.0f} minutes: {seen.message}")
    reason = sight.room or seen.message
    if version.state == "live" and ready:
        return DeploymentAction("running", reason or f"{ready} replicas are ready, others start", order=True)
    return DeploymentAction(_on_the_way(sight), reason, order=True)


def _give_up(deployment: Deployment, version: Version, reason: str) -> DeploymentAction:
    """A version that did not become live has failed. The live one, if any, serves on."""
    moves = [VersionMove(version.number, "failed", reason)]
    if deployment.live is None:
        return DeploymentAction("failed", reason, moves=tuple(moves))
    if deployment.goes_back:  # the version before it is tried next, or the live one stays
        moves.append(VersionMove(deployment.live.number, "live"))
    return DeploymentAction("rolling", f"version {version.number} failed: {reason}", order=True, moves=tuple(moves))


def _on_the_way(sight: DeploymentSight) -> DeploymentState:
    return "rolling" if _answers(sight) else "starting"


def _earlier_failure(deployment: Deployment, version: Version) -> str:
    """The failure of another version since this one became live."""
    failed = [one for one in deployment.versions if one.state == "failed" and one.since >= version.since]
    last = max(failed, key=lambda one: (one.since, one.number), default=None)
    return f"version {last.number} failed: {last.reason}" if last and version.state == "live" else ""
