"""dedup and the other dedup steps in tasks of a real Ray, and `moray explain` for their decisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moray.pipelines.dedup import dedup_index, phases
from moray.pipelines.shared.document_history import explain_in
from moray.pipelines.shared.documents import read_shard
from moray.platform.core.cluster import Cluster
from moray.platform.core.home import Home
from moray.platform.plan.recipe import parse_recipe
from moray.platform.run.runner import Runner
from tests.pipelines.dedup.test_step import near_texts

DEDUP = """
name: tasks
steps:
  corpus: {{with: {{shard_bytes: 9000, sources: [{{name: s, path: "{folder}", include: ["*.jsonl"], reader: jsonl}}]}}}}
  dedup: {{inputs: {{documents: corpus}}}}
"""
RECIPE = """
name: more
steps:
  corpus: {{with: {{shard_bytes: 4000, sources: [{{name: s, path: "{folder}", include: ["*.jsonl"], reader: jsonl}}]}}}}
  dedup-urls: {{inputs: {{documents: corpus}}, with: {{key: path}}}}
  dedup-parts: {{inputs: {{documents: dedup-urls}}, with: {{unit: substring, tokens: 30, min_words: 5}}}}
"""


def test_small_inputs_give_the_same_result_in_tasks(
    tmp_path: Path, ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small phases run in the process of the run; here each is a task, too."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": one.text}) for one in near_texts(120)]
    (folder / "texts.jsonl").write_text("\n".join(lines + lines[:5]))
    recipe = parse_recipe(DEDUP.format(folder=folder), Path("dedup.yaml"), ())
    found = []
    for name in ("here", "tasks"):
        if name == "tasks":
            for limit in ("_FEW_DOCUMENTS", "_FEW_BYTES", "_EDGES"):
                monkeypatch.setattr(phases, limit, 0)
            monkeypatch.setattr(phases, "_FILE_PAIRS", 50)
            monkeypatch.setattr(phases, "_GROUP_CHARACTERS", 5_000)
            monkeypatch.setattr(dedup_index, "_RANGE_ENTRIES", 50)
        home = Home(tmp_path / name)
        home.root.mkdir()
        result = Runner(home, ray_cluster, []).run(recipe).steps["dedup"].artifact
        removed = [row for path in sorted(result.folder.glob("removed-*")) for row in read_shard(path).to_pylist()]
        found.append((removed, result.manifest.counts))
    assert found[0] == found[1]
    assert found[0][1]["exact"] == 5
    assert found[0][1]["near"] > 20


def test_steps_run_on_ray_and_explain_shows_their_decisions(home: Home, tmp_path: Path, ray_cluster: Cluster) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    shared = " ".join(f"shared{i}" for i in range(40))
    own = [" ".join(f"own{number}x{i}" for i in range(60)) for number in range(12)]
    for number, text in enumerate(own):
        lines = [{"text": f"{text}. {shared}." if number in (3, 7) else text}, {"text": shared if number == 9 else ""}]
        (folder / f"{number:02d}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    recipe = parse_recipe(RECIPE.format(folder=folder), Path("more.yaml"), ())
    result = Runner(home, ray_cluster, []).run(recipe)
    counts = result.steps["dedup-parts"].artifact.manifest.counts
    assert counts["in:documents"] == 13
    assert (counts["edited"], counts["dropped:nothing_left"]) == (1, 1)
    assert result.steps["dedup-urls"].artifact.manifest.counts["unreadable:url"] == 13
    bare = explain_in(home, "s/09.jsonl#1")
    assert [one.verdict for one in bare.decisions] == ["read", "kept", "removed"]
    last = bare.decisions[-1].details
    assert last["reason"] == "nothing_left"
    assert "own" in bare.others[last["partner"]]["begins"], "the document that has what was cut"
    explained = [explain_in(home, f"s/{name}.jsonl#0") for name in ("03", "07")]
    edited = [one for found in explained for one in found.decisions if one.verdict == "has"]
    assert len(edited) == 1
    assert edited[0].details["characters"] - edited[0].details["characters_after"] == len(shared)
