"""Checkpoints and resuming, the best state, losses that are refused."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lowrank_nn import Apply, FineTune, SVDLinear, TrainingError, compress_model
from lowrank_nn.errors import OptionError
from tests.pipeline.finetuning import cross_entropy, same_bits


class InterruptionError(Exception):
    """Stands for whatever ends a run half-way."""


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).eval()


X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (48,), generator=torch.Generator().manual_seed(2))
SVD = Apply(SVDLinear, where="0", rank=3)


def shuffled(generator=None):
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, generator=generator)


def run(model, *, epochs=4, loader=None, before=SVD, **options):
    step = FineTune(shuffled() if loader is None else loader, epochs, **options)
    return compress_model(model, X[:2], [before, step] if before else [step], progress=False).model


def stop_after(epochs, loss=cross_entropy):
    """The loss, which fails in the first step after so many epochs of six."""
    steps = 0

    def stopping(model, batch):
        nonlocal steps
        if steps == 6 * epochs:
            raise InterruptionError
        steps += 1
        return loss(model, batch)

    return stopping


@pytest.mark.parametrize("epochs_done", [1, 3])
@pytest.mark.parametrize("own_generator", [False, True])
def test_resumed_run_ends_with_the_same_bits(tmp_path, epochs_done, own_generator):
    def loader():
        return shuffled(torch.Generator().manual_seed(5) if own_generator else None)

    model = make_model()
    options = {"guidance": ["1"]}
    whole = run(model, loader=loader(), loss=cross_entropy, **options)
    file = tmp_path / "folder" / "run.pt"
    with pytest.raises(InterruptionError):
        run(model, loader=loader(), loss=stop_after(epochs_done), checkpoint=file, **options)
    continued = run(model, loader=loader(), loss=cross_entropy, checkpoint=file, **options)
    assert same_bits(whole, continued)
    assert [path.name for path in file.parent.iterdir()] == ["run.pt"]


def test_the_best_state_before_an_interruption_is_not_lost(tmp_path):
    model, file = make_model(), tmp_path / "run.pt"
    options = {"restore_best": True, "loss": cross_entropy}
    whole_scores, first, second = iter([0.1, 0.9, 0.2, 0.3, 0.4]), iter([0.1, 0.9, 0.2]), iter([0.3, 0.4])
    whole = run(model, evaluate=lambda _: next(whole_scores), **options)
    with pytest.raises(InterruptionError):
        run(model, evaluate=lambda _: next(first), checkpoint=file, **(options | {"loss": stop_after(2)}))
    continued = run(model, evaluate=lambda _: next(second), checkpoint=file, **options)
    assert same_bits(whole, continued)
    assert not same_bits(whole, run(model, loss=cross_entropy))


def test_resuming_trains_only_the_epochs_left(tmp_path):
    model, file = make_model(), tmp_path / "run.pt"
    with pytest.raises(InterruptionError):
        run(model, loss=stop_after(2), checkpoint=file)
    with pytest.raises(InterruptionError):
        run(model, loss=stop_after(1), checkpoint=file)
    run(model, loss=stop_after(1.5), checkpoint=file)
    first = run(model, loss=stop_after(0), checkpoint=file)
    assert same_bits(first, run(model, loss=cross_entropy))


def test_random_orders_and_dropout_differ_between_epochs_and_seeds():
    seen = []

    def loss(model, batch):
        seen.append(batch[0].sum().item())
        return cross_entropy(model, batch)

    run(make_model(), epochs=2, loss=loss)
    assert seen[:6] != seen[6:]
    assert sum(seen[:6]) == pytest.approx(sum(seen[6:]), abs=1e-4)


def test_regressors_of_hints_are_in_the_checkpoint(tmp_path):
    model, file = make_model(), tmp_path / "run.pt"

    def hint(teacher, student):
        from lowrank_nn import Guidance

        return Guidance(teacher, student, {"1": "4"}, kind="hint", widths={"1": (3, 16)}, weight="balanced")

    whole = run(model, loss=cross_entropy, guidance=hint)
    with pytest.raises(InterruptionError):
        run(model, loss=stop_after(2), guidance=hint, checkpoint=file)
    assert torch.load(file)["extra"]
    assert same_bits(whole, run(model, loss=cross_entropy, guidance=hint, checkpoint=file))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "cut", "foreign"])
def test_damaged_checkpoints_are_refused(tmp_path, content):
    file = tmp_path / "run.pt"
    run(make_model(), epochs=1, checkpoint=file)
    if content == "foreign":
        torch.save({"model": {}}, file)
    else:
        file.write_bytes(file.read_bytes()[:-200] if content == "cut" else content)
    with pytest.raises(TrainingError, match="no readable checkpoint"):
        run(make_model(), epochs=1, checkpoint=file)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    model, file = make_model(), tmp_path / "run.pt"
    run(model, epochs=2, checkpoint=file)
    other = copy.deepcopy(model)
    other[4].weight.data[0, 0] += 1e-3
    with pytest.raises(TrainingError, match="other weights"):
        run(other, epochs=2, checkpoint=file)
    with pytest.raises(TrainingError, match=r"0\.factor|0\..*different|different entries"):
        run(model, epochs=2, checkpoint=file, before=None)
    with pytest.raises(TrainingError, match="different entries"):
        run(model, epochs=2, checkpoint=file, before=Apply(SVDLinear, where="0", rank=2))
    with pytest.raises(TrainingError, match="6 steps per epoch, and now there are 1"):
        run(model, epochs=2, checkpoint=file, loader=[(X, Y)])
    with pytest.raises(TrainingError, match="2 epochs done"):
        run(model, epochs=1, checkpoint=file)
    momentum = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}
    steps = {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, steps)}
    for change in ({"lr": 0.5}, {"temperature": 2}, {"alpha": 0.5}, momentum, steps):
        with pytest.raises(TrainingError, match="was made with another optimizer"):
            run(model, epochs=2, checkpoint=file, **change)
    run(model, epochs=3, checkpoint=file)


def test_a_failing_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model, file = make_model(), tmp_path / "run.pt"
    with pytest.raises(InterruptionError):
        run(model, loss=stop_after(1), checkpoint=file)
    before = file.read_bytes()

    def failing_save(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing_save)
        with pytest.raises(OSError, match="disk full"):
            run(model, loss=cross_entropy, checkpoint=file)
    assert file.read_bytes() == before
    assert same_bits(run(model, loss=cross_entropy, checkpoint=file), run(model, loss=cross_entropy))


def test_the_best_state_is_restored():
    states, scores = [], iter([0.1, 0.5, 0.9, 0.9, 0.2])

    def evaluate(model):
        states.append(copy.deepcopy(model))
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        return next(scores)

    result = run(make_model(), evaluate=evaluate, restore_best=True)
    assert len(states) == 5
    assert same_bits(result, states[2])
    assert not same_bits(result, states[4])


def test_the_best_state_can_be_the_one_before_training():
    scores = iter([0.9, 0.5, 0.4, 0.3, 0.2])
    model = make_model()
    result = run(model, evaluate=lambda _: next(scores), restore_best=True)
    assert same_bits(result, compress_model(model, X[:2], [SVD], progress=False).model)


def test_without_restore_best_the_last_state_is_returned():
    states, scores = [], iter([0.9, 0.5, 0.4, 0.3])

    def evaluate(model):
        states.append(copy.deepcopy(model))
        return next(scores)

    assert same_bits(run(make_model(), evaluate=evaluate), states[-1])
    assert len(states) == 4


def test_evaluating_changes_nothing_about_the_training():
    def evaluate(model):
        torch.rand(7)
        model.train()
        model.eval()
        return float(model(X).sum())

    assert same_bits(run(make_model(), evaluate=evaluate, guidance=["1"]), run(make_model(), guidance=["1"]))


@pytest.mark.parametrize("value", [float("nan"), None, "91", torch.ones(2)])
def test_evaluations_that_are_no_number_are_refused(value):
    with pytest.raises(TrainingError, match=r"must return a number, got .* after 1 epochs"):
        run(make_model(), evaluate=lambda _: value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(value):
    steps = 0

    def loss(model, batch):
        nonlocal steps
        steps += 1
        return cross_entropy(model, batch) * (value if steps == 9 else 1)

    with pytest.raises(TrainingError, match=rf"loss is {value} at step 3 of epoch 2, learning rate 0\.05"):
        run(make_model(), loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), schedule=constant)


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"shape \(8, 3\)"),
        (lambda model, batch: 0.5, "got float"),
        (lambda model, batch: model(batch[0]).sum().detach(), "without gradient"),
    ],
)
def test_losses_that_are_none_are_refused(loss, message):
    with pytest.raises(TrainingError, match=message):
        run(make_model(), loss=loss)


def test_nothing_to_train_or_to_train_on():
    frozen = make_model().requires_grad_(False)
    with pytest.raises(TrainingError, match="requires_grad"):
        run(frozen)
    with pytest.raises(TrainingError, match="no batches"):
        run(make_model(), loader=[])

    class UsedUp:
        def __init__(self):
            self.batches = iter([(X, Y)] * 2)

        def __len__(self):
            return 2

        def __iter__(self):
            return self.batches

    with pytest.raises(TrainingError, match="no batches in epoch 2"):
        run(make_model(), loader=UsedUp())


class Endless(IterableDataset):
    """Has no length, nor has a loader of it."""

    def __iter__(self):
        return itertools.repeat(X[0])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"optimizer": lambda parameters: torch.optim.LBFGS(parameters)}, "optimizer .* got LBFGS"),
        ({"schedule": lambda optimizer, _: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}, "got ReduceLROn"),
        ({"schedule": lambda optimizer, _: None}, "schedule .* got NoneType"),
    ],
)
def test_what_cannot_step_after_every_batch_is_refused(options, name):
    with pytest.raises(TrainingError, match=name):
        run(make_model(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"epochs": True},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": "1e-3"},
        {"temperature": 0.0},
        {"alpha": 1.5},
        {"alpha": None},
        {"teacher": 3},
        {"restore_best": True},
        {"loader": iter([(X, Y)])},
        {"loader": (batch for batch in [(X, Y)])},
        {"loader": X},
        {"loader": DataLoader(Endless(), 4)},
        {"optimizer": torch.optim.SGD([X], lr=0.1)},
        {"schedule": "cosine"},
        {"loss": "cross_entropy"},
        {"regularizer": 0.1},
        {"evaluate": 91.0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match="FineTune"):
        FineTune(**{"loader": [(X, Y)], "epochs": 1, **options})


def test_loader_generators_are_put_back():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    first = run(make_model(), loader=shuffled(generator))
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(InterruptionError):
        run(make_model(), loader=shuffled(generator), loss=stop_after(1))
    assert torch.equal(generator.get_state(), before)
    assert same_bits(first, run(make_model(), loader=shuffled(generator)))
