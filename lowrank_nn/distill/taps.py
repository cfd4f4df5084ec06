"""Feature taps: losses on what a layer of a teacher and its counterpart in a student return."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lowrank_nn.distill.balance import FeatureLoss, Weight
from lowrank_nn.distill.features import attention_loss, guidance_loss
from lowrank_nn.distill.recording import Recorder
from lowrank_nn.distill.regressor import HintRegressor, output_width
from lowrank_nn.errors import LowRankError, OptionError, TrainingError

Kind = Literal["guidance", "hint", "attention"]

PATHS_SHOWN = 50


class FeatureTap(FeatureLoss):
    r"""The distance between the features of one layer of a teacher and of its counterpart in a student.

    Run the teacher (best under ``torch.no_grad()``), run the student, then call :meth:`total` (or the tap itself, for
    the guidance without weight). The two layers are watched by forward hooks, until :meth:`remove` or the end of a
    ``with`` block. ``kind``:

    - "guidance": :math:`\frac{1}{2N} \|u - r\|^2`, student and teacher features of the same shape.
    - "hint": the same with :math:`u` mapped by a trainable 1x1 regressor to the teacher's width, if the widths differ.
    - "attention": the distance of normalised attention maps; widths and sizes may differ.

    A layer that runs several times in one forward is compared call by call, in order, and the losses are added. Of a
    tuple the first tensor counts. Teacher features carry no gradient. The student is recorded only while gradients are
    enabled, so evaluating it under ``no_grad`` leaves no trace; evaluate a tapped teacher under :meth:`paused`. A tap
    does not own the two layers: its ``parameters()`` are the regressor's (give them to the optimizer). Copies of
    the layers carry no working hook, and a copy of a tap is a removed tap. Layers under activation checkpointing
    run again in the backward pass and cannot be tapped; tap before a model compiled with ``torch.compile`` first runs.

    Args:
        layer: The teacher's layer.
        student_layer: Its counterpart; None: see :meth:`attach`.
        kind: "guidance", "hint" or "attention".
        weight: See :class:`FeatureLoss`.
        guidance_first: See :class:`FeatureLoss`.
        widths: Channels of the student's and of the teacher's features, for "hint" on layers that do not state them
            (``out_channels``, ``out_features``).
        channel_dim: Dimension of the channels, for "hint" and "attention". None: 1 for features of four dimensions or
            more, the last for fewer.

    Raises:
        OptionError: An option out of range, or widths that are needed and not known.

    References:
        Romero et al., "FitNets: hints for thin deep nets" (2015); Zagoruyko and Komodakis (2017).
    """

    def __init__(
        self,
        layer: nn.Module,
        student_layer: nn.Module | None = None,
        *,
        kind: Kind = "guidance",
        weight: Weight = 1.0,
        guidance_first: float = 0.0,
        widths: tuple[int, int] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__(weight=weight, guidance_first=guidance_first)
        if kind not in get_args(Kind):
            raise OptionError(f"FeatureTap: kind must be one of {get_args(Kind)}, got {kind!r}.")
        if widths is not None and kind != "hint":
            raise OptionError(f'FeatureTap: widths are for kind="hint", got kind={kind!r}. Leave them out.')
        self.kind = kind
        self.widths = widths
        self.channel_dim = channel_dim
        self.regressor: HintRegressor | None = None
        self._student: Recorder | None = None
        self._teacher: Recorder | None = Recorder(layer, keep_graph=False)
        if student_layer is not None:
            try:
                self.attach(student_layer)
            except LowRankError:
                self.remove()
                raise

    def attach(self, student_layer: nn.Module) -> Self:
        """Watch ``student_layer`` as the counterpart, instead of any earlier one; returns the tap.

        With ``kind="hint"`` this builds the regressor where the widths differ: make the optimizer afterwards.

        Raises:
            OptionError: The layer is the teacher's own, or its width is needed and not known.
            TrainingError: The tap was removed.
        """
        if self._teacher is None:
            raise TrainingError("FeatureTap: this tap was removed. Make a new one.")
        if student_layer is self._teacher.layer:
            raise OptionError(
                f"FeatureTap: teacher and student share this layer ({type(student_layer).__name__}), so there is "
                "nothing to learn. Pass the layer of a copy."
            )
        if self.kind == "hint":
            self.regressor = self._make_regressor(self._teacher.layer, student_layer)
        if self._student is not None:
            self._student.remove()
        self._student = Recorder(student_layer, keep_graph=True)
        return self

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return guidance and energy (both scalars) of the features recorded, and forget these.

        Raises:
            TrainingError: Teacher and student have not both run since the last call, or the tap was removed.
            OptionError: Features whose shapes do not fit together.
        """
        if self._teacher is None or self._student is None:
            state = "was removed; make a new one" if self._teacher is None else "has no student layer; call attach()"
            raise TrainingError(f"FeatureTap: this tap {state}.")
        teacher, student = self._teacher.take(), self._student.take()
        if not student or len(student) != len(teacher):
            raise TrainingError(
                f"FeatureTap: the teacher's layer ran {len(teacher)} times and the student's {len(student)} times "
                "(with gradients enabled) since the last loss; both must run, equally often. Run both models before "
                "each loss, and evaluate under paused()."
            )
        pairs = [(u if self.regressor is None else self.regressor(u), r) for u, r in zip(student, teacher, strict=True)]
        guidance = torch.stack([self._distance(u, r) for u, r in pairs]).sum()
        energy = torch.stack([self._distance(torch.zeros_like(r), r) for _, r in pairs]).sum()
        return guidance, energy

    def recorders(self) -> Iterator[Recorder]:
        """Yield the recorders that are in place."""
        yield from (recorder for recorder in (self._teacher, self._student) if recorder is not None)

    def remove(self) -> None:
        """Take the hooks off both layers. The regressor stays."""
        for recorder in self.recorders():
            recorder.remove()
        self._teacher = self._student = None

    def extra_repr(self) -> str:
        """Show the options."""
        return f"kind={self.kind!r}, weight={self.weight!r}, guidance_first={self.guidance_first}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_teacher": None, "_student": None}

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "attention":
            return attention_loss(student, teacher, channel_dim=self.channel_dim)
        return guidance_loss(student, teacher)

    def _make_regressor(self, layer: nn.Module, student_layer: nn.Module) -> HintRegressor | None:
        student, teacher = self.widths or (output_width(student_layer), output_width(layer))
        if student == teacher:
            return None
        like = next(student_layer.parameters(), torch.empty(0, dtype=torch.float32))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return HintRegressor(student, teacher, channel_dim=self.channel_dim, device=like.device, dtype=dtype)


