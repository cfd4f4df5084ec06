"""Means and variances over units that a forward writes out: those by which it normalises the units, and others."""

from __future__ import annotations

import itertools

from lowrank_nn.graph.rules._call import Call, Rule
from lowrank_nn.graph.rules.elementwise import elementwise
from lowrank_nn.graph.rules.movement import expansion, movement, reshape
from lowrank_nn.graph.rules.parts import getitem
from lowrank_nn.graph.units import Mean

_PASS_ON = frozenset({elementwise, movement, reshape, expansion, getitem})


def means_left(rule: Rule | None, call: Call) -> tuple[Mean, ...]:
    """Return the means in the arguments of a call that go on in its result, having not met their units yet.

    One that does meets them in order to normalise them: it is to be a mean over those that stay. Where a mean goes into
    anything but moves and element-wise operations, its units are frozen.
    """
    means = [mean for labels in call.known.values() for mean in labels.means]
    if rule not in _PASS_ON:
        call.units.freeze_means(means)
        return ()
    planes = [plane for labels in call.operands() for plane in labels.planes] if rule is elementwise else []
    met = [any(call.units.same(mean.ids, plane.reshape(-1)) for plane in planes) for mean in means]
    for mean in itertools.compress(means, met):
        call.units.note_mean(mean)
    return tuple(mean for mean, has_met in zip(means, met, strict=True) if not has_met)
