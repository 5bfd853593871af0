"""Every loss_type is a vector of token weights: loss = sum over all ranks and micro-batches of sum(weights * cross entropy).

With valid = labels != -100, and the step's micro-batches on all ranks:
    default           mean over the valid tokens of a micro-batch, mean over the micro-batches
    per_sample_loss   mean over the valid tokens of a sample, mean over the samples of a micro-batch, then the micro-batches
    per_token_loss    sum over all valid tokens of the step / their number: the same for any split of the samples
A sample without valid tokens counts nowhere, and neither does a micro-batch without any: where all of its records were broken,
it does not dilute the mean of the others (transformers would divide zero by zero there). Multi-token prediction is weighed in
the same way, over labels of its own: each of the two losses is a mean over what it is trained on. The load-balancing loss is a
mean over the micro-batches that hold tokens other than padding.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35.batch import IGNORE, MTPTargets, PackedBatch, mtp_labels


def token_weights(batch: PackedBatch, loss_type: str) -> Tensor:
    """[T] fp32 within one micro-batch, on the batch's device (host work: call it before the batch moves).

    Still to be divided by the step's `divisors`.
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
    """What multi-token prediction learns of a micro-batch on the host; weights as those of `token_weights`."""
    labels, is_end = mtp_labels(batch)
    weights = token_weights(dataclasses.replace(batch, labels=labels), loss_type)
    return MTPTargets(labels, weights, (labels != IGNORE).nonzero().squeeze(1), is_end)


def divisors(
    batches: Sequence[PackedBatch], all_mtp_targets: Sequence[MTPTargets | None], loss_type: str
) -> list[float]:
    """One rank's part of what divides the step's losses: of the next token, of the token after it, of load balancing."""
    trained = [int((batch.labels != IGNORE).sum()) for batch in batches]
    further = [0 if one is None else len(one.label_positions) for one in all_mtp_targets]
    filled = [batch.is_pad is None or not bool(batch.is_pad.all()) for batch in batches]
    if loss_type != "per_token_loss":
        trained, further = [int(n > 0) for n in trained], [int(n > 0) for n in further]
    return [float(sum(trained)), float(sum(further)), float(sum(filled))]
