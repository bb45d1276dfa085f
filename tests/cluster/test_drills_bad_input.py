"""Bad input for a real cluster: one error that says what to change, and nothing is started or written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moray.cluster.drills.hosts import GATEWAY
from moray.cluster.drills.ray_cluster import TOKEN, RayDrill, ray_drill
from moray.cluster.drills.scenarios import stored_keys
from tests import s3
from tests.checkout import ROOT
from tests.cluster.drill_checks import need_hosts, prepare

pytestmark = [pytest.mark.ray, pytest.mark.evidence]


def add_profile(drill: RayDrill, name: str, old: str, new: str) -> None:
    """Writes a copy of the drill's profile with one difference."""
    text = drill.profile()
    assert old in text
    (drill.laptop.home / "moray" / "clusters" / f"{name}.yaml").write_text(text.replace(old, new))


def refused(drill: RayDrill, recipe: str, cluster: str) -> str:
    """The error of `moray run` on a cluster."""
    command = drill.moray("run", recipe, "--cluster", cluster)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    return " ".join(done.stderr.split())


def test_each_mistake_is_one_error(tmp_path: Path) -> None:
    need_hosts()

    def read_only(request: s3.Request) -> str | tuple[int, str]:
        refusal = "<Error><Code>AccessDenied</Code></Error>"
        return "pass" if request.method in ("GET", "HEAD") else (403, refusal)

    with ray_drill(tmp_path / "drill", 1, ROOT) as drill, s3.faulty_proxy(drill.endpoint, read_only, GATEWAY) as url:
        recipe = prepare(drill, "corpus")
        token = drill.laptop.home / "wrong"
        token.write_text(TOKEN[::-1])
        token.chmod(0o600)
        add_profile(drill, "wrong-token", "${env:RAY_TOKEN}", "${file:/mnt/wrong}")
        add_profile(drill, "no-rights", drill.endpoint, url)
        add_profile(drill, "no-bucket", "s3://drill/", "s3://nobodys/")
        add_profile(drill, "away", drill.head.address, f"{drill.head.address}99")
        add_profile(drill, "not-ray", f"http://{drill.head.address}:8265", drill.endpoint)
        add_profile(drill, "typo", "store:", "stoer:")
        assert "refuses the token" in refused(drill, recipe, "wrong-token")
        assert "moray-root.json: access denied" in refused(drill, recipe, "no-rights")
        assert "the bucket does not exist" in refused(drill, recipe, "no-bucket")
        assert "does not respond" in refused(drill, recipe, "away")
        assert "another program answers there" in refused(drill, recipe, "not-ray")
        assert "line 3: unknown field 'stoer' hint: did you mean 'store'?" in refused(drill, recipe, "typo")
        assert "unknown cluster 'dril' hint: did you mean 'drill'?" in refused(drill, recipe, "dril")
        assert stored_keys(drill) == []
