"""Tokenises the records of a file once, and keeps the samples in cache_dir if that is set.

Images and videos are only measured here; their pixels are decoded when a batch needs them.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen35.config.schema import Attr, BasicParameters, Settings
from qwen35.data.chat_template import ChatTemplate
from qwen35.data.checkpoint_template import checkpoint_pieces, checkpoint_prompt
from qwen35.data.data_warnings import DataWarnings, Skipped
from qwen35.data.files import replacing, try_lock
from qwen35.data.formats import read_records
from qwen35.data.image_processor import ImageError, ImageProcessor, Odd
from qwen35.data.media import ImageFolder
from qwen35.data.record import Record, RecordError, Video, Visual
from qwen35.data.style import DEFAULT_STYLE, Style, style_of
from qwen35.data.template import (
    Piece,
    as_trained,
    check_thoughts,
    dropped_thoughts,
    for_record,
    masked_answers,
    prompt_pieces,
    training_pieces,
    unprompted_answers,
)
from qwen35.data.tokenizer import ChatTokenizer, Extent, Spelled
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError, one_line, shortened

CODE_FILES = sorted(Path(__file__).parent.glob("*.py"))  # cached samples depend on all of it
LONGEST_TEXT = 4 << 20  # characters of a record: each takes 240 bytes while it is tokenised
LONGEST_NAME = 200  # characters of an image's path in a message
POLL_INTERVAL = 0.1  # seconds between looks for the entry that another process makes
Progress = Callable[[str, int], object]  # called with (what is being read, records read since the last call)


def silent(what: str, records: int) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class TokenisedSample:
    ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool: whether token t is a target
    grids: list[tuple[int, int, int]]  # patches (1 or t, h, w) of each image or video
    spelled: Spelled = field(default_factory=dict)  # special tokens that its text spells out
    extents: list[Extent] = field(default_factory=list)  # how many tokens each image or video takes
    odd: Odd = field(default_factory=list)  # of its images
    unseen: int = 0  # answers that are not trained, see checkpoint_pieces


@dataclass(frozen=True)
class FileSamples:
    """The N samples of one file, laid end to end, and what was left out."""

    file: str
    ids: Tensor  # [tokens] int32
    loss_mask: Tensor  # [tokens] bool
    offsets: Tensor  # [N+1] int64: sample i is tokens offsets[i]:offsets[i+1]
    grids: Tensor  # [M, 3] int64 of all images and videos
    image_offsets: Tensor  # [N+1] int64: sample i has grids image_offsets[i]:image_offsets[i+1]
    sources: list[str]  # of each record, for messages
    visuals: list[str | dict[str, Any]]  # [M], each as visual_to_json writes it
    records: int  # records read: the N samples and those left out
    skipped: Skipped
    warnings: DataWarnings


@dataclass(frozen=True)
class Preparation:
    """Tokenizer, processors and settings: they turn records into tokens, images into patches."""

    tokenizer: ChatTokenizer
    images: ImageProcessor
    basic: BasicParameters
    attr: Attr
    videos: VideoProcessor
    style: Style = DEFAULT_STYLE
    chat_template: ChatTemplate | None = None  # the model folder's, with which our rendering is compared

    @classmethod
    def of(cls, settings: Settings) -> "Preparation":
        param = settings.data.dataset_param
        limits = param.preprocess_parameters
        folder = settings.tokenizer_dir
        images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
        videos = VideoProcessor.from_folder(folder, limits)
        basic = param.basic_parameters
        tokenizer = ChatTokenizer(folder, basic.special_tokens_in_prompts)
        return cls(
            tokenizer, images, basic, param.attr, videos, style_of(folder, basic), reference_template(folder, basic)
        )

    def tokenise(self, record: Record) -> TokenisedSample:
        """Tokens, loss mask and grids of a record; images are not decoded. Raises RecordError."""
        pieces, unseen = self._pieces(record)
        if (length := sum(len(piece.text) for piece in pieces)) > LONGEST_TEXT:
            raise record.error(f"{length:,} characters of text, more than {LONGEST_TEXT:,}; cut it", "text too long")
        odd: Odd = []
        grids, extents = self.measure(record, odd)
        spelled: Spelled = {}
        ids, loss_mask = self.tokenizer.encode(pieces, extents, spelled)
        if not loss_mask[1:].any():
            raise record.error("nothing in it is trained", "nothing trained")
        return TokenisedSample(ids, loss_mask, grids, spelled, extents, odd, unseen)

    def _pieces(self, record: Record) -> tuple[list[Piece], int]:
        """What the template writes, and how many answers it does not train."""
        b, style = self.basic, for_record(record, self.style)
        if style.template == "checkpoint" and self.chat_template:
            return checkpoint_pieces(as_trained(record, style), self.chat_template, style, b.mask_history)
        check_thoughts(record, style)
        pieces = training_pieces(record, style, b.train_on_prompt, b.mask_history)
        if self.chat_template:
            self.chat_template.check_training(record, style)
        return pieces, unprompted_answers(record, style, b.mask_history)

    def prompt(self, record: Record, thinking: bool) -> list[Piece]:
        """The pieces before the answer; thinking: as for `prompt_pieces`. Raises RecordError."""
        if self.style.template == "checkpoint" and self.chat_template:
            return checkpoint_prompt(as_trained(record, self.style), self.chat_template, self.style, thinking)
        check_thoughts(record, self.style)
        pieces = prompt_pieces(record, self.style, thinking)
        if self.chat_template:
            self.chat_template.check_prompt(record, self.style, thinking)
        return pieces

    def folder(self) -> ImageFolder:
        """Where images and videos are looked up. Raises SettingError."""
        return ImageFolder(self.basic.dataset_dir, self.basic.cache_dir)

    def measure(self, record: Record, odd: Odd | None = None) -> tuple[list[tuple[int, int, int]], list[Extent]]:
        """The grid of each image and video, and how many tokens each takes. Raises RecordError."""
        grids: list[tuple[int, int, int]] = []
        extents: list[Extent] = []
        for visual in record.visuals:
            try:
                if isinstance(visual, Video):
                    selection = self.videos.select_frames(visual, odd)
                    tokens = self.videos.tokens((1, *selection.grid[1:]))  # of a pair of frames
                    grids.append(selection.grid)
                    extents.append([(seconds, tokens) for seconds in selection.timestamps])
                else:
                    grids.append(self.images.grid(visual, odd))
                    extents.append(self.images.tokens(grids[-1]))
            except ImageError as error:
                raise _visual_error(record, visual, error) from None
        return grids, extents

    def patches(self, visual: Visual) -> tuple[Tensor, tuple[int, int, int]]:
        """pixels [P, 3*2*16*16] and the grid. Raises ImageError."""
        return self.videos.patches(visual) if isinstance(visual, Video) else self.images.patches(visual)

    def cache_key(self, file: Path, limit: int | None) -> str:
        """A hash of the file's content, and of the settings and the code that tokens depend on."""
        settings = asdict(self.basic)
        # cached samples do not depend on these: they are truncated only after they are loaded
        for name in ("dataset", "cache_dir", "cutoff_len", "truncation", "max_samples"):
            del settings[name]
        settings["dataset_dir"] = os.path.realpath(self.basic.dataset_dir)
        processors = [asdict(self.images), asdict(self.videos)]
        template = self.style.dialect.name, self.chat_template and asdict(self.chat_template)
        inputs = [str(file), limit, settings, asdict(self.attr), processors, self.tokenizer.control_names, template]
        digest = hashlib.sha256(json.dumps(inputs).encode())
        for path in (file, self.tokenizer.file, *CODE_FILES):
            digest.update(_file_digest(path))
        return digest.hexdigest()[:32]


