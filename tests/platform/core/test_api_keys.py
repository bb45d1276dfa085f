"""Keys: made once, kept as hashes, revoked; and which servers need them."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from moray.platform.core.api_keys import (
    PAGE,
    add_key,
    check_guarded,
    hash_key,
    is_loopback,
    page_key,
    read_keys,
    revoke_key,
    served_keys,
)
from moray.platform.core.errors import InputError
from moray.platform.core.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_a_key_is_kept_as_a_hash_that_only_its_owner_reads(home: Home) -> None:
    key, text = add_key(home, "ci", requests=60, tokens=1000)
    assert text.startswith("mk-")
    assert text not in home.keys.read_text()
    assert home.keys.stat().st_mode & 0o077 == 0
    assert read_keys(home) == [key]
    assert (key.sha256, key.requests, key.tokens) == (hash_key(text), 60, 1000)
    assert add_key(home, "other")[1] != text


def test_a_revoked_key_is_listed_and_not_served(home: Home) -> None:
    assert served_keys(home) is None
    add_key(home, "ci")
    assert [key.name for key in served_keys(home) or []] == ["ci"]
    assert revoke_key(home, "ci").revoked
    assert served_keys(home) == []  # not None: a server does not open when its last key is revoked
    assert [key.name for key in read_keys(home)] == ["ci"]
    with pytest.raises(InputError, match="no valid key 'ci'"):
        revoke_key(home, "ci")
    add_key(home, "ci")  # the name is free again
    assert len(read_keys(home)) == 2


def test_the_page_has_a_key_of_its_own(home: Home) -> None:
    assert page_key(home) == ""
    home.token.write_text("secret\n")
    assert served_keys(home) is None
    add_key(home, "ci")
    assert [key.name for key in served_keys(home) or []] == ["ci", PAGE]
    assert (served_keys(home) or [])[-1].sha256 == hash_key(page_key(home))
    assert "secret" not in page_key(home)


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, PAGE, "é", "a/b"])
def test_names_that_cannot_be(home: Home, name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name"):
        add_key(home, name)
    assert not home.keys.exists()


def test_bad_limits_and_a_name_that_is_taken(home: Home) -> None:
    with pytest.raises(InputError, match="--rpm -1"):
        add_key(home, "a", requests=-1)
    add_key(home, "a")
    with pytest.raises(InputError, match="a key 'a' exists"):
        add_key(home, "a")


@pytest.mark.parametrize("content", ["{", "{}", '[{"name": 5}]'])
def test_a_file_that_is_none_is_an_error_and_is_kept(home: Home, content: str) -> None:
    home.keys.write_text(content)
    for work in (read_keys, served_keys, lambda home: add_key(home, "a")):
        with pytest.raises(InputError, match="not a list of keys"):
            work(home)
    assert home.keys.read_text() == content


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("", False),
     ("::", False), ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_may_be_without_keys(home: Home, host: str, local: bool) -> None:
    assert is_loopback(host) == local
    if local:
        check_guarded(home, host)
        return
    with pytest.raises(InputError, match="requests need keys"):
        check_guarded(home, host)
    add_key(home, "a")
    check_guarded(home, host)
    revoke_key(home, "a")
    with pytest.raises(InputError, match="requests need keys"):
        check_guarded(home, host)


def _add(root: str, number: int) -> None:
    add_key(Home(Path(root)), f"key-{number}")


def test_keys_that_are_made_at_once_are_all_kept(home: Home) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_add, [(str(home.root), number) for number in range(12)])
    assert sorted(key["name"] for key in json.loads(home.keys.read_text())) == sorted(f"key-{n}" for n in range(12))
