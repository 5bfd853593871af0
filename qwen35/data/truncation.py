"""Where a sample that is longer than cutoff_len is cut, for `truncation: truncate`."""

from itertools import accumulate

import numpy as np

from qwen35.data.tokenizer import ChatTokenizer


def truncate(
    ids: np.ndarray, loss_mask: np.ndarray, grids: np.ndarray, limit: int, tokenizer: ChatTokenizer
) -> tuple[int, int]:
    """How many leading tokens to keep, at most `limit`, and how many images and videos lie in them.

    ids [T], loss_mask [T] bool, grids [N, 3] of the images and videos. A visual that would be cut
    is dropped whole, a video together with the text before it, which shares tokens with its first
    time. The last token kept is a trained one, as any after it would be computed for nothing.
    (0, 0) if nothing trained is left.
    """
    begins, ends = _spans(ids, grids, tokenizer)
    end = min(limit, len(ids))
    while end:
        split = np.flatnonzero((begins < end) & (end < ends))
        if len(split):
            end = int(begins[split[0]])
            continue
        targets = np.flatnonzero(loss_mask[1:end])
        kept = int(targets[-1]) + 2 if len(targets) else 0
        if kept == end:
            break
        end = kept
    return end, int(np.count_nonzero(ends <= end))


def _spans(ids: np.ndarray, grids: np.ndarray, tokenizer: ChatTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """begins [N], ends [N]: visual n is tokens begins[n]:ends[n], start and end tokens included."""
    is_vision = (ids == tokenizer.image_id) | (ids == tokenizer.video_id)
    edges = np.flatnonzero(np.diff(is_vision, prepend=False, append=False))
    starts, stops = edges[::2] - 1, edges[1::2] + 1  # of each run of pads: an image, or a pair of frames
    last = np.array(list(accumulate(grids[:, 0].tolist())), dtype=np.int64) - 1  # the last run of each visual
    begins = starts[np.concatenate([[0], last[:-1] + 1])] if len(last) else starts
    controls = np.flatnonzero(np.isin(ids, tokenizer.control_ids))
    for i, begin in enumerate(begins.tolist()):
        if ids[begin + 1] == tokenizer.video_id:
            before = controls[controls < begin]
            begins[i] = before[-1] + 1 if len(before) else 0
    return begins, stops[last]
