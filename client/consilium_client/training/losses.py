"""Losses by name, from MONAI and torch, each taking logits and one-hot targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from consilium_common.study import Study


def one_hot(study: Study, targets: Any) -> Any:
    """Return ``targets`` as float one-hot (batch, classes, \\*spatial).

    Targets come as class indices (batch, \\*spatial), or, multi-label, as zeros and ones (batch,
    classes), which are returned as they are. Done here and not in the loss, because MONAI's
    ``to_onehot_y`` cannot be vectorised over patients.
    """
    import torch

    if study.task.multi_label:
        return targets.float()
    hot = torch.nn.functional.one_hot(targets.long(), len(study.task.classes))
    return hot.movedim(-1, 1).float()


def build_loss(study: Study) -> Callable[[Any, Any], Any]:
    """Return the study's loss of (logits, one-hot targets): the mean over the batch.

    Every loss is a mean of terms of one image each: Dice is formed per image and class and then
    averaged (MONAI's ``batch=False``), the others average over images of one size. So no loss
    couples patients, and a patient's gradient is the mean of its images' gradients, on which the
    engines that compute per image rely.
    """
    import torch
    from monai.losses import DiceCELoss, FocalLoss

    match study.training.loss:
        case "dice_ce":
            return DiceCELoss(softmax=True)  # type: ignore[no-any-return]
        case "cross_entropy":
            return torch.nn.CrossEntropyLoss()  # type: ignore[no-any-return]
        case "bce":
            return torch.nn.BCEWithLogitsLoss()  # type: ignore[no-any-return]
        case "focal":
            return FocalLoss(gamma=2.0, use_softmax=not study.task.multi_label)  # type: ignore[no-any-return]
