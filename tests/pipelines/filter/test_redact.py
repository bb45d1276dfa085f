"""PII redaction: what is redacted, what only looks like PII, and that the time is linear in the length of the text."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moray.pipelines.filter import keys
from moray.pipelines.filter.redact import KINDS, _luhn, redact
from tests.examples import examples

SHOWN = {
    "email": ("joe.doe+tag@mail.example.co.uk", "ANNA@firma.de", "x_y%z@sub-domain.org", "j\u00f6rg@m\u00fcller.de"),
    "ip": ("8.8.200.8", "93.184.216.34", "2001:4860:4860::8888", "2A00:1450:4001:0:0:0:0:200E"),
    "phone": ("+49 30 901820", "+1 415-555-2671", "+44 20 7031 3000", "+33142685300"),
    "card": ("4111 1111 1111 1111", "5500-0055-5555-5559", "378282246310005", "3782 822463 10005", "6011000990139424"),
    "key": (
        "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "github_pat_11ABCDEFG0abcdefghijkl_x",
        "glpat-abcdefghij0123456789",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx8mM4aKc3Wk7h0MI\nIBAAKCAQE=\n-----END RSA PRIVATE KEY-----",
    ),
}  # fmt: skip
KEPT = (
    # no one's address, or none
    "git@github.com:ray-project/ray.git", "@app.route('/x')", "icon@2x.png", "left-pad@1.3.0", "a @ b.c",
    "user@localhost",
    # private and documentation addresses, versions, times, names in code
    "10.0.0.1 192.168.1.1 127.0.0.1 0.0.0.0", "version 1.2.3.4", "v4.18.0.553", "numpy==1.2.3.4",
    "Chrome/91.0.4472.124",
    "see 8.4.2.1 of it", "2002::/16", "1.2.3.4.5", "256.1.1.1", "01.02.03.04", "1.2.3.4-rc1", "fe80::1 ::1 2001:db8::1",
    "a::b std::vector dead::beef",
    "12:34:56 00:1a:2b:3c:4d:5e",
    # digits
    "4111 1111 1111 1112", "0000 0000 0000 0000", "1234567890123", "3.14159265358979323846", "41111111111111111111111",
    "2026-11-26 10:12:13", "+1 +2 +3", "x = +123456", "1 2 3 4 5 6 7 8 9 10",
    # names and hashes that are no keys
    "token = settings.DEFAULT_TOKEN_NAME_FOR_ALL", "key: aaaaaaaaaaaaaaaaaaaaaaaa11", "monkey=1", "sk-learn",
    "ghp_short",
    "if line == '-----BEGIN PRIVATE KEY-----':\n    end = '-----END PRIVATE KEY-----'",
    "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SHOWN.items() for text in texts])
def test_pii_is_redacted_and_counted(kind: str, text: str) -> None:
    for before, after in (("", ""), ("at ", " ."), ("(", ")"), ("\n", "\n"), ("'", "'"), ("\u4e2d ", ", x")):
        redacted, counts = redact(before + text + after, KINDS)
        assert redacted == f"{before}<{kind}>{after}"
        assert {name: n for name, n in counts.items() if n} == {kind: 1}
    others = [other for other in KINDS if other != kind]
    if kind != "key":  # a key may hold what looks like another kind
        assert redact(text, others)[0] == text


@pytest.mark.parametrize("text", KEPT)
def test_text_that_only_resembles_pii_is_kept(text: str) -> None:
    assert redact(text, KINDS, ("US", "DE"))[0] == text


def test_a_random_value_is_a_key_after_a_name_such_as_api_key() -> None:
    value = "Zx81kdJ3mQp0vT6yBn4LcR7s"
    assert redact(value, KINDS)[0] == value
    for before in ("api_key = '", 'SECRET: "', "x-auth-token=", '"accessKey": "'):
        assert redact(before + value, KINDS)[0] == before + "<key>"


def test_four_numbers_are_an_address_after_a_name_such_as_host() -> None:
    assert redact("host=93.184.216.34", KINDS)[0] == "host=<ip>"
    assert redact("http://93.184.216.34/index", KINDS)[0] == "http://<ip>/index"
    assert redact("http://8.8.8.8/index", KINDS)[0] == "http://<ip>/index"
    assert redact("server: 9.9.9.9", KINDS)[0] == "server: <ip>"
    assert redact("2001:4860:4860::8888: unreachable", KINDS)[0] == "<ip>: unreachable"


def test_phone_numbers_without_a_country_code_are_found_in_the_regions_of_the_recipe() -> None:
    for text in ("(650) 253-0000", "650-253-0000"):
        assert redact(f"call {text}.", KINDS)[0] == f"call {text}."
        assert redact(f"call {text}.", KINDS, ("US",))[0] == "call <phone>."
    assert redact("6502530000", KINDS, ("US",))[0] == "6502530000", "bare digits are anything"


PARTS = ("@", ".", ":", "-", "+", " ", "\n", "1", "42", "2001", "a", "f", "eyJ", "key=", "<email>", "<ip>",
    *(text for texts in SHOWN.values() for text in texts),
)  # fmt: skip


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=25), st.sampled_from([" ", "\n", ", "]))
def test_redacted_text_has_nothing_left_to_redact(parts: list[str], between: str) -> None:
    text = between.join(parts)
    redacted, counts = redact(text, KINDS)
    assert (redacted == text) == (sum(counts.values()) == 0)
    again, more = redact(redacted, ("email", "card"))
    assert again == redacted
    assert not sum(more.values())
    assert redact(text, ()) == (text, {})


@settings(max_examples=examples(100), deadline=None)
@given(st.text(string.digits, min_size=11, max_size=18))
def test_one_digit_in_ten_completes_a_card(digits: str) -> None:
    """And no two: a single wrong digit is found (ISO/IEC 7812-1)."""
    complete = [last for last in string.digits if _luhn(digits + last)]
    assert len(complete) == (len(set(digits)) > 1 or complete != [])
    for last in complete:
        wrong = str((int(digits[0]) + 1) % 10) + digits[1:]
        assert not _luhn(wrong + last)


@pytest.mark.parametrize(
    "piece",
    ["@", "a@a.", "a.", "1.", "11.1.1.1 ", "::", "eyJaaaaaaaa.", "key=a1b2", "+1", "4111-", "sk-",
     "-----BEGIN PRIVATE KEY-----\n-----END X", "-----BEGIN PRIVATE KEY-----\n", "-----END PRIVATE KEY-----\n"],
)  # fmt: skip
@pytest.mark.parametrize("end", ["", "-----END PRIVATE KEY-----", "a" * 40 + "-----END RSA PRIVATE KEY-----"])
def test_the_time_of_adversarial_texts_is_linear(piece: str, end: str) -> None:
    text = piece * (250_000 // len(piece)) + end  # squared, that would be hours
    assert len(redact(text, KINDS)[0]) <= len(text)


def test_the_search_for_private_keys_scans_each_position_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with many begin lines before an end line. Counts the characters that searches scan."""
    walked = 0

    class Counted:
        def __init__(self, pattern: re.Pattern[str]) -> None:
            self.pattern = pattern

        def search(self, text: str, at: int = 0, end: int = 1 << 60) -> re.Match[str] | None:
            nonlocal walked
            found = self.pattern.search(text, at, end)
            walked += (found.end() if found else min(end, len(text))) - at
            return found

    for name in ("_BEGIN", "_END", "_BODY"):
        monkeypatch.setattr(keys, name, Counted(getattr(keys, name)))
    for text in (
        "-----BEGIN PRIVATE KEY-----\n" * 3000 + "-----END PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n" * 3000 + "a" * 40 + "\n-----END PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\n-----END X" * 3000 + "-----END PRIVATE KEY-----",
    ):
        walked = 0
        list(keys.find_secret_keys(text))
        assert walked <= 5 * len(text)
