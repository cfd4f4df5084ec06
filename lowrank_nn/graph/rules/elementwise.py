"""Element-wise operations: what stands at the same place goes together."""

from __future__ import annotations

from torch import Tensor

from lowrank_nn.graph.labels import Labels, merge
from lowrank_nn.graph.rules._call import Call, Planes, aligned, rule_for

ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh
    atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip conj
    copysign cos cosh deg2rad digamma div divide eq elu erf erfc erfinv exp exp2 expit expm1 fix float_power floor
    floor_divide fmax fmin fmod frac ge gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh
    heaviside hypot isclose isfinite isinf isnan isneginf isposinf le leaky_relu lerp less less_equal lgamma log log10
    log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid lt masked_fill
    bitwise_left_shift bitwise_right_shift erfcx gcd i0 i0e i1 i1e lcm ldexp log_ndtr mvlgamma ndtr nextafter polygamma
    maximum minimum mish mul multiply nan_to_num ne neg negative not_equal positive pow rad2deg reciprocal relu relu6
    remainder round rrelu rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign
    sqrt square sub subtract tan tanh tanhshrink threshold true_divide trunc where xlogy
    dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d feature_dropout
    complex polar conj_physical resolve_conj resolve_neg
    zeros_like ones_like empty_like full_like rand_like randn_like fill zero bernoulli normal uniform copy clone
    contiguous detach to type type_as float double half bfloat16 int long short bool byte char cpu cuda real imag data
    requires_grad_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
    __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __floordiv__ __rfloordiv__ __ifloordiv__ __mod__ __rmod__
    __imod__ __pow__ __rpow__ __ipow__ __neg__ __pos__ __abs__ __and__ __rand__ __iand__ __or__ __ror__ __ior__
    __xor__ __rxor__ __ixor__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
"""

FIRST_ONLY = frozenset({Tensor.to, Tensor.type_as})
"""Functions that take nothing but the dtype and device of further tensors."""


@rule_for(ELEMENTWISE)
def elementwise(call: Call) -> list[Planes]:
    """Unite what meets."""
    operands = call.operands()[:1] if call.function in FIRST_ONLY else call.operands()
    if len(operands) == 1:
        return [list(operands[0].planes)]
    if all(labels.constant for labels in operands):
        operands.sort(key=lambda labels: -labels.constant)  # of a weight times a mask, the weight computes the units
    dims = max(len(shape) for shape in call.shapes)
    return [merge(call.units, [aligned(labels, dims) for labels in operands], call.where)]


def per_channel(call: Call, planes: Planes, parameters: list[Labels], dim: int = 1) -> Planes:
    """Return the planes after meeting parameters whose first dimension stands along ``dim`` of the result."""
    shape = call.shapes[0]
    own = Labels(shape, tuple(planes))
    others = [aligned(labels, len(shape), dim) for labels in parameters if labels.shape]
    return merge(call.units, [own, *others], call.where)


@rule_for("prelu")
def prelu(call: Call) -> list[Planes]:
    """Unite the channels with their slopes."""
    slopes = call.labels(call.argument(1, "weight"))
    return [per_channel(call, list(call.first.planes), [slopes], min(1, len(call.first.shape) - 1))]


@rule_for("fake_quantize_per_tensor_affine")
def fake_quantize(call: Call) -> list[Planes]:
    """Round to a grid; its scale is for all elements."""
    return [list(call.first.planes)]


@rule_for("fake_quantize_per_channel_affine")
def fake_quantize_per_channel(call: Call) -> list[Planes]:
    """Round to a grid for each channel, whose scale goes with it."""
    grids = [call.labels(call.argument(1, "scale")), call.labels(call.argument(2, "zero_point"))]
    return [per_channel(call, list(call.first.planes), grids, call.argument(3, "axis"))]