class Guidance(FeatureLoss):
    """Taps on many layers of a teacher and a student: ``total = task + lambda * sum over taps``.

    Runs like a single :class:`FeatureTap`: teacher, student, then :meth:`total`. A compressed copy has the
    counterpart of every layer at the same dotted path. The module does not own the two models: its ``parameters()`` are
    the regressors' of ``kind="hint"`` (give them to the optimizer).

    Args:
        teacher: The model to learn from.
        student: The model that learns.
        paths: Dotted paths of the layers to tap in both models, or a mapping of teacher paths to student paths.
        kind: "guidance", "hint" or "attention", as in :class:`FeatureTap`.
        weight: Weight of the sum over taps; see :class:`FeatureLoss`.
        guidance_first: See :class:`FeatureLoss`.
        widths: ``(student, teacher)`` channels by teacher path, for "hint" on layers that do not state them.
        channel_dim: As in :class:`FeatureTap`.

    Raises:
        OptionError: No paths, paths that a model does not have (all of them are listed), or an option out of range.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        paths: Iterable[str] | Mapping[str, str],
        *,
        kind: Kind = "guidance",
        weight: Weight = 1.0,
        guidance_first: float = 0.0,
        widths: Mapping[str, tuple[int, int]] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__(weight=weight, guidance_first=guidance_first)
        self.paths = _path_pairs(paths)
        self.kind = kind
        widths = widths or {}
        if unknown := widths.keys() - self.paths.keys():
            raise OptionError(f"Guidance: widths for paths that are not tapped: {sorted(unknown)}.")
        layers = _find(teacher, self.paths, "teacher")
        counterparts = _find(student, self.paths.values(), "student")
        self.taps = nn.ModuleList()
        try:
            for path, layer, counterpart in zip(self.paths, layers, counterparts, strict=True):
                with _located(path):
                    tap = FeatureTap(layer, counterpart, kind=kind, widths=widths.get(path), channel_dim=channel_dim)
                self.taps.append(tap)
        except LowRankError:
            self.remove()
            raise

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return guidance and energy, each summed over the taps, and forget the features recorded.

        Raises:
            TrainingError: A tap's layers have not both run since the last call, or the taps were removed.
            OptionError: Features whose shapes do not fit together.
        """
        measured = []
        try:
            for path, tap in zip(self.paths, self._taps(), strict=True):
                with _located(path):
                    measured.append(tap.measure())
        finally:
            self.clear()
        guidance, energy = (torch.stack(values).sum() for values in zip(*measured, strict=True))
        return guidance, energy

    def recorders(self) -> Iterator[Recorder]:
        """Yield the recorders that are in place."""
        for tap in self._taps():
            yield from tap.recorders()

    def remove(self) -> None:
        """Take all hooks off both models. The regressors stay."""
        for tap in self._taps():
            tap.remove()

    def extra_repr(self) -> str:
        """Show the options."""
        return f"paths={list(self.paths)}, weight={self.weight!r}, guidance_first={self.guidance_first}"

    def _taps(self) -> Iterable[FeatureTap]:
        return cast("Iterable[FeatureTap]", self.taps)


def _path_pairs(paths: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Return student paths by teacher path."""
    if isinstance(paths, str):
        paths = [paths]
    pairs = dict(paths) if isinstance(paths, Mapping) else {path: path for path in paths}
    if not pairs:
        raise OptionError("Guidance: paths is empty. Name at least one layer to tap.")
    return pairs


def _find(model: nn.Module, paths: Iterable[str], role: str) -> list[nn.Module]:
    """Return the modules at ``paths``; all paths that are missing are named in one error."""
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [path for path in paths if path not in modules]
    if missing:
        names = [name for name in modules if name]
        close = sorted({name for path in missing for name in difflib.get_close_matches(path, names)})
        more = f" and {len(names) - PATHS_SHOWN} more" if len(names) > PATHS_SHOWN else ""
        hint = f" Close: {', '.join(close)}." if close else ""
        raise OptionError(
            f"Guidance: the {role} has no module at {missing}.{hint} Its modules: "
            f"{', '.join(names[:PATHS_SHOWN])}{more}."
        )
    return [modules[path] for path in paths]


@contextlib.contextmanager
def _located(path: str) -> Iterator[None]:
    """Put the dotted path in front of errors raised inside."""
    try:
        yield
    except LowRankError as error:
        raise error.at(path) from error
