"""Trainers for nnU-Net v2 whose loss these kernels compute: one class, and a family of names. Needs nnunetv2.

A name is nnUNetTrainer and a loss, then as wanted _Batch or _Sample (the Tversky index over the batch or by sample;
without, as the plans say), _Weighted (class weights inverse to the classes' share of the training voxels) and _Head
(the last layer is computed with the loss, so that its logits never exist):

    TverskyKernels   Dice + cross-entropy, nnU-Net's default loss; of regions with a binary cross-entropy
    Tversky_3_7      alpha 0.3, beta 0.7            TverskyCE_3_7    with a cross-entropy
    Tversky_2_8      alpha 0.2, beta 0.8            TverskyCE_2_8    with a cross-entropy
    FocalTversky     alpha 0.3, beta 0.7, exponent 0.75

for example nnUNetTrainerTversky_2_8_Batch_Head. A loss of one's own is a class derived from
`nnUNetTrainerTverskyKernels`: see its attributes.
"""

from __future__ import annotations

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ._trainer_names import DEFAULT, LOSSES, settings_of
from .nnunet import DC_and_BCE_loss, DC_and_CE_loss, LevelsLoss

__all__ = ["nnUNetTrainerTverskyKernels"]

#: nnU-Net's, of a quotient of sums twice as large.
DICE_SMOOTHING = 1e-5


class nnUNetTrainerTverskyKernels(nnUNetTrainer):
    """nnU-Net's default trainer; its attributes say which loss it has.

    Attributes:
        loss_options: Options of `tversky_kernels.tversky_ce_loss`, such as alpha, beta, gamma and ce_weight (0 unless
            given); None: nnU-Net's own loss, with its value.
        batch_dice: Whether the index is over the batch; None: as the plans say.
        weighted: Whether the classes have weights, see `class_weight`.
        head_within: Whether the last layer is computed together with the loss.
        inplace_backward: As in `tversky_kernels.tversky_loss`.
    """

    loss_options: dict | None = None
    batch_dice: bool | None = None
    weighted: bool = False
    head_within: bool = False
    inplace_backward: bool = False

    def class_weight(self) -> list[float]:
        """One weight a channel of the output, inverse to its share of the training cases' voxels, their mean 1.

        Weighs the cross-entropy where the loss has one, else the Tversky indices.
        """
        labels = self.label_manager
        channels = [np.atleast_1d(x) for x in (labels.foreground_regions if labels.has_regions else labels.all_labels)]
        voxels = np.zeros(len(channels))
        dataset = self.get_tr_and_val_datasets()[0]
        for case in dataset.identifiers:
            segmentation = np.asarray(dataset.load_case(case)[1][:])
            # -1 is nnU-Net's background outside of the image's content.
            found, count = np.unique(np.maximum(segmentation, 0), return_counts=True)
            for i, members in enumerate(channels):
                voxels[i] += count[np.isin(found, members)].sum()
        weight = 1 / np.maximum(voxels, 1)
        return (weight / weight.mean()).tolist()

    def _build_loss(self):
        labels, levels = self.label_manager, self._level_weights()
        batch = self.configuration_manager.batch_dice if self.batch_dice is None else self.batch_dice
        if self.loss_options is None and not (self.head_within or self.weighted):
            loss = self._default_loss(batch)
            return loss if levels is None else DeepSupervisionWrapper(loss, levels)
        options, offset = self.loss_options, 0.0
        if options is None:
            # -Dice as nnU-Net has it: a Tversky loss, with half of the smoothing, less 1.
            half = DICE_SMOOTHING / 2
            options, offset = {**LOSSES[DEFAULT], "smooth_nr": half, "smooth_dr": half}, -1.0
            if labels.has_regions and labels.has_ignore_label:
                # With a mask nnU-Net sums the cross-entropy over the channels, where without it averages.
                options["ce_weight"] = float(labels.num_segmentation_heads)
        options = {**options, "batch": batch, "include_background": labels.has_regions}
        if self.weighted:
            options["ce_class_weight" if options.get("ce_weight") else "class_weight"] = self.class_weight()
        if self.is_ddp and batch:
            options["process_group"] = True
        if self.inplace_backward:
            options["inplace_backward"] = True
        head = self._take_head() if self.head_within else None
        return LevelsLoss(options, labels.has_regions, labels.ignore_label, levels, head, offset)

    def _default_loss(self, batch: bool):
        dice = {"batch_dice": batch, "smooth": DICE_SMOOTHING, "ddp": self.is_ddp}
        ignored, inplace = self.label_manager.ignore_label, self.inplace_backward
        if self.label_manager.has_regions:
            dice["do_bg"] = True
            return DC_and_BCE_loss({}, dice, use_ignore_label=ignored is not None, inplace_backward=inplace)
        dice["do_bg"] = False
        return DC_and_CE_loss(dice, {}, ignore_label=ignored, inplace_backward=inplace)

    def _level_weights(self):
        if not self.enable_deep_supervision:
            return None
        # Half the weight a level, none for the coarsest (DDP wants every output used), their sum 1.
        weights = np.array([0.5**i for i in range(len(self._get_deep_supervision_scales()))])
        weights[-1] = 1e-6 if self.is_ddp and not self._do_i_compile() else 0.0
        return weights / weights.sum()

    def _take_head(self) -> torch.nn.Module:
        # The layer that makes the logits of the full resolution passes its input on while it trains.
        network = self.network.module if self.is_ddp else self.network
        network = getattr(network, "_orig_mod", network)  # of torch.compile
        layers = getattr(getattr(network, "decoder", None), "seg_layers", None)
        head = layers[-1] if isinstance(layers, torch.nn.ModuleList) and len(layers) else None
        if not (isinstance(head, (torch.nn.Conv2d, torch.nn.Conv3d)) and _is_linear(head)):
            raise RuntimeError(
                f"{type(self).__name__}: expected a network whose decoder.seg_layers[-1] is a convolution of size 1, "
                f"got {type(network).__name__}; take the trainer without _Head"
            )
        logits = head.forward
        head.forward = lambda features: features if head.training else logits(features)  # type: ignore
        return head


def _is_linear(layer) -> bool:
    plain = set(layer.kernel_size) == set(layer.stride) == set(layer.dilation) == {1} and set(layer.padding) == {0}
    return plain and layer.groups == 1


def __getattr__(name: str):
    settings = settings_of(name)
    if settings is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attributes = {
        "__module__": __name__,
        "__doc__": f"{name}: as its name says, see `{__name__}`.",
        "loss_options": None if settings.loss == DEFAULT else LOSSES[settings.loss],
        "batch_dice": settings.batch,
        "weighted": settings.weighted,
        "head_within": settings.head,
    }
    globals()[name] = type(name, (nnUNetTrainerTverskyKernels,), attributes)
    return globals()[name]
