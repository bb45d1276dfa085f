"""The same work on the same bytes has the same address; nothing else does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moray.platform.plan.config import StepConfig, added
from moray.platform.plan.fingerprint import Address, addresses, hash_external, identity
from moray.platform.plan.recipe import parse_recipe
from moray.platform.plan.step import ExternalFile
from tests.pipelines.pretrain.settings import pretrain_config

TEXT = """
name: demo
steps:
  corpus:
    with:
      shard_bytes: 1000
      sources: [{name: here, path: %s}]
  filter: {inputs: {documents: corpus}}
"""


def address(folder: Path, *overrides: str) -> dict[str, str]:
    recipe = parse_recipe(TEXT % folder, Path("demo.yaml"), overrides)
    return {key: found.fingerprint for key, found in addresses(recipe).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "b.txt").write_text("two")
    return tmp_path / "in"


def test_content_counts_and_time_and_place_do_not(folder: Path, tmp_path: Path) -> None:
    before = address(folder)
    os.utime(folder / "a.txt", (1, 1))
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert address(moved) == before


@pytest.mark.parametrize("change", ["content", "name", "new", "gone"])
def test_a_changed_file_changes_its_step_and_all_after_it(folder: Path, change: str) -> None:
    before = address(folder)
    match change:
        case "content":
            (folder / "a.txt").write_text("0ne")
        case "name":
            (folder / "a.txt").rename(folder / "c.txt")
        case "new":
            (folder / "c.txt").write_text("")
        case "gone":
            (folder / "a.txt").unlink()
    after = address(folder)
    assert after["corpus"] != before["corpus"]
    assert after["filter"] != before["filter"]


def test_a_config_field_changes_its_step_and_all_after_it_only(folder: Path) -> None:
    before, after = address(folder), address(folder, "filter.min_words=9")
    assert after["corpus"] == before["corpus"]
    assert after["filter"] != before["filter"]


def test_operational_fields_do_not_count() -> None:
    one, other = (
        pretrain_config(steps=5, workers=2),
        pretrain_config(steps=5, workers=4, data_workers=3, checkpoint_every=1),
    )
    assert identity(one) == identity(other)
    assert identity(one) != identity(pretrain_config(steps=6))


names = st.text(min_size=1, max_size=5)
files = st.lists(st.builds(ExternalFile, names, names, st.integers(0, 9), names), max_size=5)


@given(files, st.randoms())
def test_the_order_in_which_files_are_found_does_not_count(found: list[ExternalFile], random: object) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert hash_external(shuffled) == hash_external(found)
    assert hash_external([*found, ExternalFile("s", "k", 1, "h")]) != hash_external(found)


@pytest.mark.parametrize(
    ("settings", "fingerprint"),
    [
        ({"steps": 5}, "38c392d05640c5a12cccd908e7c5cd4b"),
        (
            {
                "steps": 200, "model": {"preset": "tiny", "hidden_size": 64}, "precision": "fp8", "moments": "fp8",
                "beta2": 0.9, "clip": 0.5, "spikes": {"sigmas": None}, "workers": 4, "checkpoint_every": 3,
            },
            "56fb96e0f94e400495dd0d45dff37dce",
        ),
    ],
)  # fmt: skip
def test_results_of_pretraining_before_it_had_sections_are_still_found(settings: Any, fingerprint: str) -> None:
    config = identity(pretrain_config(**settings))
    assert Address("pretrain", 4, config, {"tokens": "0" * 32}, {}).fingerprint == fingerprint


def test_a_field_that_was_added_later_counts_only_if_it_is_set() -> None:
    class Added(StepConfig):
        old: int = 1
        new: str = added("none")

    assert identity(Added()) == {"old": 1}
    assert identity(Added(new="other")) == {"old": 1, "new": "other"}
