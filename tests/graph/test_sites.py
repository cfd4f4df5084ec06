"""One recorded forward: which layers are called, in which order, with which shapes."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph import Call, call_model, find_sites, record, replace_module
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.layers import SVDConv2d, SVDLinear
from tests.zoo import ZOO

NEVER_CALLED = {
    "transformer": ["encoder.layers.0.self_attn.out_proj", "encoder.layers.1.self_attn.out_proj"],
    "control_flow": ["dark"],
}


def hooked_calls(model, inputs):
    """Paths in the order of their calls, and the shapes there, seen by ordinary forward hooks."""
    calls = []
    paths = {module: path for path, module in model.named_modules()}

    def hook(module, args, kwargs, output):
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        output = output[0] if isinstance(output, tuple) else output
        calls.append((paths[module], tuple(first.shape), tuple(output.shape)))

    leaves = [m for m in paths if next(m.children(), None) is None and next(m.parameters(), None) is not None]
    handles = [leaf.register_forward_hook(hook, with_kwargs=True) for leaf in leaves]
    with torch.no_grad():
        call_model(model, inputs)
    for handle in handles:
        handle.remove()
    return calls


def equal(a, b):
    return type(a) is type(b) and all(map(torch.equal, tensors(a), tensors(b)))


@pytest.mark.parametrize("name", ZOO)
def test_records_every_model_of_the_zoo(name):
    model, inputs = ZOO[name]()
    recording = record(model, inputs)
    want = hooked_calls(model, inputs)
    first_calls = list(dict.fromkeys(path for path, _, _ in want))
    assert [site.path for site in recording.sites] == first_calls + NEVER_CALLED.get(name, [])
    for site in recording.sites:
        calls = [Call(*shapes) for path, *shapes in want if path == site.path]
        assert list(site.calls) == calls
        assert site.inside is None
        assert site.layer is model.get_submodule(site.path)
        assert recording[site.path] is site
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        expected = call_model(model, inputs)
    torch.backends.mha.set_fastpath_enabled(True)
    assert equal(recording.output, expected)


def test_every_parameter_of_the_zoo_belongs_to_a_site_or_is_named_here():
    bare = {
        "vit": {"class_token", "position"},
        "transformer": {f"encoder.layers.{i}.self_attn.in_proj_{kind}" for i in (0, 1) for kind in ("weight", "bias")},
    }
    for name, build in ZOO.items():
        model, _ = build()
        held = {id(p) for site in find_sites(model) for p in site.layer.parameters()}
        left = {path for path, parameter in model.named_parameters() if id(parameter) not in held}
        assert left == bare.get(name, set())


def test_the_model_itself_may_be_the_layer():
    layer = nn.Linear(3, 5)
    recording = record(layer, torch.zeros(7, 3))
    assert [(site.path, site.layer, site.calls) for site in recording.sites] == [("", layer, (Call((7, 3), (7, 5)),))]


def test_shared_reused_and_tied_layers():
    model, inputs = ZOO["tied"]()
    recording = record(model, inputs)
    conv, mix = recording["block1.conv"], recording["mix"]
    assert conv.aliases == ("block2.conv",)
    assert len(conv.calls) == len(mix.calls) == 2
    assert recording["block2.conv"] is conv
    assert recording["embed"].tied_to == ("output.weight",)
    assert recording["output"].tied_to == ("embed.weight",)
    assert conv.tied_to == mix.tied_to == ()


def test_attention_reads_the_weights_of_out_proj_and_never_calls_it():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    recording = record(attention, {"query": x, "key": x, "value": x})
    assert [site.path for site in recording.sites] == ["out_proj"]
    assert recording["out_proj"].calls == ()
    # in_proj, scores, values, out_proj
    assert recording.other_macs == 10 * 8 * 24 + 2 * 2 * 5 * 5 * 8 + 10 * 8 * 8


def test_layers_inside_compressed_layers():
    model, inputs = ZOO["lenet5"]()
    replace_module(model, "conv2", SVDConv2d.from_pretrained_layer(model.conv2, rank=4))
    replace_module(model, "conv2.expand", SVDConv2d.from_pretrained_layer(model.conv2.expand, rank=2))
    recording = record(model, inputs)
    inside = {site.path: site.inside for site in recording.sites if site.path.startswith("conv2")}
    assert inside == {
        "conv2": None,
        "conv2.reduce": "conv2",
        "conv2.expand": "conv2",
        "conv2.expand.reduce": "conv2.expand",
        "conv2.expand.expand": "conv2.expand",
    }
    assert all(len(recording[path].calls) == 1 for path in inside)


def test_a_compressed_model_root_encloses_its_layers():
    layer = SVDLinear(4, 6, rank=2)
    assert {site.path: site.inside for site in find_sites(layer)} == {"": None, "reduce": "", "expand": ""}


def test_layers_with_keywords_containers_and_no_tensors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, name, *, data):
            return {"name": name, "out": [data["x"] * self.gain]}

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, text):
            return text

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.silent, self.fc = Odd(), Silent(), nn.Linear(3, 2)

        def forward(self, x):
            return self.silent("label"), self.fc(input=self.odd("a", data={"x": x})["out"][0])

    recording = record(Model(), torch.zeros(4, 3))
    assert recording["odd"].calls == (Call((4, 3), (4, 3)),)
    assert recording["silent"].calls == (Call((), ()),)
    assert recording["fc"].calls == (Call((4, 3), (4, 2)),)
    assert recording.output[0] == "label"


def test_how_example_inputs_are_passed():
    class Echo(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    @dataclasses.dataclass
    class Batch:
        x: int = 1

    Pair = collections.namedtuple("Pair", "a b")
    echo, x = Echo(), torch.zeros(1)
    assert call_model(echo, x) == ((x,), {})
    assert call_model(echo, (1, 2)) == ((1, 2), {})
    assert call_model(echo, [1, 2]) == ((1, 2), {})
    assert call_model(echo, {"a": 1}) == ((), {"a": 1})
    assert call_model(echo, collections.UserDict(a=1)) == ((), {"a": 1})
    assert call_model(echo, Batch(2)) == ((Batch(2),), {})
    assert call_model(echo, Pair(1, 2)) == ((Pair(1, 2),), {})
    assert call_model(echo, ({"a": 1},)) == (({"a": 1},), {})
    assert call_model(echo, None) == ((None,), {})


def test_packed_sequences():
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    recording = record(nn.GRU(3, 5), packed)
    assert recording.sites[0].calls == (Call((6, 3), (6, 5)),)


class Calls(nn.Module):
    """A layer, called in the way of ``how``."""

    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(3, 5), how

    def forward(self, x):
        return self.how(self.fc, x)


def gradient(fc, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fc(x).sum(), x)[0]


def in_inference_mode(fc, x):
    with torch.inference_mode():
        return fc(x)


@pytest.mark.parametrize(
    "how",
    [
        gradient,
        in_inference_mode,
        torch.utils.checkpoint.checkpoint,
        lambda fc, x: fc.forward(x),
        lambda fc, x: torch.func.functional_call(fc, dict(fc.named_parameters()), x),
    ],
)
@pytest.mark.filterwarnings("ignore:.*use_reentrant", "ignore:None of the inputs have requires_grad")
def test_unusual_calls(how):
    assert record(Calls(how), torch.randn(4, 3))["fc"].calls == (Call((4, 3), (4, 5)),)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_count_all_their_positions(layout):
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)
    assert record(Calls(lambda fc, x: fc(x)), (x,))["fc"].calls == (Call((6, 3), (6, 5)),)


def test_meta_models_are_recorded_too():
    model, inputs = ZOO["resnet20"]()
    on_cpu = record(model, inputs)
    on_meta = record(model.to("meta"), inputs.to("meta"))
    assert [site.calls for site in on_meta.sites] == [site.calls for site in on_cpu.sites]
    assert on_meta.other_macs == on_cpu.other_macs


def test_parametrized_layers_and_norms_without_parameters_are_sites():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4, affine=False), nn.ReLU())
    assert [site.path for site in record(model, torch.randn(5, 3)).sites] == ["0", "1"]


def test_models_compiled_in_place_are_recorded_uncompiled():
    model = nn.Sequential(nn.Linear(3, 4))
    compilations = []
    model.compile(backend=lambda graph, inputs: compilations.append(graph) or graph.forward)
    compiled = model._compiled_call_impl
    assert len(record(model, torch.randn(2, 3))["0"].calls) == 1
    assert not compilations
    assert model._compiled_call_impl is compiled


def test_missing_path():
    recording = record(nn.Sequential(nn.Linear(3, 4)), torch.zeros(1, 3))
    with pytest.raises(PlanError, match=r"no layer at 'fc'. There are: 0\."):
        recording["fc"]


def test_compiled_scripted_and_lazy_models_are_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(UnsupportedLayerError, match="Pass the original module"):
        record(torch.compile(model, backend="eager"), torch.zeros(1, 3))
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(UnsupportedLayerError, match=r"^0: .*Pass the original module"):
        record(nn.Sequential(scripted), torch.zeros(1, 3))
    with pytest.raises(UnsupportedLayerError, match=r"^0: LazyLinear has no weight yet"):
        record(nn.Sequential(nn.LazyLinear(3)), torch.zeros(1, 3))
    with pytest.raises(PlanError, match=r"expected an nn\.Module, got function"):
        record(lambda x: x, torch.zeros(1))


def test_an_error_of_the_forward_is_chained_with_what_was_passed():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(PlanError, match=r"Tensor\(\[2, 5\], torch\.float32, cpu\): RuntimeError: mat1") as caught:
        record(model, torch.zeros(2, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(PlanError, match=r"\{'y': Tensor\(\[2, 3\], torch\.float64, meta\), 'z': \(int\)\}: TypeError"):
        record(model, {"y": torch.zeros(2, 3, dtype=torch.float64, device="meta"), "z": (1,)})
