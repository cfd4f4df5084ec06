"""What a model is called with out of a calibration batch."""

from torch import nn

from lowrank_nn.planning.calibration import model_inputs


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, a, b, scale=1.0):
        return a + b * scale


class Keywords(nn.Module):
    def forward(self, a=None, **others):
        return a


def test_what_a_model_is_called_with():
    one, two, x, y, label = One(), Two(), object(), object(), object()
    assert model_inputs(one, x) is x
    assert model_inputs(one, (x, label)) == (x,)
    assert model_inputs(one, [x]) == (x,)
    assert model_inputs(one, ([x, y], label)) == ([x, y],)
    assert model_inputs(two, (x, y)) == (x, y)
    assert model_inputs(two, (x, y, label)) == (x, y)
    assert model_inputs(two, ((x, y), label)) == (x, y)
    assert model_inputs(two, [[x, y, 2.0], label]) == (x, y, 2.0)
    assert model_inputs(two, {"a": x, "b": y}) == {"a": x, "b": y}
    assert model_inputs(two, ({"a": x, "b": y}, label)) == {"a": x, "b": y}
    assert model_inputs(Keywords(), {"a": x, "c": y}) == {"a": x, "c": y}


def test_a_dict_is_the_argument_of_a_model_that_takes_no_such_keywords():
    batch = {"left": object(), "right": object()}
    assert model_inputs(One(), batch) == (batch,)
    assert model_inputs(One(), (batch,)) == (batch,)
    assert model_inputs(One(), (batch, object())) == (batch,)
