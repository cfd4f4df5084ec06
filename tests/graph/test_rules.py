"""Rules, one operation at a time: removing units must be the same as zeroing them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.graph import find_groups
from lowrank_nn.graph.rules import functions
from lowrank_nn.graph.rules.elementwise import ELEMENTWISE
from lowrank_nn.graph.torch_functions import LOOKED_AT
from tests.graph.removal import assert_removable

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions, what ``middle`` makes of their outputs, and a layer that reads it."""

    def __init__(self, middle, width=8, **tensors):
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(3, width, 3, padding=1)
        for name, value in tensors.items():
            if isinstance(value, (nn.Module, nn.Parameter)):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)
        self.middle = middle
        self.double()
        with torch.no_grad():
            made = self.middle(self, self.a(X), self.b(X))
        self.read = nn.Conv2d(made.shape[1], 5, 1) if made.dim() == 4 else nn.Linear(made.shape[-1], 5)

    def forward(self, x):
        return self.read(self.middle(self, self.a(x), self.b(x)))


def settled(model):
    """Random weights and statistics: nothing cancels by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5 if "var" in name else -1, 1.5, generator=generator)
    return model.eval().double()


def free_units(middle, **tensors):
    """Check all groups against brute force; the sizes of those that can shrink, by name."""
    model = settled(Net(middle, **tensors))
    groups = find_groups(model, X)
    assert_removable(model, X, groups)
    return {group.name: group.size for group in groups if not group.frozen}


def relu_after_chunk(net, a, b):
    first, second = a.chunk(2, dim=1)
    first.relu_()
    return torch.cat([second, first], 1)


def shuffle(net, a, b):
    n, c, h, w = a.shape
    return a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def written(net, a, b):
    out = torch.zeros_like(a)
    out.copy_(b)
    return out + a


def windows(net, a, b):
    return a.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3).mean((-1, -2))[..., None]


def write_channels(net, a, b):
    out = a.clone()
    out[:, :4] = b[:, 4:]
    return out


def write_rows(net, a, b):
    out = torch.zeros(a.shape, dtype=a.dtype)
    out[:, :, 1:] = a[:, :, :-1]
    out[:, :, 0] += b[:, :, 0]
    return out


def rotate(net, a, b):
    turned = torch.view_as_complex(a.unflatten(-1, (2, 2))) * torch.polar(*b.unflatten(-1, (2, 2)).unbind(-1))
    return torch.view_as_real(turned).flatten(3)


def listed_parts(of_width):
    return lambda net, a, b: torch.cat(a.split(of_width(a.shape[1]), 1), 1).relu()


BOTH = {"a": 8}  # one group, named after its first layer
APART = {"a": 8, "b": 8}

REMOVABLE = {
    "sum": (lambda net, a, b: a + b, BOTH),
    "in place": (lambda net, a, b: F.relu_(a.add_(b)), BOTH),
    "augmented": (lambda net, a, b: a.__imul__(b).tanh(), BOTH),
    "in place on a view": (relu_after_chunk, {"a": 4, "b": 8}),
    "cat": (lambda net, a, b: torch.cat([a, b], 1), APART),
    "cat of cats": (lambda net, a, b: torch.cat([torch.cat([a, b], 1), a], 1), APART),
    "hstack": (lambda net, a, b: torch.hstack([a, b]), APART),
    "vstack": (lambda net, a, b: torch.vstack([a[0], b[0]])[None], APART),
    "cat of rows": (lambda net, a, b: torch.cat([a, b], 2), BOTH),
    "stack": (lambda net, a, b: torch.stack([a, b], 0).sum(0), BOTH),
    "chunk and product": (lambda net, a, b: torch.mul(*a.chunk(2, 1)), {"a": 4, "b": 8}),
    "glu": (lambda net, a, b: F.glu(a, 1), {"a": 4, "b": 8}),
    "slice of all": (lambda net, a, b: a[:, :, 1:] + b[..., 1:, :], BOTH),
    "shuffle": (shuffle, {"a": 4, "b": 8}),
    "flatten": (lambda net, a, b: torch.flatten(a * b, 1), BOTH),
    "pixel shuffle": (lambda net, a, b: F.pixel_shuffle(a, 2), {"a": 2, "b": 8}),
    "pixel unshuffle": (lambda net, a, b: F.pixel_unshuffle(a, 2), APART),
    "unfold": (lambda net, a, b: F.unfold(a, 3, padding=1).transpose(1, 2), APART),
    "fold": (lambda net, a, b: F.fold(F.unfold(a, 2), (4, 4), 2) + b, BOTH),
    "windows": (windows, APART),
    "pad": (lambda net, a, b: F.pad(a, (1, 1, 0, 2)), APART),
    "pad with channels": (lambda net, a, b: F.pad(a, (0, 0, 0, 0, 1, 2)), APART),
    "reflect": (lambda net, a, b: F.pad(a, (1, 1, 1, 1), mode="reflect"), APART),
    "roll": (lambda net, a, b: a.roll((1, 1), (2, 3)) + b.flip(3), BOTH),
    "gate": (lambda net, a, b: a * b.mean((2, 3), keepdim=True).sigmoid(), BOTH),
    "pools": (lambda net, a, b: F.max_pool2d(a, 2) + F.avg_pool2d(b, 2) + F.adaptive_avg_pool2d(a, 1), BOTH),
    "indices": (lambda net, a, b: F.max_pool2d(a, 2, return_indices=True)[0], APART),
    "interpolate": (lambda net, a, b: F.interpolate(a, size=7) + F.interpolate(b, (7, 7), mode="bilinear"), BOTH),
    "where": (lambda net, a, b: torch.where(a > 0, b, a.abs()).clamp(max=1.0), BOTH),
    "softmax over space": (lambda net, a, b: a.flatten(2).softmax(-1).view_as(b) * b, BOTH),
    "masked fill": (lambda net, a, b: a.masked_fill(b > 0, 0.5), BOTH),
    "casts": (lambda net, a, b: a.float().to(b) + b.type_as(a).detach(), BOTH),
    "cosine": (lambda net, a, b: a * F.cosine_similarity(a, b)[:, None], BOTH),
    "cosine over space": (lambda net, a, b: F.cosine_similarity(a, b, dim=-1)[..., None], BOTH),
    "vecdot": (lambda net, a, b: torch.linalg.vecdot(a, b, dim=1)[:, None] * a, BOTH),
    "distance": (lambda net, a, b: F.pairwise_distance(a.flatten(2).mT, b.flatten(2).mT, keepdim=True), BOTH),
    "distances": (lambda net, a, b: torch.cdist(a.flatten(2).mT, b.flatten(2).mT), BOTH),
    "tensordot": (lambda net, a, b: torch.tensordot(a, b, ([1, 2], [1, 2])), BOTH),
    "triangle": (lambda net, a, b: a.tril() + b.triu(1), BOTH),
    "by default the last": (lambda net, a, b: (a.kthvalue(2)[0] + b.mode()[0])[..., None], BOTH),
    "differences": (lambda net, a, b: a.diff() + b.diff(dim=3), BOTH),
    "added by index": (lambda net, a, b: a.index_add(2, torch.tensor([0, 0, 1, 3]), b), BOTH),
    "scattered": (lambda net, a, b: a.scatter_add(3, (b > 0).long(), b), BOTH),
    "written by index": (lambda net, a, b: a.scatter(-1, torch.zeros_like(b).long(), b), BOTH),
    "shifted": (lambda net, a, b: torch.ldexp(a, torch.ones_like(b).int()) + torch.polygamma(1, b.exp() + 1), BOTH),
    "expand": (lambda net, a, b: a * torch.ones(1, 1, 1, 1, dtype=a.dtype).expand(2, a.shape[1], 4, 4) + b, BOTH),
    "zeros": (lambda net, a, b: a + torch.zeros(a.shape, dtype=a.dtype) + b, BOTH),
    "written into": (written, BOTH),
    "rows written": (write_rows, BOTH),
    "repeat": (lambda net, a, b: a.repeat(1, 2, 1, 1).repeat_interleave(2, 1), APART),
    "gram": (lambda net, a, b: a.flatten(2).transpose(1, 2) @ b.flatten(2), BOTH),
    "permute": (lambda net, a, b: (a.permute(0, 2, 3, 1) * b.movedim(1, -1)).flatten(1, 2), BOTH),
    "squeeze": (lambda net, a, b: a.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1).unsqueeze(1), APART),
    "normalize": (lambda net, a, b: F.normalize(a.flatten(2), dim=-1).unflatten(2, (4, 4)), APART),
    "instance norm": (lambda net, a, b: F.instance_norm(a), APART),
    "dropout": (lambda net, a, b: F.dropout(a, 0.5, net.training) + F.dropout2d(b, 0.5, net.training), BOTH),
    "not read": (lambda net, a, b: (a.mean(), a.softmax(1), b)[2], APART),
    "looked at": (lambda net, a, b: a if f"{a.shape} {a.dtype} {len(a)} {a!r}" and a.dim() == 4 else b, APART),
    "sums over channels": (lambda net, a, b: a.sum(1, keepdim=True) * b.norm(dim=1, keepdim=True), APART),
    "largest": (lambda net, a, b: a / torch.linalg.vector_norm(a, ord=torch.inf, dim=1, keepdim=True), APART),
    "fourier": (lambda net, a, b: torch.fft.irfft2(torch.fft.rfft2(a) * torch.fft.rfftn(b, dim=(2, 3))), BOTH),
    "fourier of all but": (lambda net, a, b: torch.fft.fftn(a, s=(4, 4)).real, APART),
    "rotated": (rotate, BOTH),
    "all but the first": (lambda net, a, b: a[:, 1:], {"a#2": 7, "b": 8}),
    "from the back": (lambda net, a, b: a[:, -5:-1], {"a": 3, "b": 8}),
    "one from the back": (lambda net, a, b: a[:, -3, None] * b, {"a": 5, "b": 8}),
    "one third": (listed_parts(lambda width: [width // 4, 3 * (width // 4)]), {"a": 2, "b": 8}),
    "twins and another": (listed_parts(lambda width: [(width - 2) // 2, (width - 2) // 2, 2]), {"a": 3, "b": 8}),
    "outer product": (lambda net, a, b: torch.einsum("nchw,nkhw->nck", a, b).flatten(1), {"a": 8}),
    "asserted": (lambda net, a, b: torch._assert(a.shape[0] == 2, "batch") or a, APART),
}


@pytest.mark.parametrize(("middle", "expected"), REMOVABLE.values(), ids=REMOVABLE)
def test_channels_that_can_go(middle, expected):
    assert free_units(middle) == expected


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"transposed": True}, {"transposed": True, "groups": 4}])
def test_channels_in_the_place_of_space_that_a_kernel_of_one_passes(options):
    """As the spatial gating unit of gMLP does with ``nn.Conv1d`` over tokens."""
    options = dict(options)
    function = F.conv_transpose2d if options.pop("transposed", False) else F.conv2d
    shape = (4, 4 // options.get("groups", 1), 3, 1)

    def middle(net, a, b):
        return function(a.movedim(1, 3), net.taps, padding=(1, 0), **options).movedim(3, 1) * b

    assert free_units(middle, taps=nn.Parameter(torch.empty(shape))) == BOTH
    wide = free_units(lambda net, a, b: F.conv2d(a.movedim(1, 3), net.taps).movedim(3, 1), taps=torch.ones(4, 4, 1, 2))
    assert wide == {"b": 8}


def test_heads_under_a_convolution_of_each_over_positions():
    """As in Nystromformer: what is in a head lies along a dimension of space that the kernel passes."""

    def middle(net, a, b):
        heads = a.flatten(2).unflatten(1, (-1, 2)).movedim(2, 3)
        mixed = F.conv2d(heads, net.taps, padding=(1, 0), groups=heads.shape[1])
        return mixed.movedim(3, 2).reshape(a.shape)

    assert free_units(middle, taps=nn.Parameter(torch.empty(4, 1, 3, 1))) == {"a": 4, "b": 8}


FROZEN = {
    "softmax": (lambda net, a, b: a.softmax(1), "mixed by softmax in the model itself"),
    "norm of negative order": (lambda net, a, b: a.norm(-1, 1, keepdim=True), "mixed by norm"),
    "fourier of channels": (lambda net, a, b: torch.fft.fft(a, dim=1).real, "mixed by fft"),
    "mean of all": (lambda net, a, b: b + a.mean(), "mixed by mean"),
    "std": (lambda net, a, b: b if a.std() > 0 else b + 1, "mixed by std"),
    "cumsum": (lambda net, a, b: a.cumsum(dim=1), "mixed by cumsum"),
    "sort": (lambda net, a, b: a.sort(1)[0], "mixed by sort"),
    "layer norm": (lambda net, a, b: F.layer_norm(a, a.shape[1:]), "mixed by layer_norm"),
    "one group": (lambda net, a, b: F.group_norm(a, 1), "mixed by group_norm"),
    "neighbours": (lambda net, a, b: F.local_response_norm(a, 3), "mixed by local_response_norm"),
    "unequal parts": (lambda net, a, b: torch.cat(a.split([3, 5], 1), 1), "split into parts of 3, 5 by split"),
    "unequal chunks": (lambda net, a, b: torch.cat(a.chunk(3, 1), 1), "split into parts of 3, 3, 2 by chunk"),
    "by number": (lambda net, a, b: a[:, 0, None] * b, "reads by number"),
    "by numbers": (lambda net, a, b: a[:, [0, 2]], "reads by number"),
    "index_select": (lambda net, a, b: a.index_select(1, torch.tensor([1, 3])), "reads by number"),
    "rolled": (lambda net, a, b: a.roll(1, 1), "reads by number"),
    "numbered": (lambda net, a, b: a * torch.arange(8.0)[:, None, None], "meets a tensor that has no such channels"),
    "no rule": (lambda net, a, b: torch.linalg.qr(a)[0], "no rule for torch.linalg.qr, called in the model itself"),
    "numpy": (lambda net, a, b: torch.from_numpy(a.numpy() * 2), "no rule for torch.Tensor.numpy"),
    "a number in Python": (lambda net, a, b: a * float(a[0, 0, 0, 0]), "reads by number"),
    "diagonal": (lambda net, a, b: torch.einsum("nchh->nch", a)[..., None], "no rule for torch.functional.einsum"),
    "triangle of channels": (lambda net, a, b: a.movedim(1, -1).tril(), "mixed by tril"),
    "differences of channels": (lambda net, a, b: a.diff(dim=1), "mixed by diff"),
    "scattered over channels": (lambda net, a, b: a.scatter(1, (b > 0).long(), b), "mixed by scatter"),
    "part written": (write_channels, "by number"),
}  # fmt: skip


@pytest.mark.parametrize(("middle", "reason"), FROZEN.values(), ids=FROZEN)
def test_channels_that_stay(middle, reason):
    model = settled(Net(middle))
    groups = find_groups(model, X)
    assert_removable(model, X, groups)
    first = groups[0]
    assert first.name == "a"
    assert reason in first.frozen, first


@pytest.mark.parametrize("table", [ELEMENTWISE, LOOKED_AT])
def test_names_in_tables_exist(table):
    assert [name for name in table.split() if not functions(name)] == []
