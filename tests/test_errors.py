"""What errors say, and the checks of options that all share."""

import pickle

import pytest

from lowrank_nn import errors
from lowrank_nn.errors import LowRankError, OptionError, RankError, check_whole_number

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LowRankError)]


def test_the_path_stands_in_front_and_the_root_has_a_name():
    error = RankError("rank is too large.")
    assert str(error) == "rank is too large."
    assert str(error.at("layer1.conv")) == "layer1.conv: rank is too large."
    assert str(error.at("")) == "(the model itself): rank is too large."
    assert type(error.at("fc")) is RankError
    assert error.path is None


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_of_other_processes_arrive_whole(kind):
    error = pickle.loads(pickle.dumps(kind("broken.").at("a.b")))
    assert (type(error), error.message, error.path) == (kind, "broken.", "a.b")


def test_whole_numbers_pass():
    assert check_whole_number("Step: bits", 1, 1, 8) == 1
    assert check_whole_number("Step: bits", 8, 1, 8) == 8
    assert check_whole_number("Step: epochs", 10**9, 1) == 10**9


@pytest.mark.parametrize("value", [0, -8, 9, 2.0, True, "8", None])
def test_what_is_no_whole_number_in_range(value):
    with pytest.raises(OptionError, match=r"^Step: bits must be a whole number from 1 to 8, got "):
        check_whole_number("Step: bits", value, 1, 8)


def test_without_an_upper_limit():
    with pytest.raises(OptionError, match=r"^Step: epochs must be a whole number from 1, got 0\.$"):
        check_whole_number("Step: epochs", 0, 1)