def reference_template(folder: str | Path, basic: BasicParameters) -> ChatTemplate | None:
    """The model folder's template, if it must be rendered. Raises SettingError."""
    if basic.template == "qwen3_vl_nothink":
        return None
    template = ChatTemplate.from_folder(folder)
    if basic.template == "checkpoint":
        if template is None:
            raise SettingError(f"{folder}: has no chat template, which template: checkpoint asks for")
        return template
    return None if template is None or template.is_published else template


def _visual_error(record: Record, visual: Visual, error: ImageError) -> RecordError:
    if isinstance(visual, Video):
        position = f"video {record.videos.index(visual) + 1} of {len(record.videos)}"
        file = visual.source if isinstance(visual.source, Path) else visual.source[0]
    else:
        position, file = f"image {record.images.index(visual) + 1} of {len(record.images)}", visual
    return record.error(f"{position}, {shortened(str(visual), LONGEST_NAME)}: {error}", error.kind, str(file))


def load_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """The samples of the first `limit` records of a file, from cache_dir if they are there.

    One process of a machine makes them and writes the entry; the others wait until it is there, or
    take over if that process ends without writing it.
    """
    progress(str(file), 0)
    if preparation.basic.cache_dir is None:
        return make_samples(file, preparation, limit, progress)
    folder = Path(preparation.basic.cache_dir)
    entry = folder / f"{file.stem}-{preparation.cache_key(file, limit)}.safetensors"
    samples = _load_entry(entry)
    while samples is None:
        with try_lock(folder) as has_lock:
            if entry.is_file():
                samples = _load_entry(entry)
            elif has_lock:
                samples = make_samples(file, preparation, limit, progress)
                _write(samples, entry)
                samples = _load_entry(entry) or samples  # the processes share the file's pages, not this memory
        if samples is None:
            progress(f"{file}, which another process tokenises", 0)
            time.sleep(POLL_INTERVAL)
    return samples


