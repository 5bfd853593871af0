"""Losses, gradients and metrics of pairs beside trl's own DPOTrainer, on transformers' model.

`make test-trl`: its packages are not among those of `make install`. What runs is the method that
computes a batch's loss, on a stand-in for the trainer that has its settings and no data.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peer import ONE_OF_EACH, config_dict, pair, peer_inputs
from test_dpo import ALONE, LOSSES, batch_of, pairs_of, trl_log_probs, trl_losses
from trl import DPOTrainer
from trl.trainer.dpo_trainer import add_fused_lm_head

from qwen35.training.dpo import METRICS, preference_loss

HEAD = ("log_probs", "entropy", "mean_logits", "is_top1")  # what the method reads
PROCESS = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def inputs_of(samples, reference):
    """A batch as trl's collator makes it: all chosen answers, then all rejected ones, padded."""
    sides = [*samples[0::2], *samples[1::2]]
    found = [
        peer_inputs(s) | {"completion_mask": (s.labels != -100).long().roll(1)[None]} for s in sides
    ]  # no last token has a label
    most = max(len(s.input_ids) for s in sides)
    joined = {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    for name in {name for inputs in found for name in inputs}:
        parts = [inputs[name] for inputs in found if name in inputs]
        is_text = name in ("input_ids", "attention_mask", "mm_token_type_ids", "completion_mask")
        joined[name] = torch.cat([F.pad(part, (0, most - part.shape[1])) for part in parts] if is_text else parts)
    return joined


def trl_step(theirs, samples, reference, dpo):
    """-> loss, metrics. trl smooths labels in its aot loss, of one pair the sigmoid one."""
    kinds = [("aot" if dpo.label_smoothing else dpo.loss, 1.0), ("sft", dpo.rpo_alpha)]
    kinds = kinds if dpo.rpo_alpha else kinds[:1]
    trainer = SimpleNamespace(
        model=theirs,
        accelerator=PROCESS,
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        loss_types=[kind for kind, _ in kinds],
        loss_weights=[weight for _, weight in kinds],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        use_weighting=False,
        ld_alpha=None,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, theirs, inputs_of(samples, reference), False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("dpo", LOSSES, ids=str)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_losses_gradients_and_metrics_are_those_of_trl(moe, dpo):
    """Of a pair with an image, one of text and one with a video.

    Where trl's term is no mean over pairs, each is a batch of its own.
    """
    ours, theirs = pair(config_dict(moe=moe, tied=moe, **ONE_OF_EACH))
    samples = pairs_of([0, 1, 2])
    logps, tokens = trl_log_probs(theirs, samples)
    reference = logps.detach() + torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    theirs.train()
    add_fused_lm_head(theirs, outputs=HEAD)
    theirs.zero_grad()
    groups = [[0], [1], [2]] if dpo.rpo_alpha or dpo.label_smoothing else [[0, 1, 2]]
    wanted, metrics = 0.0, defaultdict(float)
    for group in groups:
        sides = [samples[i] for number in group for i in (2 * number, 2 * number + 1)]
        loss, found = trl_step(theirs, sides, reference[group], dpo)
        (loss / len(groups)).backward()
        wanted += loss.detach() / len(groups)
        for name in METRICS:
            metrics[name] += found[name][0] / len(groups)
    loss, _, found = preference_loss(ours, batch_of(samples, reference), dpo, ALONE, torch.tensor(1 / 3))
    loss.backward()
    assert torch.isclose(loss, wanted, rtol=1e-5)
    assert torch.isclose(trl_losses(logps, reference, tokens, dpo).mean(), wanted, rtol=1e-5)  # what make test has
    for name, value in zip(METRICS, found[1:], strict=True):
        assert float(value) == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    by_name = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        other = by_name[name].grad
        assert (p.grad - other).norm() <= 1e-5 * other.norm() + 1e-9, name
