"""The forms of batches, outputs and losses that fine-tuning takes."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_nn as lnn
from lowrank_nn.errors import TrainingError
from lowrank_nn.pipeline.finetune import warm_cosine
from tests.pipeline.finetuning import (
    BATCHES,
    TUCKER,
    Net,
    X,
    Y,
    compress,
    make_net,
    same_bits,
)


class TwoInputs(Net):
    def forward(self, image, shift):
        return super().forward(image) + shift


@dataclasses.dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor


class Answering(Net):
    form = "dict"

    def forward(self, x):
        y = super().forward(x)
        forms = {"dict": {"logits": y}, "tuple": (y, x), "dataclass": Answer(y.sum(), y), "nested": {"out": [y]}}
        return forms[self.form]


def test_forms_of_batches_and_outputs_give_the_same_training():
    model = make_net()
    expected = compress(model, TUCKER, lnn.FineTune(BATCHES, 1))
    for batches in (
        [{"x": x, "labels": y} for x, y in BATCHES],
        [((x,), y) for x, y in BATCHES],
        [({"x": x}, y) for x, y in BATCHES],
        DataLoader(TensorDataset(X, Y), batch_size=8),
    ):
        assert same_bits(expected, compress(model, TUCKER, lnn.FineTune(batches, 1)))
    for form in ("dict", "tuple", "dataclass", "nested"):
        other = Answering().eval()
        other.load_state_dict(model.state_dict())
        other.form = form
        assert same_bits(expected, compress(other, TUCKER, lnn.FineTune(BATCHES, 1)))


def test_several_inputs():
    torch.manual_seed(0)
    model, shift = TwoInputs().eval(), torch.ones(4)
    example = (X[:2], shift)
    flat = compress(model, TUCKER, lnn.FineTune([(x, shift, y) for x, y in BATCHES], 1), example=example)
    pair = compress(model, TUCKER, lnn.FineTune([((x, shift), y) for x, y in BATCHES], 1), example=example)
    keys = [{"image": x, "shift": shift, "target": y} for x, y in BATCHES]
    named = compress(model, TUCKER, lnn.FineTune(keys, 1), example={"image": X[:2], "shift": shift})
    assert same_bits(flat, pair)
    assert same_bits(flat, named)


def test_dense_prediction_with_positions_to_ignore():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)).eval()
    targets = torch.randint(5, (32, 8, 8))
    targets[:, :2] = 255
    step = lnn.Apply(lnn.TuckerConv2d, where="0", rank=(4, 2))

    batches = [(X[i : i + 8], targets[i : i + 8]) for i in range(0, 32, 8)]
    result = compress(model, step, lnn.FineTune(batches, 1, alpha=0.0, ignore_index=255))
    reference = compress(model, step).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-4, weight_decay=1e-4)
    schedule = warm_cosine(optimizer, 4)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y, ignore_index=255).backward()
        optimizer.step()
        schedule.step()
    for a, b in zip(result.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_classes_in_the_last_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    x, y = torch.randn(4, 7, 6), torch.randint(5, (4, 7))
    svd = lnn.Apply(lnn.SVDLinear, where="0", rank=2)
    tokens = compress(model, svd, lnn.FineTune([(x, y)], 3, class_dim=-1), example=x)
    flat = compress(model, svd, lnn.FineTune([(x.flatten(0, 1), y.flatten())], 3), example=x)
    for a, b in zip(tokens.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(lnn.OptionError, match="class_dim"):
        compress(model, svd, lnn.FineTune([(x, y)], 1), example=x)


def test_outputs_without_logits():
    class Boxes(Net):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    with pytest.raises(TrainingError, match="no logits"):
        compress(Boxes().eval(), TUCKER, lnn.FineTune(BATCHES, 1))
    compress(Boxes().eval(), TUCKER, lnn.FineTune(BATCHES, 1, loss=lambda model, batch: model(batch[0])["loss"]))


def test_one_number_for_each_input_is_no_distribution_over_the_batch():
    class Score(Net):
        def forward(self, x):
            return super().forward(x)[:, 0]

    with pytest.raises(TrainingError, match="one number for each of 8 inputs"):
        compress(Score().eval(), TUCKER, lnn.FineTune([x for x, _ in BATCHES], 1))


def test_batches_may_be_anything_with_a_loss_of_ones_own():
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(X[:4]).sum() * 1e-3

    compress(make_net(), lnn.FineTune(["a", "b"], 1, loss=loss))
    assert seen == ["a", "b"]
