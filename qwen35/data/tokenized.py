"""Tokenised samples of one file: made once, kept in the cache where there is one."""

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
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.files import replacing, try_lock
from qwen35.data.folder import ImageFolder
from qwen35.data.formats import read_records
from qwen35.data.image_processor import ImageError, ImageProcessor
from qwen35.data.record import Record, RecordError, Video, Visual
from qwen35.data.skipped import Skipped
from qwen35.data.special_tokens import SpecialTokens, Spelled
from qwen35.data.template import check_thoughts, dropped_thoughts, training_pieces
from qwen35.data.tokenizer import ChatTokenizer, Extent
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError, one_line, shortened

MADE_BY = sorted(Path(__file__).parent.glob("*.py"))  # the code that says what becomes of a record, and how it is kept
LONGEST_TEXT = 4 << 20  # characters of a record: each takes 240 bytes while it is tokenised, and no model sees as many
LONGEST_NAME = 200  # characters of an image's path in a message
WAIT = 0.1  # seconds between looks at what another process makes
Progress = Callable[[str, int], object]  # is told what is being read, and how many records more that is


def untold(what: str, records: int) -> None:
    """Nobody asks how far it is."""


@dataclass(frozen=True)
class TokenisedSample:
    ids: np.ndarray  # [T] int32
    trained: np.ndarray  # [T] bool
    grids: list[tuple[int, int, int]]  # patches (1 or t, h, w) of each image or video
    spelled: Spelled = field(default_factory=dict)  # special tokens in its text
    extents: list[Extent] = field(default_factory=list)  # of each image or video


@dataclass(frozen=True)
class FileSamples:
    """N samples of one file, laid end to end, and what was left out."""

    file: str
    ids: Tensor  # [tokens] int32
    trained: Tensor  # [tokens] bool
    offsets: Tensor  # [N+1] int64: sample i is tokens offsets[i]:offsets[i+1]
    grids: Tensor  # [M, 3] int64 of all images and videos
    image_offsets: Tensor  # [N+1] int64: those of sample i
    sources: list[str]  # of each record, for messages
    visuals: list[str | dict[str, Any]]  # [M] the path of an image, or what a Video is
    records: int  # that were read: N and those left out
    skipped: Skipped
    warnings: DataWarnings
    special_tokens: SpecialTokens


@dataclass(frozen=True)
class Preparation:
    """All that turns a record into tokens and an image into patches."""

    tokenizer: ChatTokenizer
    images: ImageProcessor
    basic: BasicParameters
    attr: Attr
    videos: VideoProcessor
    chat_template: ChatTemplate | None = None  # of the model folder, where its text may be another than that of `basic`

    @classmethod
    def of(cls, settings: Settings) -> "Preparation":
        param = settings.data.dataset_param
        limits = param.preprocess_parameters
        folder = settings.tokenizer_dir
        images = ImageProcessor.from_folder(folder, limits.image_min_pixels, limits.image_max_pixels)
        videos = VideoProcessor.from_folder(folder, limits)
        basic = param.basic_parameters
        tokenizer = ChatTokenizer(folder, basic.special_tokens_in_prompts)
        return cls(tokenizer, images, basic, param.attr, videos, own_template(folder, basic))

    def tokenise(self, record: Record) -> TokenisedSample:
        """Raises RecordError. Images are not decoded, only measured."""
        b = self.basic
        check_thoughts(record, b.template)
        pieces = training_pieces(record, b.template, b.enable_thinking, b.train_on_prompt, b.mask_history)
        if self.chat_template:
            self.chat_template.check_training(record, b.enable_thinking)
        if (length := sum(len(piece.text) for piece in pieces)) > LONGEST_TEXT:
            raise record.error(f"{length:,} characters of text, more than {LONGEST_TEXT:,}; cut it", "text too long")
        grids, extents = self.measure(record)
        spelled: Spelled = {}
        ids, trained = self.tokenizer.encode(pieces, extents, spelled)
        if not trained[1:].any():
            raise record.error("nothing in it is trained", "nothing trained")
        return TokenisedSample(ids, trained, grids, spelled, extents)

    def folder(self) -> ImageFolder:
        """Raises SettingError."""
        return ImageFolder(self.basic.dataset_dir, self.basic.cache_dir)

    def measure(self, record: Record) -> tuple[list[tuple[int, int, int]], list[Extent]]:
        """Of each image and video: its grid, and how many tokens it takes. Raises RecordError."""
        grids: list[tuple[int, int, int]] = []
        extents: list[Extent] = []
        for visual in record.visuals:
            try:
                if isinstance(visual, Video):
                    clip = self.videos.clip(visual)
                    each = self.videos.tokens((1, *clip.grid[1:]))
                    grids.append(clip.grid)
                    extents.append([(seconds, each) for seconds in clip.seconds])
                else:
                    grids.append(self.images.grid(visual))
                    extents.append(self.images.tokens(grids[-1]))
            except ImageError as error:
                raise _named(record, visual, error) from None
        return grids, extents

    def patches(self, visual: Visual) -> tuple[Tensor, tuple[int, int, int]]:
        """pixels [P, 3*2*16*16] and the grid. Raises ImageError."""
        return self.videos.patches(visual) if isinstance(visual, Video) else self.images.patches(visual)

    def cache_key(self, file: Path, limit: int | None) -> str:
        """Changes with the file's content, and with the settings and the code that the tokens depend on."""
        settings = asdict(self.basic)
        # these do not change what is kept: samples are whole there, and cut as they are read
        for name in ("dataset", "cache_dir", "cutoff_len", "truncation", "max_samples"):
            del settings[name]
        settings["dataset_dir"] = os.path.realpath(self.basic.dataset_dir)
        processors = [asdict(self.images), asdict(self.videos)]
        made_by = [
            str(file),
            limit,
            settings,
            asdict(self.attr),
            processors,
            self.tokenizer.control_names,
            self.chat_template and asdict(self.chat_template),
        ]
        digest = hashlib.sha256(json.dumps(made_by).encode())
        for path in (file, self.tokenizer.file, *MADE_BY):
            digest.update(_file_digest(path))
        return digest.hexdigest()[:32]