def _load_entry(entry: Path) -> FileSamples | None:
    """The samples of an entry, or None; an entry that is damaged or outdated is removed."""
    if not entry.is_file():
        return None
    try:
        samples = _read(entry)
        if not samples.skipped.is_outdated():
            return samples
    except (SafetensorError, ValueError):  # ValueError: the digest does not match
        pass
    entry.unlink(missing_ok=True)  # now: later, a file of this name may be another process's new entry
    return None


def tokenised(
    file: Path,
    preparation: Preparation,
    limit: int | None = None,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[tuple[Record, TokenisedSample]]:
    """The first `limit` records, with their samples; skip, warnings: as for `read_records`."""
    skip = skip or partial(_refuse, preparation.basic.dataset_dir)
    for record in read_records(file, preparation.attr, preparation.folder(), limit, skip=skip, warnings=warnings):
        try:
            sample = preparation.tokenise(record)
        except RecordError as error:
            skip(error)
        else:
            b = preparation.basic
            if warnings is not None:
                warnings.count_spelled(sample.spelled, record.source)
                for kind in sample.odd:
                    warnings.count(kind, 1, record.source)
                dropped = dropped_thoughts(record, preparation.style)
                masked = masked_answers(record, b.mask_history)
                for kind, count in (("thoughts", dropped), ("masked", masked), ("unseen", sample.unseen)):
                    if count:
                        warnings.count(kind, count, record.source)
            yield record, sample


def _refuse(dataset_dir: str, error: RecordError) -> NoReturn:
    hint = f", dataset_dir is {dataset_dir}" if error.kind.endswith(" missing") else ""
    raise RecordError(f"{error}{hint}; on_bad_record: skip leaves such records out", error.kind, error.image) from None


def make_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = silent) -> FileSamples:
    """Read and tokenise a file. Raises RecordError for an unusable record, unless it is skipped."""
    ids, loss_mask = bytearray(), bytearray()  # joining a list of arrays would take twice the memory
    grids, sources, visuals = [], [], []
    lengths, visual_counts = [0], [0]
    skipped, warnings = Skipped(), DataWarnings.expecting(preparation.attr)

    def add_skipped(error: RecordError) -> None:
        skipped.add(error)
        progress(str(error), 1)

    skip = add_skipped if preparation.basic.on_bad_record == "skip" else None
    for record, sample in tokenised(file, preparation, limit, skip, warnings):
        progress(record.source, 1)
        ids += sample.ids.data
        loss_mask += sample.loss_mask.data
        lengths.append(len(sample.ids))
        grids += sample.grids
        visual_counts.append(len(sample.grids))
        sources.append(record.source)
        visuals += [visual_to_json(*pair) for pair in zip(record.visuals, sample.extents, strict=True)]
    return FileSamples(
        str(file),
        torch.frombuffer(ids, dtype=torch.int32) if ids else torch.zeros(0, dtype=torch.int32),
        torch.frombuffer(loss_mask, dtype=torch.bool) if ids else torch.zeros(0, dtype=torch.bool),
        torch.tensor(lengths).cumsum(0),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        torch.tensor(visual_counts).cumsum(0),
        sources,
        visuals,
        len(sources) + len(skipped),
        skipped,
        warnings,
    )


