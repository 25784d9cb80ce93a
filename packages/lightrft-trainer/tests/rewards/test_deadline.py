from __future__ import annotations

import threading

import pytest

from lightrft.rewards.deadline import LateCallError, call_with_deadline, seconds_left


def test_a_result_comes_back():
    assert call_with_deadline(lambda: 7, 60.0) == 7


def test_an_exception_comes_back_as_it_was():
    error = KeyError("mine")

    def fails() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        call_with_deadline(fails, 60.0)
    assert caught.value is error


def test_a_late_call_says_where_it_is_and_does_not_keep_the_program_alive():
    release = threading.Event()
    with pytest.raises(LateCallError, match=r"threading\.py:\d+ \(wait\), from .*test_deadline\.py:\d+"):
        call_with_deadline(lambda: release.wait(60), 0.1)
    left_behind = [thread for thread in threading.enumerate() if thread.name == "reward"]
    release.set()
    assert left_behind and all(thread.daemon for thread in left_behind)


def test_a_call_can_ask_how_much_of_its_time_is_left():
    assert 0.0 < call_with_deadline(lambda: seconds_left(0.5), 60.0) <= 30.0
    assert seconds_left() == float("inf")
