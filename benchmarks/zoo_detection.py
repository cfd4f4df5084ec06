"""Detection models of torchvision for the zoo benchmark, whole, on any build of torch."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

# Of random weights every score is low, and every box is as good as another: few of them will do.
REGIONS = {"box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 20}
SMALL = {"min_size": 96, "max_size": 96}


def detector(name: str) -> tuple[nn.Module, tuple[list[Tensor]]]:
    """Return a detection model that hands out boxes whatever their scores, and a list of two images for it.

    Which boxes win, and how they are numbered, turns on the last digits of their scores. So the model is in float64,
    and its norms have statistics: without them all features vanish, and all scores are the same.
    """
    from torchvision import extension, models

    if not extension._has_ops():
        stand_in_for_compiled_operators()
    options: dict[str, Any] = {"score_thresh": 0.0} if "rcnn" not in name else REGIONS
    options |= {} if name.startswith("ssd") else SMALL
    model = models.get_model(name, weights=None, weights_backbone=None, **options)
    update_bn([torch.randn(8, 3, 96, 96)], model.backbone)
    return model.double(), ([torch.rand(3, height, 96, dtype=torch.float64) for height in (80, 96)],)


def stand_in_for_compiled_operators() -> None:
    """Have torchvision run without its compiled operators: non-maximum suppression and RoIAlign in torch alone."""
    boxes = importlib.import_module("torchvision.ops.boxes")
    boxes.nms = nms
    alignment = importlib.import_module("torchvision.ops.roi_align")
    alignment._roi_align = alignment._roi_align.__wrapped__  # as it is written, without compiling it
    alignment.is_compile_supported = lambda device: True


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes stay, best first, as ``torchvision.ops.nms`` does."""
    from torchvision.ops import box_iou

    overlaps = box_iou(boxes, boxes) > iou_threshold
    gone = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    kept = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not gone[index]:
            kept.append(index)
            gone |= overlaps[index]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
