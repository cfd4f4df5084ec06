"""The step that trains: distillation from the given model, unless told otherwise."""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lowrank_nn.distill import FeatureLoss, Guidance, distill_loss
from lowrank_nn.errors import OptionError, PlanError, check_whole_number
from lowrank_nn.graph import call_model
from lowrank_nn.graph.sites import describe_paths
from lowrank_nn.layers import BinaryLayer, QuantLayer
from lowrank_nn.pipeline import distributed
from lowrank_nn.pipeline.batches import class_logits, device_of, split_batch
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.pipeline.training import Trainer, modes_kept
from lowrank_nn.planning import BatchLoss

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
MakeGuidance = Callable[[nn.Module, nn.Module], FeatureLoss]
Penalty = Callable[[nn.Module], Tensor]


class FineTune(Step):
    """Train the compressed model on the outputs of the model that was given.

    The default loss is Hinton's, alpha T^2 KL(teacher || student) + (1 - alpha) CE(student, targets), without the
    second term where batches carry no targets. Of several tensors that a model returns it takes ``.logits``,
    ``["logits"]`` or else the first; layers that this leaves untrained are named in the report. A batch is
    ``(inputs, targets)``, a dict with ``labels`` or ``targets``, inputs and targets in one flat list for a model of
    several arguments, or inputs alone; the model is called with the inputs as with ``example_inputs``. Batches may lie
    on another device than the model.

    All modules are set to train mode; a model that is given in train mode keeps the modes of its modules, so that
    normalisation that is frozen in eval mode stays frozen. Parameters without ``requires_grad`` are not trained, nor
    are quantized layers whose weight had none in the given model. Masked weights stay zero. Quantized and binary
    layers train through the rounding (straight-through) and are integers again afterwards.

    Started by ``torchrun``, every process trains on its share of the batches under ``DistributedDataParallel``, and all
    end with the same model; put the model on the process's device before compressing it. A loader with a
    ``DistributedSampler`` deals out its data; of any other loader, n processes take every n-th batch, so that a step
    learns from n batches. A loss gets the model wrapped, and must call it rather than parts of it.

    Args:
        loader: Batches, gone through once per epoch: a ``DataLoader``, a list, anything with a length.
        epochs: Number of epochs.
        optimizer: Function of the parameters that makes the optimizer; left out, AdamW with ``lr``.
        schedule: Function of optimizer and number of steps that makes the learning rate schedule, stepped after every
            batch; left out, 5 % linear warm-up and then half a cosine to zero.
        lr: Learning rate of the default optimizer. A large one first destroys a good start.
        teacher: Model to learn from, called like the given model, which it is if left out; never changed. For a model
            that was compressed in an earlier call, name the dense one.
        loss: ``loss(model, batch)``, a scalar, in place of distillation. Any form of batch is possible then.
        temperature: Temperature T of the default loss.
        alpha: Share of the distillation term in the default loss, from 0 to 1.
        class_dim: Dimension of the classes in the logits, for the default loss; -1 for ``(N, length, C)``.
        ignore_index: Target that is left out of the default loss.
        guidance: Dotted paths of layers whose features follow the teacher's, with balanced weight; or a function of
            teacher and student that makes a :class:`lowrank_nn.distill.Guidance`. Added to the loss.
        regularizer: ``regularizer(model)``, a scalar added to the loss, such as :class:`lowrank_nn.GroupLasso`.
        evaluate: ``evaluate(model)``, a number that is better when larger; called after every epoch, in eval mode and
            without gradients, and in every process (the mean over processes counts).
        restore_best: Whether to end with the state of the best evaluation instead of the last; the state before
            training is evaluated too.
        checkpoint: File to write after every epoch, and to go on from if it is there: what an interrupted run continues
            to is bit for bit what it would have been. Loaders whose persistent workers draw random numbers are an
            exception. A finished checkpoint is read instead of training again.
        autocast: ``torch.bfloat16`` to run teacher, student and loss in mixed precision (parameters stay as they are);
            about twice as fast on CPUs with bfloat16 instructions and on GPUs.

    Raises:
        OptionError: An argument out of range, or ``restore_best`` without ``evaluate``.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """

    def __init__(
        self,
        loader: Any,
        epochs: int,
        *,
        optimizer: MakeOptimizer | None = None,
        schedule: MakeSchedule | None = None,
        lr: float = 3e-4,
        teacher: nn.Module | None = None,
        loss: BatchLoss | None = None,
        temperature: float = 4.0,
        alpha: float = 0.9,
        class_dim: int = 1,
        ignore_index: int = -100,
        guidance: Sequence[str] | MakeGuidance | None = None,
        regularizer: Penalty | None = None,
        evaluate: Callable[[nn.Module], float] | None = None,
        restore_best: bool = False,
        checkpoint: str | Path | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        check_whole_number("FineTune: epochs", epochs, 1)
        _check_numbers(lr, temperature, alpha)
        if restore_best and evaluate is None:
            raise OptionError("FineTune: restore_best needs evaluate=..., a function of the model.")
        if autocast not in (None, torch.bfloat16):
            raise OptionError(
                f"FineTune: autocast must be torch.bfloat16 or None, got {autocast!r}; float16 needs scaling."
            )
        _check_functions(optimizer=optimizer, schedule=schedule, loss=loss, regularizer=regularizer, evaluate=evaluate)
        if not (teacher is None or isinstance(teacher, nn.Module)):
            raise OptionError(f"FineTune: teacher must be an nn.Module, got {type(teacher).__name__}.")
        if not _has_epochs(loader):
            raise OptionError(
                f"FineTune: loader must have a length and be iterable once per epoch, got {type(loader).__name__}. "
                "Wrap a generator in a list or a DataLoader."
            )
        self.loader, self.epochs, self.lr, self.loss = loader, epochs, lr, loss
        self.optimizer = optimizer or self._adamw
        self.schedule = schedule or warm_cosine
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha
        self.class_dim, self.ignore_index = class_dim, ignore_index
        self.guidance = [guidance] if isinstance(guidance, str) else guidance
        self.regularizer = regularizer
        self.evaluate, self.restore_best = evaluate, restore_best
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.autocast = autocast

    def _shown(self) -> dict[str, Any]:
        names = ("epochs", "lr", "loss", "temperature", "alpha", "guidance", "regularizer", "evaluate", "restore_best")
        return {name: getattr(self, name) for name in (*names, "checkpoint", "autocast")}

    def decide(self, state: State) -> list[Decision]:
        """Training changes no structure: no decisions.

        Raises:
            PlanError: A path in ``guidance`` is not in the model.
        """
        if self.guidance is not None and not callable(self.guidance):
            teacher = self.teacher or state.dense
            paths = [name for name, _ in teacher.named_modules(remove_duplicate=False)]
            missing = [path for path in self.guidance if path not in paths]
            if missing:
                raise PlanError(f"FineTune: no layers {', '.join(missing)} for guidance. {describe_paths(paths)}")
        return []

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Train the model of ``state`` in place; modes and the form of quantized layers are as before afterwards.

        Raises:
            TrainingError: The loss is not finite, nothing is trainable, or the checkpoint belongs to another model.
        """
        if state.dry:
            return
        device = device_of(state.model)
        distributed.join_processes(device)
        with trainable(state.model, state.dense):
            teacher = teacher_of(self.teacher or state.dense)
            guidance = self._make_guidance(teacher, state.model)
            try:
                trainer = Trainer(self, state, guidance, device)
                trainer.run(self._loss(state, teacher, guidance, device))
            finally:
                if guidance is not None:
                    guidance.remove()
            self._remark_untrained(state, trainer.unreached or set())

    def _remark_untrained(self, state: State, unreached: set[str]) -> None:
        """Have the report name the layers that work in the model and that the loss does not depend on."""
        why = "the loss does not depend on it"
        if self.loss is None:
            why = "the default loss learns from the first output alone. Pass loss=..., a function of model and batch"
        trainable = {name for name, p in state.model.named_parameters() if p.requires_grad}
        for site in state.original.sites:
            own = {name for name in trainable if name.startswith(f"{site.path}.")}
            if site.inside is None and (site.calls or site.weight_reads) and own and own <= unreached:
                state.remark(site.path, f"FineTune: not trained, {why}")

    def _make_guidance(self, teacher: nn.Module, student: nn.Module) -> FeatureLoss | None:
        if self.guidance is None:
            return None
        if callable(self.guidance):
            return self.guidance(teacher, student)
        return Guidance(teacher, student, self.guidance, weight="balanced")

    def _loss(self, state: State, teacher: nn.Module, guidance: FeatureLoss | None, device: torch.device) -> BatchLoss:
        """Return the loss of one batch: the task's, and guidance and regularizer on top."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            mixed = self.autocast is not None
            with torch.autocast(device.type, dtype=self.autocast) if mixed else contextlib.nullcontext():
                value = self._task_loss(model, batch, teacher, state.example_inputs, guided=guidance is not None)
                if guidance is not None:
                    value = guidance.total(value)
            # Of the model itself: the wrapper of several processes has other names for its parts.
            return value if self.regularizer is None else value + self.regularizer(state.model)

        return loss

    def _task_loss(
        self, model: nn.Module, batch: Any, teacher: nn.Module, example_inputs: Any, *, guided: bool
    ) -> Tensor:
        """Return the user's loss, or else that of distillation; for either, a guidance wants the teacher to run."""
        if self.loss is not None and not guided:
            return self.loss(model, batch)
        inputs, targets = split_batch(batch, example_inputs)
        with torch.no_grad():
            expected = call_model(teacher, inputs)
        if self.loss is not None:
            return self.loss(model, batch)
        return distill_loss(
            class_logits(call_model(model, inputs), inputs),
            class_logits(expected, inputs),
            targets,
            temperature=self.temperature,
            alpha=self.alpha,
            class_dim=self.class_dim,
            ignore_index=self.ignore_index,
        )

    def _adamw(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=1e-4)


def _check_numbers(lr: Any, temperature: Any, alpha: Any) -> None:
    for name, value in (("lr", lr), ("temperature", temperature)):
        if not (isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0):
            raise OptionError(f"FineTune: {name} must be a positive number, got {value!r}.")
    if not (isinstance(alpha, numbers.Real) and 0 <= float(alpha) <= 1):
        raise OptionError(f"FineTune: alpha must be from 0 (targets alone) to 1 (teacher alone), got {alpha!r}.")


def _check_functions(**functions: Any) -> None:
    for name, function in functions.items():
        if not (function is None or callable(function)):
            raise OptionError(f"FineTune: {name} must be a function, got {function!r}.")


def _has_epochs(loader: Any) -> bool:
    """Whether a loader of batches can be gone through again and again, and says how many there are."""
    try:
        len(loader)
    except TypeError:  # a DataLoader has the method, whether its dataset has or not
        return False
    return hasattr(loader, "__iter__") and not isinstance(loader, (Iterator, Tensor))


@contextlib.contextmanager
def trainable(student: nn.Module, dense: nn.Module) -> Iterator[None]:
    """Make ``student`` ready to train, and as it was (weights aside) on exit, however the block ends.

    Args:
        student: The compressed model.
        dense: The model it came from, whose ``requires_grad`` flags say which quantized layers train.
    """
    quantized = [
        layer
        for path, layer in student.named_modules()
        if isinstance(layer, (BinaryLayer, QuantLayer)) and layer.frozen and _weight_trains(dense, path)
    ]
    with modes_kept(student):
        try:
            if not student.training:
                student.train()
            for layer in quantized:
                layer.unfreeze()
            yield
        finally:
            for layer in quantized:
                layer.freeze()
            student.zero_grad(set_to_none=True)


def teacher_of(dense: nn.Module) -> nn.Module:
    """Return a copy of ``dense`` in eval mode that shares the values of its parameters, so that it costs no memory.

    Modules, buffers and hooks are the copy's own: whatever a forward or a feature tap changes there, ``dense`` never
    sees it.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in dense.parameters()}
    return copy.deepcopy(dense, memo).eval()


def warm_cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return 5 % linear warm-up, then half a cosine down to zero, over ``steps`` steps."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return LambdaLR(optimizer, factor)


def _weight_trains(dense: nn.Module, path: str) -> bool:
    """Whether the weight that became the layer at ``path`` (of a factorised layer: a part of it) was to be trained."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    while path not in modules:
        path = path.rpartition(".")[0]
    flags = [p.requires_grad for p in modules[path].parameters() if p.dim() >= 2]
    return any(flags) or not flags