def own_template(folder: str | Path, basic: BasicParameters) -> ChatTemplate | None:
    """What records are to be compared with: nothing where the recipe asks for another text. Raises SettingError."""
    return ChatTemplate.from_folder(folder) if basic.template == "qwen3_5" else None


def _named(record: Record, visual: Visual, error: ImageError) -> RecordError:
    if isinstance(visual, Video):
        which = f"video {record.videos.index(visual) + 1} of {len(record.videos)}"
        file = visual.source if isinstance(visual.source, Path) else visual.source[0]
    else:
        which, file = f"image {record.images.index(visual) + 1} of {len(record.images)}", visual
    return record.error(f"{which}, {shortened(str(visual), LONGEST_NAME)}: {error}", error.kind, str(file))


def load_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = untold) -> FileSamples:
    """The first `limit` samples of a file, from cache_dir if they are there, else made (and kept there).

    Of the processes of a machine one makes them, and the others wait for it: they find its entry, or take its place.
    """
    progress(str(file), 0)
    if preparation.basic.cache_dir is None:
        return make_samples(file, preparation, limit, progress)
    folder = Path(preparation.basic.cache_dir)
    kept = folder / f"{file.stem}-{preparation.cache_key(file, limit)}.safetensors"
    samples = _usable(kept)
    while samples is None:
        with try_lock(folder) as has_lock:
            if kept.is_file():
                samples = _usable(kept)
            elif has_lock:
                samples = make_samples(file, preparation, limit, progress)
                _write(samples, kept)
                samples = _usable(kept) or samples  # in the file, which all share, not in this process's memory
        if samples is None:
            progress(f"{file}, which another process tokenises", 0)
            time.sleep(WAIT)
    return samples


def _usable(kept: Path) -> FileSamples | None:
    """The samples of an entry, or none, and then it is gone: cut short (a full disk, a crash), damaged since, outdated."""
    if not kept.is_file():
        return None
    try:
        samples = _read(kept)
        if not samples.skipped.is_outdated():
            return samples
    except (SafetensorError, ValueError):  # the second: a bit that was flipped
        pass
    kept.unlink(missing_ok=True)  # now: whatever has this name later is another's new one
    return None


def tokenised(
    file: Path,
    preparation: Preparation,
    limit: int | None = None,
    skip: Callable[[RecordError], object] | None = None,
    warnings: DataWarnings | None = None,
) -> Iterator[tuple[Record, TokenisedSample]]:
    """Of the first `limit` records of a file; `skip`, `warnings`: as for `read_records`."""
    tell = skip or partial(_refuse, preparation.basic.dataset_dir)
    for record in read_records(file, preparation.attr, preparation.folder(), limit, skip=tell, warnings=warnings):
        try:
            sample = preparation.tokenise(record)
        except RecordError as error:
            tell(error)
        else:
            b = preparation.basic
            if warnings is not None and (dropped := dropped_thoughts(record, b.template, b.enable_thinking)):
                warnings.count("thoughts", dropped, record.source)
            yield record, sample


