"""Checks that a layer is an ordinary, storable module with an honest cost."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import math
import pickle

import torch
from torch import Tensor, nn

from lowrank_nn.cost.flops import FlopCounter
from lowrank_nn.layers import CompressedLayer, Packing
from lowrank_nn.testing._tools import TOLERANCE, built, expect, expect_close, expect_same_state, seeded
from lowrank_nn.testing.cases import Case


def check_config(cls: type[CompressedLayer], case: Case) -> None:
    """Constructor arguments are attributes; ``config()`` through JSON and the state dict rebuild the layer."""
    layer, x = built(cls, case), case.input()
    for name in inspect.signature(cls).parameters:
        if name not in ("device", "dtype"):
            expect(hasattr(layer, name), f"constructor argument {name!r} is not an attribute")
    config = json.loads(json.dumps(layer.config()))
    with seeded():
        twin = cls(**config, dtype=case.dtype).train(layer.training)
    twin.load_state_dict(layer.state_dict(), strict=True)
    if case.channels_last:
        twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expect_same_state(twin, layer, "rebuilt from config() and state_dict()")
    expect(twin.config() == layer.config(), f"config() of the rebuilt layer is {twin.config()}, not {layer.config()}")
    expect(torch.equal(twin(x), layer(x)), "the rebuilt layer gives another output")
    expect(torch.equal(twin.dense_weight(), layer.dense_weight()), "the rebuilt layer has another dense_weight()")
    expect(type(layer).__name__ in repr(layer), "repr does not name the class")


def check_copies(cls: type[CompressedLayer], case: Case) -> None:
    """Deep copies, pickles, ``torch.save`` with ``weights_only=True`` and assigned states give the same layer."""
    layer, x = built(cls, case), case.input()
    expected = layer(x)
    for what, twin in (("deepcopy", copy.deepcopy(layer)), ("pickle", pickle.loads(pickle.dumps(layer)))):
        expect_same_state(twin, layer, what)
        expect(torch.equal(twin(x), expected), f"{what}: another output")
        flags = [[p.requires_grad for p in m.parameters()] for m in (twin, layer)]
        expect(flags[0] == flags[1], f"{what}: requires_grad flags changed")
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = cls.empty(device="cpu", dtype=case.dtype, **layer.config()).train(layer.training)
    twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    expect_same_state(twin, layer, "torch.save")
    twin = cls.empty(device="meta", dtype=case.dtype, **layer.config()).train(layer.training)
    twin.load_state_dict(layer.state_dict(), assign=True)
    here = not any(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    expect(here, "load_state_dict(assign=True) left tensors of a layer on the meta device there")
    expect(torch.equal(twin(x), expected), "load_state_dict(assign=True): another output")


def check_weight_is_readable(cls: type[CompressedLayer], case: Case) -> None:
    """``weight`` reads as ``dense_weight()`` and cannot be assigned; ``bias`` reads as the dense layer's."""
    layer, dense = built(cls, case), case.layer()
    expect(torch.equal(layer.weight, layer.dense_weight()), "weight is not dense_weight()")
    for value in (torch.zeros_like(layer.weight), nn.Parameter(torch.zeros_like(layer.weight))):
        try:
            layer.weight = value  # type: ignore[misc]
        except (AttributeError, KeyError):
            continue
        raise AssertionError(f"weight could be assigned a {type(value).__name__}")
    expect((layer.bias is None) == (dense.bias is None), "bias is None where the dense layer's is not, or reverse")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "in_features", "out_features"):
        if hasattr(dense, name):
            own, expected = getattr(layer, name, None), getattr(dense, name)
            expect(own == expected, f"{name} is {own!r}, the dense layer's is {expected!r}")


def check_hooks(cls: type[CompressedLayer], case: Case) -> None:
    """Hooks on the layer and on the leaves of ``stages()`` fire once each, in order."""
    layer, calls = built(cls, case), []
    for name, module in [("layer", layer), *((str(i), stage) for i, stage in enumerate(layer.stages()))]:
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
    layer(case.input())
    count = len(list(layer.stages()))
    inner = [f"{when} {i}" for i in range(count) for when in ("before", "after")]
    expected = ["before layer", *inner, "after layer"]
    expect(calls == expected, f"hooks fired as {calls}, expected {expected}")


def check_cost(cls: type[CompressedLayer], case: Case) -> None:
    """``cost().params`` counts the stored scalars, and twice ``cost().macs`` is what torch's flop counter counts.

    Of what torch counts as nothing, such as Fourier transforms, :class:`lowrank_nn.cost.flops.FlopCounter` knows more.
    """
    layer, x = built(cls, case), case.input(batched=True)
    cost = layer.cost(tuple(x.shape))
    stored = sum(t.numel() for module in layer.modules() for t in (*_weights(module), *_codes(module)))
    expect(cost.params == stored, f"cost().params is {cost.params}, {stored} scalars are stored")
    with FlopCounter() as counter:
        layer(x)
    expect(2 * cost.macs == counter.flops, f"cost().macs is {cost.macs}, {counter.flops} / 2 are counted")
    expect(0 < cost.nonzeros <= cost.params, f"nonzeros is {cost.nonzeros} of {cost.params} params")
    saved = sum(_saved_bytes(module) for module in layer.modules())
    expect(cost.bytes == saved, f"cost().bytes is {cost.bytes}, the tensors as packing() says take {saved}")
    same = layer.cost(case.input_shape)
    expect(same == cost, f"the cost without batch dimension is {same}, of a batch of one {cost}")


def _weights(module: nn.Module) -> list[Tensor]:
    """A module's own parameters, without tables of what its integers stand for."""
    tables = module.tables if isinstance(module, CompressedLayer) else ()
    return [p for name, p in module.named_parameters(recurse=False) if name not in tables]


def _codes(module: nn.Module) -> list[Tensor]:
    """Weights that are stored as integers or in bfloat16; tables beside them (scales, masks) are no parameters."""
    kinds = (torch.int8, torch.uint8, torch.bfloat16)
    return [b for b in module.buffers(recurse=False) if b.dtype in kinds and b.dim() > 1]


def _saved_bytes(module: nn.Module) -> int:
    """Bytes of a module's own tensors, by the rules in the docstring of ``Packing``."""
    packing = module.packing() if isinstance(module, CompressedLayer) else {}
    masks = {rule.mask for rule in packing.values()} - {None}
    own = dict(itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)))
    own = {name: tensor for name, tensor in own.items() if name not in module._non_persistent_buffers_set}
    total = 0
    for name, tensor in own.items():
        rule = packing.get(name, Packing())
        kept = tensor.numel() if rule.mask is None else int(own[rule.mask].expand_as(tensor).sum())
        bits = 1 if name in masks else rule.bits or 8 * tensor.element_size()
        total += math.ceil(kept * bits / 8)
    return total


def check_export(cls: type[CompressedLayer], case: Case) -> None:
    """``torch.export`` captures the layer, and the exported program computes the same."""
    layer, x = built(cls, case).eval(), case.input()
    program = torch.export.export(layer, (x,))
    expect_close(program.module()(x), layer(x), TOLERANCE[case.dtype], "exported program")


def check_compile(cls: type[CompressedLayer], case: Case) -> None:
    """``torch.compile`` captures the layer in one graph, and the compiled layer computes the same."""
    layer, x = built(cls, case).eval(), case.input()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expect_close(compiled(x), layer(x), TOLERANCE[case.dtype], "compiled layer")