# what a cache entry holds of FileSamples: tensors, and fields as JSON
TENSORS = ("ids", "loss_mask", "offsets", "grids", "image_offsets")
JSON_FIELDS = ("file", "sources", "visuals", "records")


def visual_to_json(visual: Visual, extent: Extent) -> str | dict[str, Any]:
    """A JSON value, from which visual_from_json makes the image's path or the Video again."""
    if not isinstance(visual, Video) or isinstance(extent, int):
        return str(visual)
    source = str(visual.source) if isinstance(visual.source, Path) else [str(frame) for frame in visual.source]
    return {"source": source, "fps": visual.fps, "seconds": [seconds for seconds, _ in extent]}


def visual_from_json(plain: str | dict[str, Any]) -> Visual:
    """The image or video of an item of `FileSamples.visuals`."""
    if isinstance(plain, str):
        return Path(plain)
    source = plain["source"]
    return Video(Path(source) if isinstance(source, str) else tuple(map(Path, source)), plain["fps"])


def paths_of(visual: Visual) -> tuple[Path, ...]:
    """The files or folder of an image or video, whose links were resolved when it was read."""
    source = visual.source if isinstance(visual, Video) else visual
    return source if isinstance(source, tuple) else (source,)


def _read(path: Path) -> FileSamples:
    """The tensors stay mapped from the file, whose pages the processes of a machine share."""
    with safe_open(path, framework="pt") as entry:
        tensors = {key: entry.get_tensor(key) for key in (*TENSORS, "names")}
        if (entry.metadata() or {}).get("digest") != _digest(tensors):
            raise ValueError(f"{path}: is not what was written")
    names = json.loads(tensors.pop("names").numpy().tobytes())
    names["skipped"], names["warnings"] = Skipped(**names["skipped"]), DataWarnings(**names["warnings"])
    return FileSamples(**tensors, **names)


def _write(samples: FileSamples, path: Path) -> None:
    """Raises SettingError."""
    names = {name: getattr(samples, name) for name in JSON_FIELDS}
    names |= {part: asdict(getattr(samples, part)) for part in ("skipped", "warnings")}
    tensors = {name: getattr(samples, name) for name in TENSORS}
    tensors["names"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    try:
        with replacing(path, keep_first=True) as temporary:
            save_file(tensors, temporary, {"digest": _digest(tensors)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # before the rename: a machine that goes down must not leave half an entry
    except (OSError, SafetensorError) as error:  # safetensors raises its own where it cannot write
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingError(f"data.dataset_param.basic_parameters.cache_dir: {path.parent}: {reason}") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """Covers names, types, shapes and every byte; takes 0.1 s for the tokens of 150,000 records."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
