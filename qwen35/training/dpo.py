"""Losses on pairs of a chosen and a rejected answer to the same prompt, and the reference's part.

An answer's log-probability is the sum over its tokens, log-ratio the difference to that by the
reference model, and its reward beta times the log-ratio. With r the chosen answer's log-ratio less
the rejected one's, and e the label smoothing:
    sigmoid   -(1 - e) log sigmoid(beta r) - e log sigmoid(-beta r)
    ipo       (r - 1 / (2 beta))^2, of log-ratios that are divided by the answers' tokens
rpo_alpha adds that multiple of the chosen answer's mean loss a token. The loss of a step is the
mean over its pairs on all ranks. Sources: Rafailov et al. 2023, Direct Preference Optimization,
arXiv:2305.18290; ipo: Azar et al. 2023, arXiv:2310.12036; rpo: Pang et al. 2024, arXiv:2404.19733.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.host import to_device
from qwen35.batch import IGNORE, PackedBatch
from qwen35.config.schema import DpoSettings
from qwen35.model import Qwen35
from qwen35.model.lora import adapters_off
from qwen35.parallel.collectives import Sum
from qwen35.parallel.mesh import Meshes

METRICS = (  # of a step, means over its pairs, by the names of trl
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


def answer_log_probs(batch: PackedBatch, log_probs: Tensor, meshes: Meshes) -> tuple[Tensor, Tensor]:
    """log_probs [T/U] of a rank's part of a batch -> the answers' log-probabilities, tokens [Q, 2].

    Ranks that share packed sequences add up their parts, in every micro-batch, with pairs or not.
    """
    assert batch.pairs is not None
    answers, sequences = batch.pairs.flatten(), len(batch.cu_seqlens) - 1
    row = torch.full((sequences,), len(answers))  # of each sequence; those of no pair share the last
    row[answers] = torch.arange(len(answers))
    first = meshes.ulysses_rank * len(log_probs)
    row_of_token = row.repeat_interleave(batch.cu_seqlens.diff())[first : first + len(log_probs)]
    values = torch.stack([log_probs, (batch.labels != IGNORE).to(log_probs.dtype)], dim=1)
    sums = values.new_zeros(len(answers) + 1, 2).index_add(0, to_device(row_of_token, values.device), values)
    if meshes.ulysses_size > 1:
        sums = Sum.apply(meshes.tokens["ulysses"].get_group(), sums)
    by_answer = sums[:-1].unflatten(0, (-1, 2))
    return by_answer[..., 0], by_answer[..., 1].detach()


def pair_losses(log_probs: Tensor, reference: Tensor, tokens: Tensor, dpo: DpoSettings) -> Tensor:
    """[Q, 2] each, of the chosen and the rejected answers -> [Q]"""
    ratios, tokens = log_probs - reference, tokens.clamp(min=1)
    if dpo.loss == "ipo":
        ratios = ratios / tokens
    difference = ratios[:, 0] - ratios[:, 1]
    if dpo.loss == "ipo":
        losses = (difference - 1 / (2 * dpo.beta)).square()
    else:
        logits, e = dpo.beta * difference, dpo.label_smoothing
        losses = -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)
    return losses - dpo.rpo_alpha * log_probs[:, 0] / tokens[:, 0] if dpo.rpo_alpha else losses


def preference_loss(
    model: Qwen35, batch: PackedBatch, dpo: DpoSettings, meshes: Meshes, scale: Tensor, load: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """-> scale * the sum of the pairs' losses, load-balancing loss; scale * the sums of both.

    batch: a rank's part, on the device. Without log-probabilities of the reference, that is the
    model with its adapters off. The last result is the loss and METRICS; of ranks that share packed
    sequences only the first counts them.
    """
    reference = batch.reference
    if reference is None:
        recompute = model.model.language_model.recompute
        model.recompute(False)
        with torch.no_grad(), adapters_off(model):
            reference, _ = answer_log_probs(batch, model.log_probs(batch)[0], meshes)
        model.recompute(recompute)
    token_log_probs, aux = model.log_probs(batch, load)
    log_probs, tokens = answer_log_probs(batch, token_log_probs, meshes)
    losses = pair_losses(log_probs, reference, tokens, dpo)
    found = log_probs.detach()
    rewards = dpo.beta * (found - reference)
    chosen, rejected = rewards.unbind(1)
    columns = [losses.detach(), chosen, rejected, chosen - rejected, (chosen > rejected).float(), *found.unbind(1)]
    sums = scale * (meshes.ulysses_rank == 0) * torch.stack(columns).sum(1)
    return scale * losses.sum(), aux, [*sums]
