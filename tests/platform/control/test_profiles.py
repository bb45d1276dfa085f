"""Profiles of clusters: every mistake is one error that names file, line and field, and nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from moray.platform.control.profiles import (
    SHIPPED,
    Profile,
    add_profile,
    known_names,
    load_profile,
    new_profile,
    parse_profile,
    parse_variables,
)
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home

GOOD = "kind: existing\naddress: http://head:8265/\nstore: s3://bucket/prefix/\n"


def parsed(text: str) -> Profile:
    return parse_profile(text, Path("lab.yaml"))


def test_a_profile_is_written_read_and_listed(home: Home) -> None:
    path = add_profile(home, "lab", {"kind": "existing", "address": "http://head:8265", "store": "/mnt/store"})
    assert path == home.root / "clusters" / "lab.yaml"
    profile = load_profile(home, "lab")
    assert (profile.address, profile.store, profile.slots) == ("http://head:8265", "/mnt/store", 4)
    assert known_names(home) == ["local", "lab"]
    with pytest.raises(InputError, match="cluster 'lab' exists already"):
        add_profile(home, "lab", {"kind": "existing", "address": "http://head:8265", "store": "/mnt/store"})
    add_profile(home, "lab", {"kind": "existing", "address": "http://other:1", "store": "/mnt/store"}, replace=True)
    assert load_profile(home, "lab").address == "http://other:1"


def test_the_shipped_example_is_valid() -> None:
    example = (SHIPPED / "existing.yaml.example").read_text()
    assert parsed(example).kind == "existing"
    assert {line.split(":")[0].lstrip("# ") for line in example.splitlines()} >= set(Profile.model_fields)


def test_slashes_at_the_end_and_numbers_are_accepted() -> None:
    profile = parsed(GOOD + "environment: {OMP_NUM_THREADS: 1}\n")
    assert (profile.address, profile.store) == ("http://head:8265", "s3://bucket/prefix")
    assert profile.variables() == {"OMP_NUM_THREADS": "1", "MORAY_ARTIFACTS": "s3://bucket/prefix"}


def test_references_are_resolved_when_used_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", "a-secret-token")
    monkeypatch.setenv("LAB_KEY", "a-key")
    profile = parsed(GOOD + "token: ${env:LAB_TOKEN}\nenvironment: {KEY: '${env:LAB_KEY}'}\n")
    assert profile.token is not None
    assert profile.token.reveal() == "a-secret-token"
    assert profile.variables()["KEY"] == "a-key"
    assert "a-secret-token" not in repr(profile)
    assert "a-key" not in repr(profile)


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        (GOOD.replace("address", "adress"), "lab.yaml, line 2: unknown field 'adress'", "address"),
        (GOOD.replace("store: s3://bucket/prefix/\n", ""), "store is missing", "docs/clusters.md"),
        (GOOD.replace("http://head:8265/", "head:8265"), "line 2: address: must be the address of Ray's dashboard", ""),
        (GOOD.replace("s3://bucket/prefix/", "bucket"), "line 3: store: must be s3://bucket/prefix", ""),
        (GOOD + "slots: 0\n", "line 4: slots: ", ""),
        (GOOD + "token: plain-text\n", "token: a secret must be a reference", "${env:NAME}"),
        (GOOD + "token: ${env:NOT_SET_ANYWHERE}\n", "NOT_SET_ANYWHERE is not set", "export"),
        (GOOD + "environment: {A: '${env:NOT_SET_ANYWHERE}'}\n", "NOT_SET_ANYWHERE is not set", "export"),
        (GOOD + "environment: {MORAY_ARTIFACTS: s3://x/y}\n", "MORAY_ARTIFACTS: use `store`", ""),
        (GOOD.replace("existing", "slurm"), "kind 'slurm' is not available yet", "kind: existing"),
        (GOOD.replace("existing", "kubernetes"), "line 1: kind: ", ""),
        ("- a list", "a profile is a mapping", ""),
        ("a: [", "not valid YAML", ""),
        ("", "a profile is a mapping", ""),
    ],
)
def test_a_mistake_is_one_error(text: str, error: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        parsed(text)
    assert "lab.yaml" in caught.value.message
    assert error in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("name", ["local", "embedded", "Lab", "../lab", ""])
def test_a_name_that_cannot_be_is_refused(home: Home, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a cluster"):
        add_profile(home, name, {"kind": "existing", "address": "http://head:8265", "store": "/mnt/store"})
    assert not (home.root / "clusters").exists()


def test_an_unknown_cluster_names_the_nearest(home: Home) -> None:
    add_profile(home, "lab", {"kind": "existing", "address": "http://head:8265", "store": "/mnt/store"})
    with pytest.raises(InputError, match="unknown cluster 'lob'") as caught:
        load_profile(home, "lob")
    assert "lab" in caught.value.hint
    with pytest.raises(InputError, match=r"unknown cluster '\.\./lab'"):
        load_profile(home, "../lab")


def test_variables_of_the_command_line() -> None:
    assert parse_variables(["A=1", "B=x=y", "C="]) == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(InputError, match="is not NAME=VALUE"):
        parse_variables(["A"])
    assert new_profile("http://head:1", "s3://b/p").store == "s3://b/p"
