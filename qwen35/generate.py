"""Greedy generation for several prompts at once, all packed on one token axis."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qwen35.batch import IGNORE, PackedBatch, VisionSpec, derive
from qwen35.data.files import read_config
from qwen35.data.tokens import ChatTokenizer
from qwen35.model import Qwen35


@torch.no_grad()
def greedy(
    model: Qwen35, prompts: Sequence[PackedBatch], max_new_tokens: int, eos_ids: Collection[int]
) -> list[list[int]]:
    """The likeliest next token, again and again, until one of eos_ids (which is left out) or max_new_tokens.

    prompts: one sequence each, on the host, as `qwen35.data.collate.prompt_batch` makes them. Returns the new tokens of each.
    Every step runs all that is unfinished anew, without a cache.
    """
    spec, head = model.config.vision_spec, model.head_weight
    texts = [_without_dummy(prompt, spec) for prompt in prompts]
    unfinished = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not unfinished:
            break
        batch = pack([texts[i] for i in unfinished])
        hidden = model(derive(batch, spec).to(head.device))
        last = (batch.cu_seqlens[1:] - 1).to(head.device)  # [S]: the only rows whose logits are asked for
        likeliest = (hidden[last] @ head.T).argmax(-1).tolist()
        going_on = [(i, token) for i, token in zip(unfinished, likeliest, strict=True) if token not in eos_ids]
        for i, token in going_on:
            texts[i] = _append(texts[i], token)
        unfinished = [i for i, _ in going_on]
    return [t.input_ids[len(p.input_ids) :].tolist() for t, p in zip(texts, prompts, strict=True)]


def stop_ids(folder: str | Path, tokenizer: ChatTokenizer) -> set[int]:
    """Where a chat's answer ends: at `<|im_end|>`, the pad token, and whatever config.json and generation_config.json name.

    The published config.json names `<|endoftext|>` alone, which no chat ends with, and some sizes have no generation_config.
    """
    found = {tokenizer.im_end_id, tokenizer.pad_id}
    for name in ("config.json", "generation_config.json"):
        if (Path(folder) / name).is_file():
            config = read_config(folder, name)
            for level in (config, config.get("text_config", {})):
                named = level.get("eos_token_id")
                found |= {i for i in (named if isinstance(named, list) else [named]) if isinstance(i, int)}
    return found


def pack(sequences: Sequence[PackedBatch]) -> PackedBatch:
    """Batches without dummy images, end to end. The derived fields are left to be made anew."""
    ends = torch.cat([s.cu_seqlens.diff() for s in sequences]).cumsum(0)
    return PackedBatch(
        input_ids=torch.cat([s.input_ids for s in sequences]),
        labels=torch.cat([s.labels for s in sequences]),
        position_ids=torch.cat([s.position_ids for s in sequences], dim=1),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        pixel_values=torch.cat([s.pixel_values for s in sequences]),
        grid_thw=torch.cat([s.grid_thw for s in sequences]),
    )


def _without_dummy(prompt: PackedBatch, spec: VisionSpec) -> PackedBatch:
    """Only the images that tokens refer to: in a pack, a dummy would take the place of the next prompt's image."""
    is_vision = (prompt.input_ids == spec.image_token_id) | (prompt.input_ids == spec.video_token_id)
    patches = int(is_vision.sum()) * spec.merge_size**2
    grids = prompt.grid_thw[prompt.grid_thw.prod(-1).cumsum(0) <= patches]
    return replace(prompt, pixel_values=prompt.pixel_values[:patches], grid_thw=grids, vision=None, vision_index=None)


def _append(text: PackedBatch, token: int) -> PackedBatch:
    """One token more at the end of a single sequence; text goes on after the largest position."""
    position = (text.position_ids.max() + 1).expand(3, 1)
    return replace(
        text,
        input_ids=torch.cat([text.input_ids, text.input_ids.new_tensor([token])]),
        labels=torch.cat([text.labels, text.labels.new_tensor([IGNORE])]),
        position_ids=torch.cat([text.position_ids, position], dim=1),
        cu_seqlens=text.cu_seqlens + text.cu_seqlens.new_tensor([0, 1]),
    )
