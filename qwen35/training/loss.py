"""Every loss_type is a vector of token weights: loss = sum(weights * cross entropy) over a step.

With valid = (labels != -100), over the step's micro-batches on all ranks:
    default           mean over a micro-batch's valid tokens, then over the micro-batches
    per_sample_loss   mean over a sample's valid tokens, then over samples, then over micro-batches
    per_token_loss    mean over all valid tokens of the step, however the samples are split
Samples and micro-batches without valid tokens are left out of the means: a micro-batch of broken
records does not dilute the others (transformers would divide zero by zero). Multi-token prediction
weights its own labels by the same rule. The load-balancing loss is a mean over the micro-batches
that hold more than padding.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35.batch import IGNORE, MTPTargets, PackedBatch, mtp_labels
from qwen35.model import Qwen35


def token_weights(batch: PackedBatch, loss_type: str) -> Tensor:
    """-> [T] fp32 on the batch's device, to be divided by the sum of all ranks' `divisors`.

    Call it while the batch is still on the host.
    """
    valid = (batch.labels != IGNORE).float()
    if loss_type == "per_token_loss":
        return valid
    if loss_type == "default":
        return valid / valid.sum().clamp(min=1)
    sample = torch.arange(len(batch.cu_seqlens) - 1).repeat_interleave(batch.cu_seqlens.diff()).to(valid.device)  # [T]
    in_sample = torch.zeros(len(batch.cu_seqlens) - 1, device=valid.device).index_add(0, sample, valid)  # [S]
    samples = (in_sample > 0).sum().clamp(min=1)
    return valid / in_sample[sample].clamp(min=1) / samples


def make_mtp_targets(batch: PackedBatch, loss_type: str) -> MTPTargets:
    """The targets of multi-token prediction for a batch on the host, weighted as the labels are."""
    labels, is_end = mtp_labels(batch)
    weights = token_weights(dataclasses.replace(batch, labels=labels), loss_type)
    return MTPTargets(labels, weights, (labels != IGNORE).nonzero().squeeze(1), is_end)


def token_loss(
    model: Qwen35, batch: PackedBatch, weights: Tensor, mtp: MTPTargets | None, mtp_factor: float, load: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `Qwen35.loss`, with the sums of the weighted cross entropies of each prediction."""
    loss, aux, losses = model.loss(batch, weights, mtp, mtp_factor, load)
    found = [(weights * losses[: len(weights)]).sum()]
    if mtp is not None:
        found.append((mtp.weights * losses[len(weights) :]).sum())
    return loss, aux, found


def divisors(
    batches: Sequence[PackedBatch], all_mtp_targets: Sequence[MTPTargets | None], loss_type: str
) -> list[float]:
    """This rank's addends to the divisors of the next-token, multi-token, load-balancing losses.

    For batches of pairs the first is their number.
    """
    labels = [int((batch.labels != IGNORE).sum()) for batch in batches]
    mtp = [0 if targets is None else len(targets.label_positions) for targets in all_mtp_targets]
    has_tokens = [batch.is_pad is None or not bool(batch.is_pad.all()) for batch in batches]
    if loss_type != "per_token_loss":
        labels, mtp = [int(n > 0) for n in labels], [int(n > 0) for n in mtp]
    labels = [n if batch.pairs is None else len(batch.pairs) for n, batch in zip(labels, batches, strict=True)]
    return [float(sum(labels)), float(sum(mtp)), float(sum(has_tokens))]
