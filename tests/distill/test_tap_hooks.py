"""What taps leave behind in the models that they watch: no hook, no record, no random number."""

import copy
import io
import pickle

import pytest
import torch

from lowrank_nn.distill import Guidance
from lowrank_nn.errors import OptionError, TrainingError
from tests.distill.tapped import Net, hooks, images, run


def test_one_model_alone_is_an_error_and_leaves_nothing_behind(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem", "block.0"])
    with pytest.raises(TrainingError, match=r"stem: .* ran 0 times and the student's 0 times"):
        guidance()
    student(images())
    with pytest.raises(TrainingError, match="the teacher's layer ran 0 times and the student's 1 times"):
        guidance.total(torch.tensor(1.0))
    with torch.no_grad():
        teacher(images())
    with pytest.raises(TrainingError, match="the teacher's layer ran 1 times and the student's 0 times"):
        guidance()
    run(teacher, student, images())
    first = guidance()
    with pytest.raises(TrainingError):
        guidance()  # used once, the record is gone
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)


def test_evaluation_leaves_no_trace(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem"])
    with torch.no_grad():
        student(images(8))
    run(teacher, student, images())
    first = guidance()
    first.backward()
    with guidance.paused():
        run(teacher, student, images(9))
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)
    run(teacher, student, images(8))
    guidance.clear()
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)


def test_hooks_are_removed(models):
    teacher, student = models
    with Guidance(teacher, student, ["stem", "block"]) as guidance:
        assert hooks(teacher) == hooks(student) == 2
    assert hooks(teacher) == hooks(student) == 0
    with pytest.raises(TrainingError, match="was removed; make a new one"):
        guidance()
    with pytest.raises(TrainingError, match="was removed"):
        guidance.taps[0].attach(student.stem)
    guidance.remove()  # twice is harmless


def test_models_pickle_after_removal_as_before(models):
    teacher, student = models
    before = pickle.dumps(student)
    guidance = Guidance(teacher, student, ["stem"])
    run(teacher, student, images())
    guidance.remove()
    student.load_state_dict(pickle.loads(before).state_dict())
    clone = copy.deepcopy(student)
    assert hooks(clone) == 0
    assert hooks(pickle.loads(pickle.dumps(student))) == 0


def test_copies_of_a_tapped_model_do_not_record(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem"])
    student(images())  # a record with a graph must not stop the copy either
    clone = copy.deepcopy(student)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    guidance.clear()
    run(teacher, student, images())
    clone(images())
    loaded(images())
    guidance()


def test_a_copy_of_the_guidance_is_removed_and_keeps_its_regressors():
    teacher, student = Net(width=6), Net(width=4)
    guidance = Guidance(teacher, student, ["stem"], kind="hint")
    run(teacher, student, images())
    for clone in (copy.deepcopy(guidance), pickle.loads(pickle.dumps(guidance))):
        assert torch.equal(clone.taps[0].regressor.weight, guidance.taps[0].regressor.weight)
        with pytest.raises(TrainingError, match="was removed"):
            clone()
    assert hooks(teacher) == hooks(student) == 1
    guidance()


def test_a_failure_half_way_leaves_no_hooks():
    teacher, student = Net(width=6), Net(width=4)
    with pytest.raises(OptionError, match=r"^block: hint: Sequential does not state"):
        Guidance(teacher, student, ["stem", "block"], kind="hint")
    assert hooks(teacher) == hooks(student) == 0


def test_random_state_is_left_alone():
    teacher, student = Net(width=6), Net(width=4)
    before = torch.get_rng_state()
    Guidance(teacher, student, ["stem"], kind="hint")
    assert torch.equal(before, torch.get_rng_state())
