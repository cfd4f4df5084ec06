"""Functions that pause in the middle."""

import pytest

from lowrank_nn.graph.pausable import Pausable, settings_of_this_thread


def test_pausable():
    def body(pause):
        for number in range(3):
            pause(number)

    assert list(Pausable(body)) == [0, 1, 2]
    items = Pausable(body, settings_of_this_thread())
    assert next(items) == 0
    items.close()
    items.close()
    assert list(items) == []
    Pausable(body).close()  # never started


def test_pausable_error():
    def body(pause):
        pause(1)
        raise ZeroDivisionError

    items = Pausable(body)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(items) == []
