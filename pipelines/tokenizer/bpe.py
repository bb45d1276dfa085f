"""Training of a byte-level BPE with Hugging Face `tokenizers`, in a child process.

The library reports progress only by printing JSON lines, and cannot be cancelled. A child process makes it possible to
read these lines and to kill the training. Texts are sent to the child's standard input as an Arrow stream.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from moray.platform.core.errors import StepFailed

_LONGEST_WORD = 1000  # characters; the trainer's time is quadratic in the length of a word
_BATCH = 256  # texts per Arrow batch
_SCHEMA = pa.schema([pa.field("text", pa.large_string())])
Progress = Callable[[str, int, int], None]


def train_in_subprocess(
    texts: Iterable[str],
    pattern: Sequence[str],
    vocab_size: int,
    special: Sequence[str],
    path: Path,
    progress: Progress,
) -> None:
    """Writes the trained tokenizer.json to `path`. Calls `progress` with (stage, done, total).

    Raises StepFailed with the child's output if it fails. An exception in `progress` or `texts` kills the child.
    """
    settings = json.dumps([list(pattern), vocab_size, list(special), str(path)])
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "moray.pipelines.tokenizer.bpe", settings],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output: deque[str] = deque(maxlen=20)
    stages: dict[str, tuple[int, int]] = {}
    listener = threading.Thread(target=_listen, args=(child.stdout, output, stages), daemon=True)
    listener.start()
    try:
        _send(child, texts)
        while listener.is_alive():
            listener.join(0.2)
            for stage, (done, total) in list(stages.items()):
                progress(stage, done, total)
        if child.wait():
            raise StepFailed(f"tokenizer training failed with exit code {child.returncode}: {' | '.join(output)}")
    finally:
        child.kill()
        child.wait()
        listener.join()
        if child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()


def _send(child: subprocess.Popen[bytes], texts: Iterable[str]) -> None:
    """Sends all texts, or fewer if the child dies."""
    assert child.stdin is not None
    iterator = iter(texts)
    try:
        with pa.ipc.new_stream(child.stdin, _SCHEMA) as stream:
            while batch := list(itertools.islice(iterator, _BATCH)):
                stream.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=_SCHEMA))
        child.stdin.close()
    except BrokenPipeError:
        child.wait()  # the caller reports its exit code and output


def _listen(lines: IO[bytes], output: deque[str], stages: dict[str, tuple[int, int]]) -> None:
    """Records the progress of each stage in `stages`, and lines that are not JSON in `output`."""
    for line in lines:
        try:
            event = json.loads(line)
            stages[event["stage"].lower()] = (event["current"], event["total"])
        except (ValueError, TypeError, KeyError):
            output.append(line.decode(errors="replace").strip())


def train_bpe(
    texts: Iterator[str], pattern: Sequence[str], vocab_size: int, special: Sequence[str], loud: bool = False
) -> Any:
    """A trained `tokenizers.Tokenizer`, special tokens first. loud: print progress.

    Text that the pattern does not split, such as 200 KB of line ends, would be one word for the trainer. Such words are
    split during training only. Shorter words are unchanged, so the trainer learns the same from them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    splits = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in pattern]
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{_LONGEST_WORD}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=loud,
        progress_format="json" if loud else "silent",
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    return tokenizer


def main() -> None:
    pattern, vocab_size, special, path = json.loads(sys.argv[1])
    with pa.ipc.open_stream(sys.stdin.buffer) as stream:
        texts = (text.as_py() for batch in stream for text in batch.column(0))
        train_bpe(texts, pattern, vocab_size, special, loud=True).save(path)


if __name__ == "__main__":
    main()
