import json
import subprocess
import sys
from pathlib import Path

import pytest

from moray.pipelines.serve.step import Reply, SmokeServeConfig, closing_text, step
from moray.platform.store.artifacts import ArtifactStore
from tests.step_contexts import context_for, manifest_of


def test_planning_needs_nothing_heavy():
    """In a new process, because this one has imported everything."""
    code = (
        "import sys, moray.pipelines.serve.step\n"
        "print([name for name in ('torch', 'ray', 'fastapi', 'openai', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


def test_the_config_is_checked():
    with pytest.raises(ValueError, match="max_tokens"):
        SmokeServeConfig(max_tokens=0)
    with pytest.raises(ValueError, match="prompts"):
        SmokeServeConfig(prompts=())


def test_decoding_speed_leaves_the_first_token_out():
    reply = Reply("p", "t", "length", 2, 11, seconds=3.0, streamed=True, first_token_seconds=1.0)
    assert reply.tokens_per_second == pytest.approx(5.0)
    assert Reply("p", "t", "length", 2, 11, seconds=3.0).tokens_per_second is None


def test_the_closing_text_shows_prompt_and_answer():
    text = closing_text("tiny", [Reply("In the", " beginning\nwas", "length", 2, 3, 0.1)])
    assert text == "over HTTP, tiny continues 'In the':\n  | In the beginning\n  | was\n"


def commit(store: ArtifactStore, step_name: str, produces: str, fingerprint: str):
    return store.commit(manifest_of(step_name, fingerprint, produces))


def test_a_registered_model_answers_over_http(ray_cluster, home, model, tokenizer, tmp_path, capfd):
    from moray.models import checkpoint

    store = ArtifactStore(home)
    folder = store.prepare("export", "ab12", keep_leftovers=False)
    checkpoint.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    exported = commit(store, "export", "model", "ab12")
    registration = store.prepare("register", "cd34", keep_leftovers=False)
    (registration / "registration.json").write_text(json.dumps({"model": exported.reference, "name": "tiny"}))
    registered = commit(store, "register", "registration", "cd34")
    (tmp_path / "out").mkdir()
    context = context_for(
        "smoke-serve",
        SmokeServeConfig(max_tokens=8),
        {"model": registered},
        tmp_path / "out",
        home,
        tmp_path / "run",
        ray_cluster,
    )
    step.run(context)
    transcript = json.loads((tmp_path / "out" / "transcript.json").read_text())
    assert [reply["streamed"] for reply in transcript["concurrent"]] == [True, False, False, False]
    assert transcript["batch_invariant"] is True
    assert transcript["tokens_per_second"] > 0
    assert context.counts["in:requests"] == 8
    assert context.counts["out:tokens"] == sum(
        reply["completion_tokens"] for reply in transcript["concurrent"] + transcript["alone"]
    )
    assert (tmp_path / "out" / "closing.txt").read_text().startswith("over HTTP, tiny continues")
    assert "first token after" in context.outcome
    assert capfd.readouterr() == ("", "")
