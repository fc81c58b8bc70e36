import pytest

from topk_ortho.training.schedules import annealed, decay, warmup


def test_warmup_rises_to_1():
    assert [warmup(step, 4) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.2, 0.4, 0.8, 1, 1])
    assert warmup(0, 0) == 1


def test_decay_falls_towards_0_at_the_end():
    assert [decay(step, 10, 4) for step in (0, 5, 6, 7, 9)] == pytest.approx([1, 1, 1, 0.75, 0.25])
    assert decay(9, 10, 0) == 1


def test_a_number_is_annealed_to_its_last_value():
    assert [annealed(20, 5, step, 10) for step in (0, 2, 5, 9, 10, 99)] == [20, 17, 12, 6, 5, 5]
    assert annealed(2, 6, 5, 10) == 4
    assert annealed(20, 5, 0, 0.0) == 5
