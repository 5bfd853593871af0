"""Where a sample that is longer than cutoff_len is cut: at a token, but never through an image or video."""

from itertools import accumulate

import numpy as np

from qwen35.data.tokenizer import ChatTokenizer


def truncate(
    ids: np.ndarray, trained: np.ndarray, grids: np.ndarray, limit: int, tokenizer: ChatTokenizer
) -> tuple[int, int]:
    """How many of the first tokens stay, at most `limit`, and how many of the first images and videos lie in them.

    ids [T], trained [T] bool, grids [N, 3] of the images and videos. What would be cut in two goes as a whole, a video with
    the text right before it, which shares tokens with its first time. The last token that stays is a trained one: what comes
    after it would be computed for nothing. (0, 0) where nothing trained is left.
    """
    begins, ends = _spans(ids, grids, tokenizer)
    end = min(limit, len(ids))
    while end:
        inside = np.flatnonzero((begins < end) & (end < ends))
        if len(inside):
            end = int(begins[inside[0]])
            continue
        targets = np.flatnonzero(trained[1:end])
        kept = int(targets[-1]) + 2 if len(targets) else 0
        if kept == end:
            break
        end = kept
    return end, int(np.count_nonzero(ends <= end))


def _spans(ids: np.ndarray, grids: np.ndarray, tokenizer: ChatTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """begins [N], ends [N]: image or video n is tokens begins[n]:ends[n], its start and end tokens among them."""
    is_vision = (ids == tokenizer.image_id) | (ids == tokenizer.video_id)
    edges = np.flatnonzero(np.diff(is_vision, prepend=False, append=False))
    starts, stops = edges[::2] - 1, edges[1::2] + 1  # of each run: an image, or a pair of frames
    last = np.array(list(accumulate(grids[:, 0].tolist())), dtype=np.int64) - 1  # runs
    begins = starts[np.concatenate([[0], last[:-1] + 1])] if len(last) else starts
    controls = np.flatnonzero(np.isin(ids, tokenizer.control_ids))
    for i, begin in enumerate(begins.tolist()):
        if ids[begin + 1] == tokenizer.video_id:
            before = controls[controls < begin]
            begins[i] = before[-1] + 1 if len(before) else 0
    return begins, stops[last]
