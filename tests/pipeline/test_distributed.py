"""Training in two processes, started by torchrun; each case runs in both and leaves what it found in a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lowrank_nn as lnn
from lowrank_nn.errors import TrainingError
from lowrank_nn.pipeline import distributed

ROOT = Path(__file__).parents[2]
COUNT = 48
X = torch.randn(COUNT, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (COUNT,), generator=torch.Generator().manual_seed(2))
SGD = {
    "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "schedule": lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
}


class Net(nn.Module):
    def __init__(self, *, norm=True, dropout=0.0):
        super().__init__()
        self.classes = 4
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(8, 4)
        self.spare = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(3))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.drop(self.conv2(x).relu().mean((2, 3))))


def make(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def train(model, loader, *, epochs=2, before=None, **options):
    steps = before or [lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4))]
    step = lnn.FineTune(loader, epochs, **options)
    return lnn.compress_model(model, X[:2], [*steps, step], progress=False).model


class Seen:
    """The default loss's stand-in that notes which samples it was given."""

    def __init__(self):
        self.samples = []

    def __call__(self, model, batch):
        x, y = batch
        self.samples.append(sorted(int((image == X).all((1, 2, 3)).nonzero()) for image in x))
        return nn.functional.cross_entropy(model(x), y)


def ordered(batch_size):
    return [(X[i : i + batch_size], Y[i : i + batch_size]) for i in range(0, COUNT, batch_size)]


# --- the cases: each returns a model, and anything else as JSON


def case_plain(folder):
    return train(make(norm=False), ordered(8), **SGD), None


def case_shuffled(folder):
    seen = Seen()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    return train(make(dropout=0.3), loader, loss=seen), seen.samples


def case_sampler(folder):
    seen = Seen()
    data = TensorDataset(X, Y)
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data, size, rank, seed=3))
    return train(make(), loader, loss=seen), seen.samples


def case_chain(folder):
    """Masks, integers, guidance with a regressor, evaluation that differs between processes, the best state."""
    rank = int(os.environ["RANK"])
    scores = iter([[0.0, 0.5, 0.1], [0.2, 0.1, 0.6]][rank])

    class Same(Net):
        def forward(self, x):
            x = self.norm(self.conv(x)).relu()
            return self.fc(self.conv2(x).relu().movedim(1, -1)).movedim(-1, 1).mean((2, 3))

    torch.manual_seed(0)
    before = [
        lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4)),
        lnn.Prune(0.3, where="conv"),
        lnn.Quantize("int8"),
    ]
    options = {"guidance": ["conv", "conv2"], "evaluate": lambda _: next(scores), "restore_best": True}
    model = train(Same().eval(), ordered(8), before=before, **options)
    return model, None


def case_hint(folder):
    """The regressor of a hint learns the same in both processes."""
    made = []

    def guide(teacher, student):
        made.append(
            lnn.Guidance(teacher, student, {"conv": "conv2.reduce"}, kind="hint", widths={"conv": (4, 8)}, weight=0.1)
        )
        return made[0]

    model = train(make(norm=False), ordered(8), guidance=guide, **SGD)
    model.regressor = nn.ParameterList([p.detach() for p in made[0].parameters()])
    return model, None


def case_loss(folder):
    """A loss that reads attributes, calls the model twice, and leaves parts of it out."""

    def loss(model, batch):
        x, y = batch
        assert model.classes == 4
        return nn.functional.cross_entropy(model(x), y) + 0.1 * model(x.flip(3)).pow(2).mean()

    return train(make(), ordered(8), loss=loss), None


