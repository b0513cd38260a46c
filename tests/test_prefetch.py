"""What is made a step ahead is what would be made without a thread, and its errors come where they belong."""

import threading
import time

import pytest

from engine.prefetch import Prefetch


def test_steps_come_in_order_one_is_made_ahead_and_no_more():
    made = []

    def make(step: int) -> int:
        made.append((step, threading.current_thread() is threading.main_thread()))
        return step * 10

    ahead = Prefetch(make, last=5)
    for step in range(3, 6):
        assert ahead.get(step) == step * 10
        time.sleep(0.05)
        assert len(made) == min(step + 1, 5) - 2
    ahead.close()
    assert made == [(3, True), (4, False), (5, False)]


def test_another_step_than_the_next_one_is_made_when_it_is_asked_for():
    ahead = Prefetch(lambda step: step, last=99)
    assert [ahead.get(step) for step in (1, 2, 7, 8, 3)] == [1, 2, 7, 8, 3]
    ahead.close()


def test_an_error_is_raised_where_its_step_is_asked_for():
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("the cache is torn")
        return step

    ahead = Prefetch(make, last=9)
    assert ahead.get(1) == 1
    with pytest.raises(ValueError, match="the cache is torn"):
        ahead.get(2)
    assert ahead.get(3) == 3
    ahead.close()
