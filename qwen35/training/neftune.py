"""NEFTune: noise on the embeddings of text (Jain et al. 2023, arXiv:2310.05914)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.host import to_device
from qwen35.batch import PackedBatch
from qwen35.config.schema import TrainingSettings
from qwen35.parallel.mesh import Meshes


def embedding_noise(
    batch: PackedBatch, hidden: int, t: TrainingSettings, meshes: Meshes, micro_batch: int, device: torch.device
) -> Tensor:
    """-> [T, H] fp32 for this rank's rows, uniform up to alpha / sqrt(a sample's tokens x H).

    It depends on the seed and on the numbers of the micro-batch's packed sequences in the run, so
    it is the same on any number of ranks and after a resume. micro_batch: its number on this rank.
    """
    lengths, alpha, size = batch.cu_seqlens.diff(), t.neftune_noise_alpha or 0.0, t.micro_batch_size
    scale = (alpha / (lengths.double() * hidden).sqrt()).float().repeat_interleave(lengths)
    number = (micro_batch * meshes.data_size + meshes.data_rank) * size  # of its first packed sequence
    rows = []
    for sequence in range(number, number + size):
        state = int(np.random.SeedSequence([t.seed, sequence]).generate_state(1, np.uint64)[0])
        generator = torch.Generator(device).manual_seed(state >> 1)
        rows.append(torch.rand(len(scale) // size, hidden, generator=generator, device=device))
    noise = (2 * torch.cat(rows) - 1) * to_device(scale, device)[:, None]
    first = meshes.ulysses_rank * len(batch.labels)
    return F.pad(noise, (0, 0, 0, 1))[first : first + len(batch.input_ids)]  # a rank may have the next one's first row