def case_resume(folder):
    """Interrupted in both processes after an epoch; then continued."""
    file = Path(folder) / "run.pt"
    steps = 0

    def loss(model, batch):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyError("interrupted")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def whole(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    with pytest.raises(KeyError):
        train(make(dropout=0.2), loader, loss=loss, checkpoint=file)
    assert file.exists()
    continued = train(make(dropout=0.2), loader, loss=whole, checkpoint=file)
    straight = train(make(dropout=0.2), loader, loss=whole)
    same = all(torch.equal(v, straight.state_dict()[k]) for k, v in continued.state_dict().items())
    return continued, same


def case_nan(folder):
    """NaN in one process alone ends the training of both."""
    rank = int(os.environ["RANK"])

    def loss(model, batch):
        return model(batch[0]).mean() * (float("nan") if rank == 1 else 1.0)

    with pytest.raises(TrainingError, match="loss is not finite in some process") as caught:
        train(make(), ordered(8), loss=loss)
    return make(), str(caught.value)


def case_lengths(folder):
    """Loaders of different lengths are refused instead of waiting for ever."""
    with pytest.raises(TrainingError, match="number of batches must be the same in all processes") as caught:
        train(make(), ordered(8 if os.environ["RANK"] == "0" else 4))
    return make(), str(caught.value)


CASES = {name[5:]: function for name, function in list(globals().items()) if name.startswith("case_")}


def main(folder):
    rank = os.environ["RANK"]
    torch.set_num_threads(1)
    for name, case in CASES.items():
        (Path(folder) / name).mkdir(exist_ok=True)
        model, found = case(Path(folder) / name)
        torch.save(model.state_dict(), Path(folder) / name / f"{rank}.pt")
        (Path(folder) / name / f"{rank}.json").write_text(json.dumps(found))


# --- what is asked of them


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs all cases in two processes; returns states and findings of both by case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.pipeline.test_distributed", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "find_unused_parameters" not in done.stderr
    return {
        name: [
            (torch.load(folder / name / f"{rank}.pt"), json.loads((folder / name / f"{rank}.json").read_text()))
            for rank in (0, 1)
        ]
        for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_both_processes_end_with_the_same_model(results, name):
    (first, _), (second, _) = results[name]
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_two_processes_learn_what_one_learns_from_twice_the_batch(results):
    alone = train(make(norm=False), ordered(16), **SGD).state_dict()
    start = train(make(norm=False), [(X, Y)], epochs=1, lr=1e-12).state_dict()
    both = results["plain"][0][0]
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert not torch.allclose(both["fc.weight"], start["fc.weight"], atol=1e-3)


def test_regressors_learn_what_they_learn_in_one_process(results):
    made = []

    def guide(teacher, student):
        made.append(
            lnn.Guidance(teacher, student, {"conv": "conv2.reduce"}, kind="hint", widths={"conv": (4, 8)}, weight=0.1)
        )
        return made[0]

    alone = train(make(norm=False), ordered(16), guidance=guide, **SGD).state_dict()
    both = results["hint"][0][0]
    for index, parameter in enumerate(made[0].parameters()):
        torch.testing.assert_close(both[f"regressor.{index}"], parameter.detach(), rtol=1e-3, atol=1e-5)
    for key, value in alone.items():
        torch.testing.assert_close(both[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["shuffled", "sampler"])
def test_batches_are_split_between_the_processes(results, name):
    first, second = (found for _, found in results[name])
    assert len(first) == len(second) == 2 * 3
    epochs = [(first[:3], second[:3]), (first[3:], second[3:])]
    for mine, others in epochs:
        together = [sample for batch in (*mine, *others) for sample in batch]
        assert sorted(together) == list(range(COUNT))
    assert epochs[0] != epochs[1]


def test_resumed_in_two_processes(results):
    assert results["resume"][0][1] is True
    assert results["resume"][1][1] is True


def test_one_process_that_fails_is_heard_by_all(results):
    assert "1.0 in this one" not in results["nan"][1][1]
    assert all("step 1 of epoch 1" in found for _, found in results["nan"])
    assert all("from 3 to 6" in found for _, found in results["lengths"])


def test_quantized_and_masked_layers_in_two_processes(results):
    state = results["chain"][0][0]
    assert state["conv2.core.weight_int"].dtype is torch.int8
    weight = state["conv.weight_int"]
    assert (weight[~state["conv.mask"]] == 0).all()


def test_in_one_process_nothing_is_distributed():
    model = make()
    assert distributed.world_size() == 1
    assert distributed.rank() == 0
    assert distributed.wrap(model) is model
    distributed.join_processes(torch.device("cpu"))
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(sys.argv[1])
