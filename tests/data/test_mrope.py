"""3-D positions against transformers' get_rope_index."""

import random

import numpy as np
import pytest
import torch
from peer import IMAGE, VIDEO, VISION_END, VISION_START, config_dict
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from qwen35.batch import VisionSpec
from qwen35.data.mrope import position_ids

SPEC = VisionSpec(IMAGE, VIDEO)


@pytest.fixture(scope="module")
def peer():
    with torch.device("meta"):
        return Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config_dict(moe=False))).model


def sequence(parts):
    """parts: an int for that many text tokens, (h, w) for an image, (t, h, w) for a video.

    Each frame of a video has a timestamp before it.
    """
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
        elif len(part) == 2:
            grids.append((1, *part))
            ids += [VISION_START, *[IMAGE] * (part[0] * part[1] // 4), VISION_END]
        else:
            grids.append(part)
            for _ in range(part[0]):
                ids += [8, 9, VISION_START, *[VIDEO] * (part[1] * part[2] // 4), VISION_END]
    return np.array(ids, dtype=np.int32), grids


def check(parts, peer):
    ids, grids = sequence(parts)
    tokens = torch.from_numpy(ids).long()[None]
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    images = torch.tensor([[1, *p] for p in parts if not isinstance(p, int) and len(p) == 2])
    videos = torch.tensor([list(p) for p in parts if not isinstance(p, int) and len(p) == 3])
    expected, _ = peer.get_rope_index(
        input_ids=tokens,
        mm_token_type_ids=kinds,  # transformers 5.2 has no use for it
        image_grid_thw=images if len(images) else None,
        video_grid_thw=videos if len(videos) else None,
        attention_mask=torch.ones_like(tokens),
    )
    assert torch.equal(torch.from_numpy(position_ids(ids, grids, SPEC)), expected[:, 0])


@pytest.mark.parametrize(
    "parts",
    [[5], [1], [3, (4, 6), 2], [(2, 2)], [(4, 4), (2, 8), 3, (8, 2)], [2, (3, 4, 6), 5], [2, (2, 4, 4), (6, 4), 5]],
    ids=str,
)
def test_positions_equal_transformers(parts, peer):
    check(parts, peer)


def test_positions_of_random_sequences_equal_transformers(peer):
    rng = random.Random(0)
    for _ in range(40):
        kinds = [rng.randint(1, 9), (2 * rng.randint(1, 4), 2 * rng.randint(1, 4)), (rng.randint(1, 3), 2, 4)]
        check(rng.choices(kinds, k=rng.randint(1, 6)), peer)


def test_grids_that_do_not_match_the_tokens_are_an_error():
    ids, _ = sequence([3, (4, 4), 2])
    for grids in ([], [(1, 4, 6)], [(1, 4, 4), (1, 2, 2)]):
        with pytest.raises(ValueError, match=r"runs of \[4\] image tokens for grids of"):
            position_ids(ids, grids, SPEC)
