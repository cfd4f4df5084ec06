"""Knowledge distillation: a loss on logits, and taps that compare the features of a teacher and a student."""

from __future__ import annotations

from torch import Tensor, nn

from lowrank_nn.distill.balance import FeatureLoss as FeatureLoss
from lowrank_nn.distill.balance import Weight as Weight
from lowrank_nn.distill.features import attention_loss as attention_loss
from lowrank_nn.distill.features import guidance_loss as guidance_loss
from lowrank_nn.distill.losses import Reduction as Reduction
from lowrank_nn.distill.losses import logit_loss as logit_loss
from lowrank_nn.distill.regressor import HintRegressor as HintRegressor
from lowrank_nn.distill.taps import FeatureTap as FeatureTap
from lowrank_nn.distill.taps import Guidance as Guidance
from lowrank_nn.distill.taps import Kind as Kind


class DistillLoss:
    """Distillation in one name: call it on logits, or tap a layer with :meth:`from_pretrained_layer`.

    There is one instance, ``distill_loss``; it has no state.
    """

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        targets: Tensor | None = None,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        ignore_index: int = -100,
        class_dim: int = 1,
        reduction: Reduction = "mean",
    ) -> Tensor:
        r"""Return :math:`\alpha T^2 \mathrm{KL}(\mathrm{teacher} \| \mathrm{student}) + (1 - \alpha) \mathrm{CE}`.

        See :func:`logit_loss`, which this calls, for shapes, options and errors.
        """
        return logit_loss(
            student_logits,
            teacher_logits,
            targets,
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            class_dim=class_dim,
            reduction=reduction,
        )

    @staticmethod
    def from_pretrained_layer(
        layer: nn.Module,
        student_layer: nn.Module | None = None,
        *,
        kind: Kind = "guidance",
        weight: Weight = 1.0,
        guidance_first: float = 0.0,
        widths: tuple[int, int] | None = None,
        channel_dim: int | None = None,
    ) -> FeatureTap:
        """Tap a teacher's layer and its counterpart in a student; see :class:`FeatureTap` for options and errors.

        For many layers of two models at once there is :class:`Guidance`.
        """
        return FeatureTap(
            layer,
            student_layer,
            kind=kind,
            weight=weight,
            guidance_first=guidance_first,
            widths=widths,
            channel_dim=channel_dim,
        )

    def __repr__(self) -> str:
        return "lowrank_nn.distill.distill_loss"

    def __reduce__(self) -> str:
        return "distill_loss"


distill_loss = DistillLoss()
