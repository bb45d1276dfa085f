"""Chat templates as models have them, and a server for them over random weights."""

# ruff: noqa: RUF001
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastapi.testclient import TestClient

from moray.models.compiled import CompiledModel
from moray.models.model import DeepseekV3
from moray.models.presets import PRESETS
from moray.pipelines.serve.async_engine import AsyncEngine
from moray.pipelines.serve.chat_prompt import Chat
from moray.pipelines.serve.chat_template import ChatTemplate
from moray.pipelines.serve.detokenizer import ServingVocabulary
from moray.pipelines.serve.engine import Engine
from moray.pipelines.serve.openai_api import build_serving_app
from moray.pipelines.serve.scheduler import EngineLimits
from moray.pipelines.shared.chat_files import PLAIN_CHAT
from moray.pipelines.tokenizer.train import TokenizerConfig, train_tokenizer
from tests.native import NATIVE

MARKS = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"] + [
    f"<｜{name}｜>" for name in ("tool▁calls▁begin", "tool▁calls▁end", "tool▁call▁begin", "tool▁call▁end", "tool▁sep")
]
# As DeepSeek-R1: reasoning first, calls as fenced JSON.
REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}"
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name }}\n```json\n"
    "{{ c.function.arguments }}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{% endfor %}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% if not brief %}<think>\n{% endif %}{% endif %}"
)
# As DeepSeek-V3.1: calls without a fence.
DIRECT = REASONING.replace(
    "function<｜tool▁sep｜>{{ c.function.name }}\n```json\n", "{{ c.function.name }}<｜tool▁sep｜>"
)
DIRECT = (
    DIRECT.replace("\n```<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>").replace("<think>\n", "").replace("</think>", "@")
)
PLAIN = PLAIN_CHAT.read_text()
TEXT = 'In the beginning was the word. {"a": 1, "name": [true, null]} Grüße 🙂 def main(argument): return 42\n'


def chat_vocabulary(ends: tuple[int, ...] = (1,)) -> ServingVocabulary:
    tokenizer = train_tokenizer(iter([TEXT] * 20), TokenizerConfig(vocab_size=380))
    tokenizer.add_special_tokens(MARKS)
    return ServingVocabulary(tokenizer, bos=0, eos=1, ends=ends)


def chat_engine(vocabulary: ServingVocabulary, context: int = 1024) -> Engine:
    """Random weights of the usual size, so that any token may come."""
    size = len(vocabulary.pieces)
    config = replace(PRESETS["tiny"], vocab_size=size, num_hidden_layers=2, max_position_embeddings=context)
    model = DeepseekV3(config).eval()
    model.init_weights(seed=3)
    return Engine(CompiledModel.of(model, NATIVE), vocabulary, EngineLimits(step_tokens=256, max_running=16))


def chat_form(vocabulary: ServingVocabulary, template: str | None) -> Chat:
    if template is None:
        return Chat(vocabulary)
    names = {"bos_token": vocabulary.label(0), "eos_token": vocabulary.label(1)}
    return Chat(vocabulary, ChatTemplate({"default": template}, names))


@contextmanager
def chat_client(engine: Engine, template: str | None) -> Iterator[TestClient]:
    app = build_serving_app(AsyncEngine(engine), "tiny", chat=chat_form(engine.vocabulary, template))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
