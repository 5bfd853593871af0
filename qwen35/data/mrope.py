"""3-D M-RoPE positions: text advances all three axes together, an image spans a grid of them."""

from collections.abc import Iterable

import numpy as np

from qwen35.batch import VisionSpec


def position_ids(ids: np.ndarray, grids: Iterable[tuple[int, int, int]], spec: VisionSpec | None) -> np.ndarray:
    """Positions [3, T] int64 (temporal, height, width) of one sequence of ids [T], from 0 on.

    grids: patches (t, h, w) of each image or video in order; each of a video's t frames is a run of
    tokens of its own. After a run, text goes on at the run's start + max(h, w) / merge_size, as in
    transformers' get_rope_index. Raises ValueError if runs and grids disagree. Without a spec the
    model is text-only, and no token is an image's.
    """
    if spec is None:
        return np.broadcast_to(np.arange(len(ids)), (3, len(ids))).copy()
    is_vision = (ids == spec.image_token_id) | (ids == spec.video_token_id)
    edges = np.flatnonzero(np.diff(is_vision, prepend=False, append=False))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    frames = [(h // spec.merge_size, w // spec.merge_size) for t, h, w in grids for _ in range(t)]
    if [end - start for start, end in runs] != [h * w for h, w in frames]:
        raise ValueError(f"runs of {[e - s for s, e in runs]} image tokens for grids of {[h * w for h, w in frames]}")
    out = np.empty((3, len(ids)), dtype=np.int64)
    position = done = 0  # next position, and how many tokens have theirs
    for (start, end), (h, w) in zip(runs, frames, strict=True):
        out[:, done:start] = np.arange(start - done) + position
        position += start - done
        rows, cols = np.divmod(np.arange(h * w), w)
        out[:, start:end] = position + np.stack([np.zeros_like(rows), rows, cols])
        position += max(h, w)
        done = end
    out[:, done:] = np.arange(len(ids) - done) + position
    return out
