"""Sums of products: convolutions, linear layers, matrix products, comparisons, attention, embeddings."""

from __future__ import annotations

import string
from typing import Any

import torch.nn.functional as F

from lowrank_nn.graph.labels import Labels, compact, contract, in_groups, join_dims, merge, mix, support
from lowrank_nn.graph.rules._call import RULES, Call, Planes, aligned, rule_for
from lowrank_nn.graph.rules.mixing import mix_all
from lowrank_nn.graph.units import OUT

WHOLE_GROUPS = 8
"""From this many groups on, whole groups of a grouped convolution are removed: fewer cannot be thinned finely."""


def with_bias(call: Call, planes: Planes, bias: Any, dim: int) -> list[Planes]:
    """Return the planes after adding a bias along ``dim``."""
    if bias is None:
        return [planes]
    labels = call.labels(bias)
    call.units.mark(labels.ids(), OUT)
    shape = call.shapes[0]
    return [merge(call.units, [Labels(shape, tuple(planes)), aligned(labels, len(shape), dim)], call.where)]


@rule_for("linear")
def linear(call: Call) -> list[Planes]:
    """y[..., o] = sum_i x[..., i] w[o, i] + b[o]."""
    weight, bias = call.labels(call.argument(1, "weight")), call.argument(2, "bias")
    leading = string.ascii_uppercase[: len(call.first.shape) - 1]
    out = "o"[: len(weight.shape) - 1]
    operands = [(call.first, f"{leading}i"), (weight, f"{out}i")]
    planes = contract(call.units, operands, leading + out, call.where, weight=1)
    return with_bias(call, planes, bias, len(leading)) if out else [planes]


def _convolution(spatial: int, transposed: bool) -> Any:
    def rule(call: Call) -> list[Planes]:
        weight, bias = call.labels(call.argument(1, "weight")), call.argument(2, "bias")
        groups = call.argument(6, "groups", 1)
        channel = len(call.first.shape) - spatial - 1
        free = [channel + 1 + index for index in range(spatial) if _passes(call, weight, channel, index)]
        mixed = [dim for dim in range(channel + 1, len(call.first.shape)) if dim not in free]
        flat = _channels_last(call.first, mix_all(call, call.first, mixed), [*range(channel), *free], channel)
        rows = (plane.reshape(plane.shape[:2]) for plane in mix_all(call, weight, range(2, 2 + spatial)))
        kernel = Labels(weight.shape[:2], tuple(rows))
        spread = []
        for plane in _grouped(call, flat, kernel, groups, transposed):
            whole = plane.reshape(*plane.shape, *(1,) * len(mixed))
            spread.append(whole.movedim([*range(whole.dim())], [*range(channel), *free, channel, *mixed]))
        return with_bias(call, spread, bias, channel)

    return rule


for _spatial in (1, 2, 3):
    rule_for(f"conv{_spatial}d")(_convolution(_spatial, transposed=False))
    rule_for(f"conv_transpose{_spatial}d")(_convolution(_spatial, transposed=True))


def _passes(call: Call, weight: Labels, channel: int, index: int) -> bool:
    """Whether a convolution takes units along a dimension of space as they come, one position after the other.

    Where units are pairs of a channel and a position (heads, and what is in them), it does not: it mixes channels.
    """
    dim, stride = channel + 1 + index, call.argument(3, "stride", 1)
    step = stride if isinstance(stride, int) else stride[index % len(stride)]
    alone = not any({channel, dim} <= support(plane) for plane in call.first.planes)
    return alone and weight.shape[2 + index] == step == 1 and call.shapes[0][dim] == call.first.shape[dim]


def _channels_last(labels: Labels, planes: Planes, leading: list[int], channel: int) -> Labels:
    """Return ``planes``, with the ``leading`` dimensions and the channels alone; along others none varies."""
    kept = [*leading, channel]
    index = tuple(slice(None) if dim in kept else 0 for dim in range(len(labels.shape)))
    order = [sorted(kept).index(dim) for dim in kept]
    return Labels(tuple(labels.shape[dim] for dim in kept), tuple(plane[index].permute(order) for plane in planes))


