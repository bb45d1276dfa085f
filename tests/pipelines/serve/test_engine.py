import random

import pytest
import torch

from moray.models.compiled import CompiledModel
from moray.models.eager import EagerModel
from moray.models.model import DeepseekV3
from moray.pipelines.serve.engine import ContextLengthError, Engine
from moray.pipelines.serve.scheduler import EngineLimits
from moray.pipelines.serve.sequence import Delta, Request
from tests.native import NATIVE

PROMPTS = ["In the beginning", "def main(", "こんにちは", "x", "Grüße aus Zürich, naïve café."]


def greedy_ids(model, ids: list[int], count: int) -> list[int]:
    """The reference: runs the model on the whole text for every token."""
    ids = list(ids)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def run(engine: Engine, requests: list[Request]) -> list[list[Delta]]:
    """The deltas of all requests, submitted at once."""
    sequences = [engine.submit(request) for request in requests]
    deltas: dict = {sequence: [] for sequence in sequences}
    while engine.busy:
        for output in engine.step():
            assert isinstance(output.result, Delta), output.result
            deltas[output.sequence].append(output.result)
    return [deltas[sequence] for sequence in sequences]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def greedy(vocabulary, text: str, max_tokens: int = 12, **options) -> Request:
    return Request(tuple(vocabulary.encode(text)), max_tokens, temperature=0.0, ignore_eos=True, **options)


def test_greedy_equals_the_whole_text_run_again_for_every_token(model, vocabulary, make_engine):
    request = greedy(vocabulary, "In the beginning was", 40)
    (deltas,) = run(make_engine(), [request])
    assert ids_of(deltas) == greedy_ids(model, [0, *request.prompt], 40)
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].generated == 40


def test_many_at_once_answer_as_each_alone(vocabulary, make_engine):
    requests = [greedy(vocabulary, text, 10 + 5 * place) for place, text in enumerate(PROMPTS)]
    together = run(make_engine(), requests)
    alone = [run(make_engine(), [request])[0] for request in requests]
    assert [ids_of(deltas) for deltas in together] == [ids_of(deltas) for deltas in alone]


def test_a_prompt_in_chunks_is_answered_as_in_one_piece(vocabulary, make_engine):
    request = greedy(vocabulary, "In the beginning was the word. " * 4, 8)
    whole = run(make_engine(EngineLimits(step_tokens=200, max_running=2, block_size=16)), [request])
    pieces = run(make_engine(EngineLimits(step_tokens=7, max_running=2, block_size=16)), [request])
    assert len(request.prompt) > 20
    assert ids_of(pieces[0]) == ids_of(whole[0])


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(vocabulary, make_engine):
    def request(seed: int) -> Request:
        return Request(tuple(vocabulary.encode("In the")), 16, temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True)

    alone = ids_of(run(make_engine(), [request(11)])[0])
    crowd = run(make_engine(), [request(4), request(11), greedy(vocabulary, "x"), request(11)])
    assert ids_of(crowd[1]) == ids_of(crowd[3]) == alone
    assert ids_of(crowd[0]) != alone


def test_without_a_seed_answers_differ(vocabulary, make_engine):
    request = Request(tuple(vocabulary.encode("In the")), 24, temperature=2.0, ignore_eos=True)
    first, second = run(make_engine(), [request, request])
    assert ids_of(first) != ids_of(second)


def test_the_end_of_the_document_stops_and_is_not_shown(model, vocabulary, make_engine, monkeypatch):
    request = greedy(vocabulary, "In the beginning", 20)
    ids = ids_of(run(make_engine(), [request])[0])
    engine = make_engine()
    monkeypatch.setattr(vocabulary, "ends", {ids[5]})
    stopped = Request(request.prompt, 20, temperature=0.0)
    (deltas,) = run(engine, [stopped])
    cut = ids.index(ids[5])
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].generated == cut + 1


