"""3-D M-RoPE positions: text advances temporal, height and width together, an image spans a grid."""

from collections.abc import Iterable

import numpy as np

from qwen35.batch import VisionSpec


def position_ids(ids: np.ndarray, grids: Iterable[tuple[int, int, int]], spec: VisionSpec) -> np.ndarray:
    """Positions [3, T] int64 (temporal, height, width) of one sequence that starts at 0.

    ids [T]; grids: patches (t, h, w) of each image or video in order. A video is its t frames, each a run of tokens of its
    own. After an image the text goes on from its start + max(h, w) / merge. Raises ValueError where runs and grids disagree.
    """
    is_vision = (ids == spec.image_token_id) | (ids == spec.video_token_id)
    edges = np.flatnonzero(np.diff(is_vision, prepend=False, append=False))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    frames = [(h // spec.merge_size, w // spec.merge_size) for t, h, w in grids for _ in range(t)]
    if [end - start for start, end in runs] != [h * w for h, w in frames]:
        raise ValueError(f"runs of {[e - s for s, e in runs]} image tokens for grids of {[h * w for h, w in frames]}")
    out = np.empty((3, len(ids)), dtype=np.int64)
    at = done = 0
    for (start, end), (h, w) in zip(runs, frames, strict=True):
        out[:, done:start] = np.arange(start - done) + at
        at += start - done
        rows, cols = np.divmod(np.arange(h * w), w)
        out[:, start:end] = at + np.stack([np.zeros_like(rows), rows, cols])
        at += max(h, w)
        done = end
    out[:, done:] = np.arange(len(ids) - done) + at
    return out
