"""What turns records into tokens, and images into patches: the template, tokenizer, processors."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from qwen35.config.schema import Attr, BasicParameters, DatasetFile, Settings, attr_of, dataset_entries
from qwen35.data.chat_template import ChatTemplate
from qwen35.data.checkpoint_template import checkpoint_pieces, checkpoint_prompt
from qwen35.data.conversations import conversations
from qwen35.data.fields import FieldNames
from qwen35.data.files import is_text_only
from qwen35.data.image_processor import ImageError, ImageProcessor, Odd
from qwen35.data.media import ImageFolder
from qwen35.data.mixture import dataset_files
from qwen35.data.record import Record, RecordError, Turn, Video, Visual
from qwen35.data.style import DEFAULT_STYLE, Style, style_of
from qwen35.data.template import (
    Piece,
    as_asked,
    as_trained,
    check_thoughts,
    prompt_pieces,
    training_pieces,
    unprompted_answers,
)
from qwen35.data.tokenizer import ChatTokenizer, Extent, Spelled
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError, shortened

CODE_FILES = sorted(Path(__file__).parent.glob("*.py"))  # cached samples depend on all of it
LONGEST_TEXT = 4 << 20  # characters of a record: each takes 240 bytes while it is tokenised
LONGEST_NAME = 200  # characters of an image's path in a message
FOR_TEXT_ONLY = "the model is text-only, it sees none; train the vision-language one, or leave the record out"

Part = tuple[Record, list[Piece], int]  # a conversation, what the template writes, and answers that it does not train


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
class Preparation:
    """Tokenizer, processors and settings: they turn records into tokens, images into patches."""

    tokenizer: ChatTokenizer
    images: ImageProcessor | None  # None, and videos too: of a text-only model
    basic: BasicParameters
    attr: Attr
    videos: VideoProcessor | None
    style: Style = DEFAULT_STYLE
    chat_template: ChatTemplate | None = None  # the model folder's, with which our rendering is compared
    pairs: bool = False  # each record is a preference pair

    @classmethod
    def of(cls, settings: Settings) -> "Preparation":
        param = settings.data.dataset_param
        limits = param.preprocess_parameters
        folder = settings.tokenizer_dir
        text_only = is_text_only(settings.model.model_name_or_path)
        pixels = limits.image_min_pixels, limits.image_max_pixels
        images = None if text_only else ImageProcessor.from_folder(folder, *pixels)
        videos = None if text_only else VideoProcessor.from_folder(folder, limits)
        basic = param.basic_parameters
        tokenizer = ChatTokenizer(folder, basic.special_tokens_in_prompts)
        style, template = style_of(folder, basic), reference_template(folder, basic)
        is_dpo = settings.training.stage == "dpo"
        return cls(tokenizer, images, basic, param.attr, videos, style, template, is_dpo)

    @property
    def names(self) -> FieldNames:
        """Of the records' fields. Raises SettingError."""
        return FieldNames.of(self.attr, self.pairs)

    @property
    def unit(self) -> str:
        """What is packed, and left out, as a whole."""
        return "pair" if self.pairs else "sample"

    def of_file(self, entry: DatasetFile) -> "Preparation":
        """For the records of one file, which may have a format and names of its own."""
        return replace(self, attr=attr_of(entry, self.attr))

    def files(self) -> Iterator[tuple[Path, "Preparation"]]:
        """Each file of the dataset, and how its records are read. Raises SettingError."""
        entries = map(self.of_file, dataset_entries(self.basic.dataset))
        return zip(dataset_files(self.basic.dataset), entries, strict=True)

    def tokenise(self, record: Record) -> list[tuple[Record, TokenisedSample]]:
        """The conversations that a record is trained as: of a pair two. Raises RecordError."""
        if record.rejected:
            return self._pair(record, record.rejected)
        self._check_thoughts(record)
        record = as_trained(record, self.style)
        is_foreign, splits = self.style.template == "checkpoint", self.basic.multi_turn == "split"
        parts: Iterable[Part] = self._parts(record, joined=is_foreign or not splits)
        if is_foreign and splits:  # it may write history as it wrote the prompts: then nothing needs a split
            parts = list(parts)
            if any(unseen for _, _, unseen in parts):
                parts = self._parts(record, joined=False)
        return [(part, self._sample(part, pieces, unseen)) for part, pieces, unseen in parts]

    def _pair(self, chosen: Record, rejected: Record) -> list[tuple[Record, TokenisedSample]]:
        made: list[tuple[Record, TokenisedSample]] = []
        for name, side in (("chosen", replace(chosen, rejected=None)), ("rejected", rejected)):
            self._check_thoughts(side)
            side = as_trained(replace(side, source=f"{side.source}, {name}"), self.style)
            made += [
                (part, self._sample(part, pieces, unseen)) for part, pieces, unseen in self._parts(side, joined=True)
            ]
        (good, prompt), *others = ((s.ids, s.ids[: s.loss_mask.argmax()]) for _, s in made)
        if len(others) == 1 and np.array_equal(good, others[0][0]):
            raise chosen.error("its two answers are equal as they are trained; leave the pair out", "equal answers")
        if len(others) > 1 or not np.array_equal(prompt, others[0][1]):
            raise chosen.error(
                "the chat template writes other prompts for answers with a thought than for those without; give each answer of "
                "a pair one, or none (enable_thinking: false drops them)",
                "prompts that differ",
            )
        return made

    def _parts(self, record: Record, joined: bool) -> Iterator[Part]:
        for part, style in conversations(record, self.style, self.basic.mask_history, joined):
            yield part, *self._pieces(part, style)

    def _check_thoughts(self, record: Record) -> None:
        if self.style.template != "checkpoint" or self.style.enable_thinking is False:
            check_thoughts(record, self.style)

    def _sample(self, record: Record, pieces: Sequence[Piece], unseen: int) -> TokenisedSample:
        """Tokens, loss mask and grids; images are not decoded. Raises RecordError."""
        if (length := sum(len(piece.text) for piece in pieces)) > LONGEST_TEXT:
            raise record.error(f"{length:,} characters of text, more than {LONGEST_TEXT:,}; cut it", "text too long")
        odd: Odd = []
        grids, extents = self.measure(record, odd)
        spelled: Spelled = {}
        ids, loss_mask = self.tokenizer.encode(pieces, extents, spelled)
        if not loss_mask[1:].any():
            raise record.error("nothing in it is trained", "nothing trained")
        return TokenisedSample(ids, loss_mask, grids, spelled, extents, odd, unseen)

    def _pieces(self, record: Record, style: Style) -> tuple[list[Piece], int]:
        """What the template writes, and how many answers it does not train."""
        if style.template == "checkpoint" and self.chat_template:
            pieces, unseen = checkpoint_pieces(record, self.chat_template, style)
            self._check_history(record, [turn for turn in record.turns if unseen or turn.loss is False])
            return pieces, unseen
        pieces = training_pieces(record, style, self.basic.train_on_prompt)
        if self.chat_template:
            self.chat_template.check_training(record, style)
        return pieces, unprompted_answers(record, style)

    def prompt(self, record: Record, thinking: bool) -> list[Piece]:
        """The pieces before the answer; thinking: as for `prompt_pieces`. Raises RecordError."""
        self._check_thoughts(record)
        if self.style.template == "checkpoint" and self.chat_template:
            self._check_history(record, as_asked(record))
            return checkpoint_prompt(as_trained(record, self.style), self.chat_template, self.style, thinking)
        pieces = prompt_pieces(record, self.style, thinking)
        if self.chat_template:
            self.chat_template.check_prompt(record, self.style, thinking)
        return pieces

    def _check_history(self, record: Record, turns: Sequence[Turn]) -> None:
        """Refuse special tokens in earlier answers that would become characters.

        A foreign template does not show which of its words are an answer's. Raises RecordError.
        """
        for turn in turns if self.basic.special_tokens_in_prompts == "text" else ():
            spelled = [turn.text[slice(*span)] for span in self.tokenizer.special_in(turn.text)]
            if turn.role == "assistant" and (names := [t for t in spelled if t not in self.tokenizer.control_names]):
                raise record.error(
                    f"an earlier answer spells {names[0]}, which special_tokens_in_prompts: text would turn into characters "
                    "under template: checkpoint, though it is a token where the answer is trained; set it to tokens"
                )

    def folder(self) -> ImageFolder:
        """Where images and videos are looked up. Raises SettingError."""
        return ImageFolder(self.basic.dataset_dir, self.basic.cache_dir)

    def measure(self, record: Record, odd: Odd | None = None) -> tuple[list[tuple[int, int, int]], list[Extent]]:
        """The grid of each image and video, and how many tokens each takes. Raises RecordError."""
        grids: list[tuple[int, int, int]] = []
        extents: list[Extent] = []
        for visual in record.visuals:
            try:
                if self.images is None or self.videos is None:
                    raise ImageError(FOR_TEXT_ONLY, "image or video for a text-only model")
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
        assert self.images is not None and self.videos is not None  # `measure` raised before
        return self.videos.patches(visual) if isinstance(visual, Video) else self.images.patches(visual)

    @property
    def patch_dim(self) -> int:
        return self.images.patch_dim if self.images else 0

    def cache_key(self, file: Path, limit: int | None) -> str:
        """A hash of the file's content, and of the settings and the code that tokens depend on."""
        settings = asdict(self.basic)
        # cached samples do not depend on these: they are truncated only after they are loaded
        for name in ("dataset", "cache_dir", "cutoff_len", "truncation", "max_samples"):
            del settings[name]
        settings["dataset_dir"] = os.path.realpath(self.basic.dataset_dir)
        processors = [processor and asdict(processor) for processor in (self.images, self.videos)]
        template = self.style.dialect.name, self.chat_template and asdict(self.chat_template)
        settings["pairs"] = self.pairs
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


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