def _grouped(call: Call, x: Labels, kernel: Labels, groups: int, transposed: bool) -> Planes:
    """Return the planes over batch and output channels."""
    batch = string.ascii_uppercase[: len(x.shape) - 1]
    if groups == 1:
        return contract(
            call.units, [(x, f"{batch}i"), (kernel, "io" if transposed else "oi")], f"{batch}o", call.where, weight=1
        )
    # The weight holds all groups along its first dimension: of the outputs, or where transposed of the inputs.
    x, kernel = in_groups(x, len(batch), groups), in_groups(kernel, 0, groups)
    whole = groups >= min(WHOLE_GROUPS, x.shape[-1])
    if not whole:
        # The same channels of every group: groups of a few channels less each.
        x = Labels(x.shape, tuple(mix_all(call, x, [len(batch)])))
        kernel = Labels(kernel.shape, tuple(mix_all(call, kernel, [0])))
    operands = [(x, f"{batch}gi"), (kernel, "gio" if transposed else "goi")]
    planes = contract(call.units, operands, f"{batch}go", call.where, weight=1)
    sizes = (groups, kernel.shape[2 if transposed else 1])
    return compact(call.units, (join_dims(plane, len(batch), sizes) for plane in planes), call.where)


def product(call: Call, a: Labels, b: Labels) -> Planes:
    """Return the planes of a matrix product, batched and broadcast as ``torch.matmul`` does it."""
    rows, columns = "r"[: len(a.shape) - 1], "c"[: len(b.shape) - 1]
    batch = string.ascii_uppercase[: max(len(a.shape), len(b.shape), 2) - 2]
    own_a, own_b = batch[len(batch) - max(len(a.shape) - 2, 0) :], batch[len(batch) - max(len(b.shape) - 2, 0) :]
    operands = [(a, f"{own_a}{rows}k"), (b, f"{own_b}k{columns}")]
    return contract(call.units, operands, f"{batch}{rows}{columns}", call.where, _only_constant(a, b))


def _only_constant(*operands: Labels) -> int | None:
    """Return which operand does not depend on the inputs, and so is a weight; None if that is not one alone."""
    constants = [index for index, labels in enumerate(operands) if labels.constant]
    return constants[0] if len(constants) == 1 else None


@rule_for("matmul __matmul__ bmm mm mv dot inner")
def matmul(call: Call) -> list[Planes]:
    """C[..., r, c] = sum_k a[..., r, k] b[..., k, c]."""
    a, b = call.operands()
    return [product(call, a, b)]


@rule_for("__rmatmul__")
def reversed_matmul(call: Call) -> list[Planes]:
    """As ``matmul``, the second argument first."""
    b, a = call.operands()
    return [product(call, a, b)]


@rule_for("outer ger")
def outer(call: Call) -> list[Planes]:
    """C[r, c] = a[r] b[c]."""
    a, b = call.operands()
    return [contract(call.units, [(a, "r"), (b, "c")], "rc", call.where)]


@rule_for("tensordot")
def tensordot(call: Call) -> list[Planes]:
    """Sums over the last dimensions of one tensor and the first of another, or over given ones."""
    a, b = (call.labels(call.argument(position, name)) for position, name in enumerate("ab"))
    dims = call.argument(2, "dims", 2)
    if isinstance(dims, int):
        dims = range(len(a.shape) - dims, len(a.shape)), range(dims)
    letters = iter(string.ascii_letters)
    own = [[next(letters) for _ in labels.shape] for labels in (a, b)]
    for dim, other in zip(*dims, strict=True):
        own[1][other] = own[0][dim]
    first, second = ("".join(one) for one in own)
    out = "".join(letter for letter in first + second if (letter in first) != (letter in second))
    return [contract(call.units, [(a, first), (b, second)], out, call.where, _only_constant(a, b))]


@rule_for("bilinear")
def bilinear(call: Call) -> list[Planes]:
    """y[..., o] = sum_ij x[..., i] w[o, i, j] z[..., j] + b[o]."""
    names = ("input1", "input2", "weight")
    x, z, weight = (call.labels(call.argument(position, name)) for position, name in enumerate(names))
    leading = string.ascii_uppercase[: len(x.shape) - 1]
    operands = [(x, f"{leading}i"), (z, f"{leading}j"), (weight, "oij")]
    planes = contract(call.units, operands, f"{leading}o", call.where, weight=2)
    return with_bias(call, planes, call.argument(3, "bias"), len(leading))


@rule_for("cosine_similarity pairwise_distance vecdot")
def compare(call: Call) -> list[Planes]:
    """Two tensors are compared along a dimension: what is zero in both does not count."""
    a, b = call.operands()
    count = max(len(a.shape), len(b.shape))
    default = 1 if call.function is F.cosine_similarity else -1
    dim = default if call.function is F.pairwise_distance else call.argument(2, "dim", default)
    letters = string.ascii_lowercase[:count]
    out = letters.replace(letters[dim % count], "")
    planes = contract(call.units, [(aligned(x, count), letters) for x in (a, b)], out, call.where)
    same_dims = len(call.shapes[0]) == count
    return [[plane.unsqueeze(dim % count) for plane in planes] if same_dims else planes]


