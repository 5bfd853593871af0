"""A batch of a recipe's shapes, made by the run's own collator from synthetic samples."""

from dataclasses import dataclass, replace

import torch

from qwen35.batch import IGNORE, PackedBatch, VisionSpec
from qwen35.config.schema import Settings
from qwen35.data.collator import collate
from qwen35.data.dataset import Sample
from qwen35.data.mrope import position_ids
from qwen35.errors import SettingError
from qwen35.model import ModelConfig

TEXT = 1  # any token that is not an image token


@dataclass(frozen=True)
class Mix:
    """Sequences of one length: an image (unless images is 0), a question and an answer."""

    sequence: int = 1024  # tokens
    images: float | None = None  # share of the tokens that are image tokens; None: 0.25, or 0 without a tower
    trained: float = 0.4  # share of the tokens that have a loss

    def image_share(self, config: ModelConfig) -> float:
        if self.images and config.vision is None:
            raise SettingError("--images: the model is text-only, leave it out")
        return (0.25 if config.vision else 0.0) if self.images is None else self.images

    def length(self, settings: Settings) -> int:
        """Of a sequence; with training.stage: dpo a packed sequence has room for two."""
        cutoff_len = settings.data.dataset_param.basic_parameters.cutoff_len
        return min(self.sequence, cutoff_len // 2 if settings.training.stage == "dpo" else cutoff_len)

    def describe(self, settings: Settings, config: ModelConfig) -> str:
        cutoff_len, length = settings.data.dataset_param.basic_parameters.cutoff_len, self.length(settings)
        pairs = ", in pairs" * (settings.training.stage == "dpo")
        return (
            f"{cutoff_len:,} tokens each, of sequences of {length:,}{pairs}: {self.image_share(config):.0%} image tokens, "
            f"{self.trained:.0%} with a loss"
        )


def make_batch(settings: Settings, config: ModelConfig, mix: Mix) -> PackedBatch:
    """One micro-batch on the host, T = micro_batch_size * cutoff_len. Raises SettingError."""
    basic = settings.data.dataset_param.basic_parameters
    spec, v = config.vision_spec, config.vision
    length, is_dpo = mix.length(settings), settings.training.stage == "dpo"
    sizes = [length] * (basic.cutoff_len // length)
    if basic.cutoff_len % length > 1:
        sizes.append(basic.cutoff_len % length)
    sizes = sizes[: len(sizes) // 2 * 2] if is_dpo else sizes  # both answers of a pair
    values = v.in_channels * v.temporal_patch_size * v.patch_size**2 if v else 0
    share = mix.image_share(config)
    samples = {size: make_sample(size, share, mix.trained, spec, values) for size in set(sizes)}
    packed = [[samples[size] for size in sizes]] * settings.training.micro_batch_size
    batch = collate(packed, basic.cutoff_len, TEXT, settings.data.dataloader_param.patch_bucket, spec)
    if not is_dpo or batch.is_pad is None:
        return batch
    pairs = (~batch.is_pad[batch.cu_seqlens[:-1].long()]).nonzero().view(-1, 2)
    return replace(batch, pairs=pairs, reference=None if settings.training.lora else torch.zeros(pairs.shape))


def make_sample(length: int, images: float, trained: float, spec: VisionSpec | None, values: int) -> Sample:
    rows, columns = _grid(round(length * images))
    image = rows * columns
    merge, token = (spec.merge_size, spec.image_token_id) if spec else (1, TEXT)
    grids = [(1, rows * merge, columns * merge)] if image else []
    labelled = round(length * trained)
    if image + 2 + labelled > length or labelled < 1:
        raise SettingError(
            f"--images and --trained: {image} image tokens and {labelled} tokens with a loss do not fit in a sequence of "
            f"{length}, which has a question too"
        )
    ids = torch.full((length,), TEXT)
    ids[1 : 1 + image] = token
    labels = torch.full((length,), IGNORE)
    labels[length - 1 - labelled : length - 1] = TEXT
    return Sample(
        ids,
        labels,
        torch.from_numpy(position_ids(ids.numpy(), grids, spec)),
        torch.zeros(image * merge**2, values),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
    )


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a nearly square image of about that many tokens."""
    rows = int(tokens**0.5)
    return rows, tokens // rows if rows else 0
