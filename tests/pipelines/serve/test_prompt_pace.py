import pytest

from moray.pipelines.serve.prompt_pace import PromptPace


def settled(row: float, step: float, most: int = 512) -> int:
    """The rows after many steps of a machine that takes `step` and `row` for each row of a prompt."""
    pace = PromptPace()
    for _ in range(200):
        pace.note(step, 0)
        read = min(most, pace.rows)
        pace.note(step + row * read, read)
    return pace.rows


@pytest.mark.parametrize("step", [0.0, 0.001, 0.1])
@pytest.mark.parametrize(("row", "rows"), [(1e-4, 150), (5e-4, 30), (1.0, 16), (1e-6, 15_000)])
def test_a_step_reads_for_15_ms_or_as_long_as_decoding_takes(row, rows, step):
    rows = max(rows, int(step / row))
    assert settled(row, step, most=1 << 20) == pytest.approx(rows, rel=0.01, abs=1)


def test_a_first_prompt_beside_others_is_read_in_small_chunks():
    assert PromptPace().rows == 64


def test_one_slow_step_does_not_stop_prompts():
    pace = PromptPace()
    for _ in range(100):
        pace.note(0.001, 0)
        pace.note(0.01, 100)
    before = pace.rows
    pace.note(1.0, 100)
    assert 16 <= pace.rows < before
    for _ in range(40):
        pace.note(0.01, 100)
    assert pace.rows > 0.9 * before