@rule_for("cdist")
def distances(call: Call) -> list[Planes]:
    """C[..., r, c] is the distance of a[..., r, :] from b[..., c, :]."""
    a, b = call.operands()
    batch = string.ascii_uppercase[: max(len(a.shape), len(b.shape)) - 2]
    operands = [(x, f"{batch[len(batch) - len(x.shape) + 2 :]}{dim}k") for x, dim in ((a, "r"), (b, "c"))]
    return [contract(call.units, operands, f"{batch}rc", call.where)]


@rule_for("addmm baddbmm addmv")
def addmm(call: Call) -> list[Planes]:
    """A matrix product, added to another tensor."""
    added, a, b = call.operands()
    shape = call.shapes[0]
    planes = product(call, a, b)
    if added.constant:
        call.units.mark(added.ids(), OUT)
    return [merge(call.units, [Labels(shape, tuple(planes)), aligned(added, len(shape))], call.where)]


@rule_for("einsum")
def einsum(call: Call) -> list[Planes] | None:
    """Any sum of products; None for a diagonal or the form with lists, which are not understood."""
    equation = call.argument(0, "equation")
    if not isinstance(equation, str):
        return None
    labels = call.operands()
    terms, _, out = equation.replace(" ", "").partition("->")
    own = terms.split(",")
    dots = max(len(x.shape) - len(term.replace("...", "")) for x, term in zip(labels, own, strict=True))
    spare = "".join(c for c in string.ascii_letters if c not in equation)[: max(dots, 0)]
    if "->" not in equation:
        out = ("..." if dots else "") + "".join(sorted(c for c in {*terms} - {*".,"} if terms.count(c) == 1))
    full = []
    for x, term in zip(labels, own, strict=True):
        width = len(x.shape) - len(term.replace("...", ""))
        full.append(term.replace("...", spare[len(spare) - width :]))
    if any(len({*term}) < len(term) for term in full):
        return None
    operands = list(zip(labels, full, strict=True))
    return [contract(call.units, operands, out.replace("...", spare), call.where, _only_constant(*labels))]


@rule_for("scaled_dot_product_attention")
def attention(call: Call) -> list[Planes]:
    """softmax(q k^T + mask) v: whole heads are units."""
    query, key, value = (call.labels(call.argument(i, name)) for i, name in enumerate(("query", "key", "value")))
    mask = call.argument(3, "attn_mask")
    if call.kwargs.get("enable_gqa", False):
        key, value = (_repeat_heads(labels, query) for labels in (key, value))
    batch = string.ascii_uppercase[: len(query.shape) - 2]
    scores = contract(call.units, [(query, f"{batch}qe"), (key, f"{batch}ke")], f"{batch}qk", call.where)
    size = (*call.shapes[0][:-1], key.shape[-2])
    weights = Labels(size, tuple(scores))
    if mask is not None:
        planes = merge(call.units, [weights, aligned(call.labels(mask), len(size))], call.where)
        weights = Labels(size, tuple(planes))
    weights = Labels(size, tuple(mix_all(call, weights, [len(size) - 1])))
    return [contract(call.units, [(weights, f"{batch}qk"), (value, f"{batch}ke")], f"{batch}qe", call.where)]


def _repeat_heads(labels: Labels, query: Labels) -> Labels:
    """Return the labels of keys or values, of which several heads of the query share one."""
    dim = len(labels.shape) - 3
    times = query.shape[dim] // labels.shape[dim]
    planes = [p.repeat_interleave(times, dim) if p.shape[dim] > 1 else p for p in labels.planes]
    return Labels((*labels.shape[:dim], query.shape[dim], *labels.shape[dim + 1 :]), tuple(planes))


@rule_for("embedding")
def embedding(call: Call) -> list[Planes]:
    """Rows of a table, by number."""
    index, table = call.argument(0, "input"), call.labels(call.argument(1, "weight"))
    call.units.freeze(call.labels(index).ids(), f"used as an index by {call.where}")
    planes = []
    for plane in table.planes:
        if support(plane) == {1}:
            call.units.mark(plane.reshape(-1), OUT)
            planes.append(plane[(0, *(None,) * (len(call.shapes[0]) - 1))])
        else:
            mix(call.units, plane, [0, 1], f"{call.where}, which reads by number")
    return [planes]


RULES[F.embedding_bag] = embedding
