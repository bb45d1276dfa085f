"""Models to deploy, and clients that keep asking them while something happens to the server."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from moray.platform.store.artifacts import ArtifactStore
from moray.platform.store.manifest import hash_folder
from tests.step_contexts import manifest_of


@cache
def _tokenizer() -> Any:
    from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer

    return train_tokenizer(iter(["In the beginning was the word, and the word was written down. "] * 20),
                           TokenizerConfig(vocab_size=300))  # fmt: skip


def add_model(store: ArtifactStore, fingerprint: str, seed: int = 3, alias: str = "") -> str:
    """An artifact with a tiny model of random weights; returns its reference. alias: NAME, for NAME@newest."""
    from moray.models import checkpoint
    from moray.models.model import DeepseekV3
    from moray.models.presets import PRESETS
    from moray.pipelines.tokenizer.train import BOS, EOS, PAD

    tokenizer = _tokenizer()
    config = replace(
        PRESETS["tiny"],
        vocab_size=tokenizer.get_vocab_size(),
        num_hidden_layers=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = DeepseekV3(config).eval()
    model.init_weights(seed=seed)
    folder = store.prepare("export", fingerprint, keep_leftovers=False)
    checkpoint.save(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    files = hash_folder(folder)
    address = {"step": "export", "version": 1, "config": {}, "inputs": {}, "external": {}}
    manifest = manifest_of(
        "export", fingerprint, "model", files=files, bytes=sum(file.size for file in files), address=address
    )
    reference = store.commit(manifest).reference
    if alias:
        store.aliases.set(alias, "newest", reference)
    return reference


@dataclass
class Load:
    """Clients that ask a model until the block ends; every second one streams.

    retries: of the openai client. counts: requests by their outcome: `whole`, `stream`, `cut` (an error after the first
    byte), `failed` (an error before), `truncated` (a stream that ended without finish reason and without error).
    """

    url: str
    model: str
    clients: int = 4
    retries: int = 0
    tokens: int = 48
    key: str = "none"
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    cut_errors: list[str] = field(default_factory=list)
    longest: float = 0.0

    def __enter__(self) -> Load:
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=[index]) for index in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def answered(self) -> int:
        return self.counts["whole"] + self.counts["stream"]

    def wait_for_more(self, answers: int = 8, seconds: float = 60.0) -> None:
        """Waits until so many more requests have been answered."""
        wanted, deadline = self.answered + answers, time.monotonic() + seconds
        while self.answered < wanted:
            assert time.monotonic() < deadline, f"{self.counts} {self.errors[-3:]}"
            time.sleep(0.05)

    def _ask(self, index: int) -> None:
        import openai

        client = openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=self.retries, timeout=60)
        while not self._end.is_set():
            began = time.monotonic()
            outcome = self._once(client, stream=index % 2 == 1)
            with self._lock:
                self.counts[outcome] += 1
                self.longest = max(self.longest, time.monotonic() - began)

    def _once(self, client: Any, stream: bool) -> str:
        import openai

        begun, reason = False, None
        try:
            answer = client.completions.create(
                model=self.model, prompt="In the", max_tokens=self.tokens, temperature=0, stream=stream
            )
            if not stream:
                return "whole"
            for chunk in answer:
                begun = True
                reason = chunk.choices[0].finish_reason or reason
        except openai.OpenAIError as error:
            (self.cut_errors if begun else self.errors).append(f"{type(error).__name__}: {error}")
            return "cut" if begun else "failed"
        return "stream" if reason else "truncated"