def test_a_stop_string_across_tokens_ends_the_answer(vocabulary, make_engine):
    request = greedy(vocabulary, "In the beginning", 30)
    full = text_of(run(make_engine(), [request])[0])
    stop = full[5:9]
    engine = make_engine()
    (deltas,) = run(engine, [greedy(vocabulary, "In the beginning", 30, stop=(stop,))])
    assert text_of(deltas) == full[: full.find(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].generated < 30
    assert engine.pool.blocks_free == engine.pool.blocks


def test_no_delta_ends_within_a_code_point(vocabulary, make_engine):
    requests = [
        Request(tuple(vocabulary.encode("世界")), 60, temperature=1.5, seed=seed, ignore_eos=True) for seed in range(4)
    ]
    for deltas in run(make_engine(), requests):
        whole = b"".join(vocabulary.piece(index) for index in ids_of(deltas)).decode(errors="replace")
        assert text_of(deltas) == whole


def test_log_probabilities_equal_those_of_a_whole_forward(model, vocabulary, make_engine):
    """FP32 in another order of operations (absorbed attention, chunks): 1e-4 nats."""
    request = greedy(vocabulary, "In the beginning was the word.", 6, logprobs=3, echo=True)
    (deltas,) = run(make_engine(EngineLimits(step_tokens=9, max_running=2, block_size=16)), [request])
    tokens = [token for delta in deltas for token in delta.tokens]
    ids = [0, *(token.id for token in tokens)]
    assert tuple(ids[1 : 1 + len(request.prompt)]) == request.prompt
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens):
        assert token.logprob == pytest.approx(logprobs[place, token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(logprobs[place].topk(3).values.tolist(), abs=1e-4)
    text = text_of(deltas)
    assert text.startswith("In the beginning was the word.")


def test_echo_alone_reads_the_prompt_and_generates_nothing(vocabulary, make_engine):
    (deltas,) = run(make_engine(), [greedy(vocabulary, "In the beginning", 0, logprobs=0, echo=True)])
    assert text_of(deltas) == "In the beginning"
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].generated == 0
    assert all(token.logprob is not None for delta in deltas for token in delta.tokens)


def test_a_prompt_with_bos_gets_no_second(vocabulary, make_engine):
    plain = greedy(vocabulary, "In the", 8)
    with_bos = Request((0, *plain.prompt), 8, temperature=0.0, ignore_eos=True, logprobs=0, echo=True)
    first, second = run(make_engine(), [plain, with_bos])
    tokens = [token for delta in second for token in delta.tokens]
    assert [token.id for token in tokens][len(with_bos.prompt) :] == ids_of(first)
    assert tokens[0].logprob is None


def test_an_empty_prompt_starts_a_document(model, vocabulary, make_engine):
    (deltas,) = run(make_engine(), [greedy(vocabulary, "", 5)])
    assert ids_of(deltas) == greedy_ids(model, [0], 5)


def test_a_full_cache_makes_sequences_read_again_not_fail(vocabulary, make_engine):
    requests = [greedy(vocabulary, text, 30, logprobs=1, echo=True) for text in ("In the", "was the", "word")]
    alone = [run(make_engine(), [request])[0] for request in requests]
    engine = make_engine(blocks=4)  # 64 positions, of which each needs up to 34
    sequences = [engine.submit(request) for request in requests]
    lost, answers = 0, [[] for _ in requests]
    while engine.busy:
        computed = [sequence.computed for sequence in sequences]
        for output in engine.step():
            answers[sequences.index(output.sequence)].append(output.result)
        lost += sum(sequence.computed < before for sequence, before in zip(sequences, computed, strict=True))
    assert lost
    for found, expected in zip(answers, alone, strict=True):
        tokens = [[token for delta in deltas for token in delta.tokens] for deltas in (found, expected)]
        assert tokens[0] == tokens[1]  # scores too, to the bit
    assert engine.pool.blocks_free == 4


def test_a_request_that_can_never_fit_is_refused(vocabulary, make_engine):
    with pytest.raises(ContextLengthError, match=r"maximum context length is 256 tokens.*\(2 in the prompt, 255"):
        make_engine().submit(Request((5,), max_tokens=255))
    with pytest.raises(ContextLengthError, match="cache, which has 1 blocks of 16"):
        make_engine(blocks=1).submit(Request((5,), max_tokens=16))
    with pytest.raises(ValueError, match="id 340 is outside the vocabulary of 340"):
        make_engine().submit(Request((340,)))


def test_cancelling_frees_all_blocks_whether_running_or_waiting(vocabulary, make_engine):
    engine = make_engine(EngineLimits(step_tokens=16, max_running=2, block_size=16))
    sequences = [engine.submit(greedy(vocabulary, "In the beginning " * 3, 40)) for _ in range(4)]
    for _ in range(5):
        engine.step()
    assert engine.pool.blocks_free < engine.pool.blocks
    for sequence in sequences:
        engine.cancel(sequence)
        engine.cancel(sequence)  # twice is no error
    assert not engine.busy
    assert engine.pool.blocks_free == engine.pool.blocks


def test_a_thousand_random_requests_and_cancellations_leak_no_block(vocabulary, make_engine):
    """A cache for three answers at a time: many lose their blocks to others, and what was read is overwritten."""
    draw = random.Random(5)
    engine = make_engine(EngineLimits(step_tokens=24, max_running=6, block_size=16), blocks=7)
    alone = [ids_of(run(make_engine(), [greedy(vocabulary, text, 40)])[0]) for text in PROMPTS]
    preempted = 0
    for _ in range(1000):
        text, leader = draw.choice(PROMPTS), None
        for _ in range(draw.choice([0, 1, 1, 3])):  # choices of one prompt
            answer = engine.submit(greedy(vocabulary, text, draw.randint(1, 40)), leader)
            leader = leader or answer
        before = {one: one.computed for one in engine.sequences}
        engine.step()
        preempted += sum(one.computed < computed for one, computed in before.items() if not one.closed)
        while len(engine.sequences) > 9 or (engine.busy and draw.random() < 0.2):
            engine.cancel(draw.choice(engine.sequences))
        held = {block for one in engine.sequences for block in one.blocks}
        assert len(held) == engine.pool.blocks - engine.pool.blocks_free
    last = [engine.submit(greedy(vocabulary, text, 40)) for text in PROMPTS]
    while engine.busy:
        engine.step()
    assert [one.ids[one.prompt_length :] for one in last] == alone
    assert preempted > 50, preempted
    assert engine.pool.blocks_free == engine.pool.blocks


def test_cancelling_one_does_not_disturb_the_others(vocabulary, make_engine):
    expected = ids_of(run(make_engine(), [greedy(vocabulary, "In the", 20)])[0])
    engine = make_engine()
    kept, cancelled = (engine.submit(greedy(vocabulary, "In the", 20)) for _ in range(2))
    for _ in range(5):
        engine.step()
    engine.cancel(cancelled)
    while engine.busy:
        engine.step()
    assert kept.ids[kept.prompt_length :] == expected


def test_a_failure_ends_only_the_request_at_fault(vocabulary, make_engine, model, monkeypatch):
    engine = make_engine(eager=True)
    good = engine.submit(greedy(vocabulary, "In the", 10))
    bad = engine.submit(greedy(vocabulary, "was the", 10))
    forward = model.hidden_cached

    def failing(ids, positions, cache, tables, last_only=False):
        if any(bad.blocks and bad.blocks[0] in row for row in tables.tolist()) and bad.generated == 3:
            raise RuntimeError("broken on purpose")
        return forward(ids, positions, cache, tables, last_only=last_only)

    monkeypatch.setattr(model, "hidden_cached", failing)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    errors = [output for output in outputs if isinstance(output.result, Exception)]
    assert [(output.sequence, str(output.result)) for output in errors] == [(bad, "broken on purpose")]
    assert good.finish_reason == "length"
    assert good.ids[good.prompt_length :] == greedy_ids(model, good.ids[: good.prompt_length], 10)
    assert engine.pool.blocks_free == engine.pool.blocks


@pytest.mark.parametrize("eager", [False, True])
def test_a_value_that_is_not_finite_stays_in_its_request(vocabulary, model, eager):
    """The failed one's blocks are used again. Positions after a sequence's last have weight 0, which NaN ignores."""
    broken = DeepseekV3(model.config).eval()
    broken.load_state_dict(model.state_dict())
    embedding = next(view for name, view, _ in broken.logical_parameters() if "embed_tokens" in name)
    embedding[7] = float("nan")
    compiled = EagerModel(broken) if eager else CompiledModel.of(broken, NATIVE)
    engine = Engine(compiled, vocabulary, EngineLimits(64, 8, 1, block_size=16))
    clean, bad = Request((9, 10, 11), 4, temperature=0.0, ignore_eos=True), Request((9, 7, 11, 12), 4, temperature=0.0)
    expected = run(engine, [clean])
    for _ in range(3):
        engine.submit(bad)
        assert [type(output.result) for output in engine.step()] == [FloatingPointError]
        assert run(engine, [clean]) == expected


def test_a_draw_that_fails_ends_only_its_own_request(vocabulary, make_engine, monkeypatch):
    from moray.pipelines.serve import engine as module

    sampled = module.sample

    def failing(logits_BV, draws):
        if any(draw.top_k == 3 for draw in draws):
            raise OverflowError("too large")
        return sampled(logits_BV, draws)

    monkeypatch.setattr(module, "sample", failing)
    engine = make_engine()
    sequences = [engine.submit(Request((9, 10), 5, seed=1, top_k=top_k, ignore_eos=True)) for top_k in (2, 3, 4)]
    failed = [output.sequence for output in engine.step() if isinstance(output.result, Exception)]
    assert failed == [sequences[1]]
    while engine.busy:
        engine.step()
    assert [one.generated for one in sequences] == [5, 0, 5]


def test_a_salt_separates_what_is_cached(vocabulary, make_engine):
    engine = make_engine()
    prompt = tuple(vocabulary.encode("In the beginning was the word. " * 4))
    cached = []
    for salt in ("", "a", "a", ""):
        one = engine.submit(Request(prompt, 1, temperature=0.0, cache_salt=salt))
        engine.step()
        cached.append(one.cached > 0)
        while engine.busy:
            engine.step()
    assert cached == [False, False, True, True]


def test_output_that_is_not_finite_is_an_error_not_a_token(vocabulary, make_engine, model, monkeypatch):
    engine = make_engine(eager=True)
    forward = model.hidden_cached
    monkeypatch.setattr(model, "hidden_cached", lambda *a, **k: forward(*a, **k) * float("nan"))
    engine.submit(greedy(vocabulary, "In the"))
    (output,) = engine.step()
    assert isinstance(output.result, FloatingPointError)
    assert not engine.busy