def _refuse(dataset_dir: str, error: RecordError) -> NoReturn:
    below = f", dataset_dir is {dataset_dir}" if error.kind.endswith(" missing") else ""
    raise RecordError(f"{error}{below}; on_bad_record: skip leaves such records out", error.kind, error.image) from None


def make_samples(file: Path, preparation: Preparation, limit: int | None, progress: Progress = untold) -> FileSamples:
    """Read and tokenise. Raises RecordError for the first record that cannot be used, unless such are to be skipped."""
    ids, trained = bytearray(), bytearray()  # which grow in place: a list to be joined would take twice the memory
    grids, sources, visuals = [], [], []
    lengths, counts = [0], [0]
    skipped, warnings, special_tokens = Skipped(), DataWarnings.expecting(preparation.attr), SpecialTokens()

    def skip(error: RecordError) -> None:
        skipped.add(error)
        progress(str(error), 1)

    tell = skip if preparation.basic.on_bad_record == "skip" else None
    for record, sample in tokenised(file, preparation, limit, tell, warnings):
        progress(record.source, 1)
        ids += sample.ids.data
        trained += sample.trained.data
        lengths.append(len(sample.ids))
        grids += sample.grids
        counts.append(len(sample.grids))
        sources.append(record.source)
        special_tokens.add(record.source, sample.spelled)
        visuals += [_plain(*pair) for pair in zip(record.visuals, sample.extents, strict=True)]
    return FileSamples(
        str(file),
        torch.frombuffer(ids, dtype=torch.int32) if ids else torch.zeros(0, dtype=torch.int32),
        torch.frombuffer(trained, dtype=torch.bool) if ids else torch.zeros(0, dtype=torch.bool),
        torch.tensor(lengths).cumsum(0),
        torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        torch.tensor(counts).cumsum(0),
        sources,
        visuals,
        len(sources) + len(skipped),
        skipped,
        warnings,
        special_tokens,
    )


TENSORS = ("ids", "trained", "offsets", "grids", "image_offsets")
NAMES = ("file", "sources", "visuals", "records")


def _plain(visual: Visual, extent: Extent) -> str | dict[str, Any]:
    if not isinstance(visual, Video) or isinstance(extent, int):
        return str(visual)
    source = str(visual.source) if isinstance(visual.source, Path) else [str(frame) for frame in visual.source]
    return {"source": source, "fps": visual.fps, "seconds": [seconds for seconds, _ in extent]}


def visual_of(plain: str | dict[str, Any]) -> Visual:
    """What `FileSamples.visuals` says."""
    if isinstance(plain, str):
        return Path(plain)
    source = plain["source"]
    return Video(Path(source) if isinstance(source, str) else tuple(map(Path, source)), plain["fps"])


def paths_of(visual: Visual) -> tuple[Path, ...]:
    """The files that are read, or the folder; real paths, as they were when the record was read."""
    source = visual.source if isinstance(visual, Video) else visual
    return source if isinstance(source, tuple) else (source,)


def _read(path: Path) -> FileSamples:
    """The tensors stay in the file, which the processes of a machine share in memory."""
    with safe_open(path, framework="pt") as kept:
        tensors = {name: kept.get_tensor(name) for name in (*TENSORS, "names")}
        if (kept.metadata() or {}).get("digest") != _digest(tensors):
            raise ValueError(f"{path}: is not what was written")
    names = json.loads(tensors.pop("names").numpy().tobytes())
    names["skipped"], names["warnings"] = Skipped(**names["skipped"]), DataWarnings(**names["warnings"])
    names["special_tokens"] = SpecialTokens(**names["special_tokens"])
    return FileSamples(**tensors, **names)


def _write(samples: FileSamples, path: Path) -> None:
    """Raises SettingError."""
    names = {name: getattr(samples, name) for name in NAMES}
    names |= {part: asdict(getattr(samples, part)) for part in ("skipped", "warnings", "special_tokens")}
    tensors = {name: getattr(samples, name) for name in TENSORS}
    tensors["names"] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
    try:
        with replacing(path, keep_first=True) as temporary:
            save_file(tensors, temporary, {"digest": _digest(tensors)})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # before it has its name: a machine that goes down must not leave half of it
    except (OSError, SafetensorError) as error:  # the second where its library cannot write
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingError(f"data.dataset_param.basic_parameters.cache_dir: {path.parent}: {reason}") from None


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and every byte: 0.1 s for the tokens of 150,000 records."""
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
