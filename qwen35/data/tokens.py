"""Pieces of text as token ids, each with whether it is trained."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, processors

from qwen35.data.files import read_config
from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Piece
from qwen35.errors import SettingError, one_line

Extent = int | Sequence[tuple[float, int]]  # tokens of an image; (seconds, tokens) of each pair of frames of a video


class ChatTokenizer:
    """The tokenizer.json of a model folder.

    Only the template's own control pieces become control tokens: a user who writes `<|im_end|>` or `<|image_pad|>` gets the
    tokens of these characters. What the tokenizer does not count as special (`<think>`, `<tool_call>`) is recognised in any
    text, as in the chat template's own output.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SettingError(f"{path}: no such file; model_name_or_path names a whole Hugging Face folder")
        self.file = path
        self._tokenizer = _from_file(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special tokens in plain text are plain text
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets count white space
        self._control = {token: self._id(token) for token in (IM_START, IM_END, VISION_START, IMAGE_PAD, VISION_END)}
        pad = read_config(folder, "tokenizer_config.json").get("pad_token") or "<|endoftext|>"
        name = pad.get("content") if isinstance(pad, dict) else pad
        if not isinstance(name, str) or not name.isprintable():
            raise SettingError(f"{folder}/tokenizer_config.json: pad_token: {str(pad)[:80]} is not a token")
        self.pad_id = self._id(name)
        self.image_id = self._control[IMAGE_PAD]
        self.video_id: int | None = self._tokenizer.token_to_id(VIDEO_PAD)
        self.im_end_id = self._control[IM_END]
        self.control_ids = list(self._control.values())

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise SettingError(f"{self.file}: has no token {token}; is it a Qwen3.5 tokenizer?")
        if self._tokenizer.encode(token, add_special_tokens=False).ids == [number]:
            raise SettingError(f"{self.file}: {token} is not marked as special, so that any text could contain it")
        return number

    def last(self) -> tuple[str, int]:
        """The token of the highest id, and that."""
        return max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])

    def encode(self, pieces: Sequence[Piece], visuals: Sequence[Extent] = ()) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] int32 and trained [T] bool; visuals: of each image and video, in order of appearance.

        An image becomes so many tokens between its start and end; a video, for each of its pairs of frames, the time as text
        and so many tokens between a start and an end of their own.
        """
        ids: list[int] = []
        trained: list[bool] = []
        run: list[Piece] = []
        extents = iter(visuals)
        for piece in pieces:
            if piece.fresh or piece.kind not in ("text", "video"):  # a video begins with a text
                self._encode_run(run, ids, trained)
                run = []
            if piece.kind == "text":
                run.append(piece)
            elif piece.kind == "control":
                ids.append(self._control[piece.text])
                trained.append(piece.trained)
            else:
                extent = next(extents)
                if isinstance(extent, int):
                    self._encode_visual(extent, self.image_id, ids, trained)
                    continue
                if self.video_id is None:
                    raise SettingError(f"{self.file}: has no token {VIDEO_PAD}; is it a Qwen3.5 tokenizer?")
                for seconds, n in extent:
                    self._encode_run([*run, Piece(f"<{seconds:.1f} seconds>")], ids, trained)
                    run = []
                    self._encode_visual(n, self.video_id, ids, trained)
        self._encode_run(run, ids, trained)
        return np.array(ids, dtype=np.int32), np.array(trained, dtype=bool)

    def _encode_visual(self, n: int, token: int, ids: list[int], trained: list[bool]) -> None:
        ids += [self._control[VISION_START], *[token] * n, self._control[VISION_END]]
        trained += [False] * (n + 2)

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text; what it spells is never a control token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_run(self, run: list[Piece], ids: list[int], trained: list[bool]) -> None:
        """Text between two control tokens, tokenised in one go as at inference, even where only a part is trained."""
        encoding = self._tokenizer.encode("".join(p.text for p in run), add_special_tokens=False)
        ids += encoding.ids
        if len({p.trained for p in run}) <= 1:
            trained += [bool(run and run[0].trained)] * len(encoding.ids)
            return
        mask = np.repeat([p.trained for p in run], [len(p.text) for p in run])
        trained += [bool(mask[start]) for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int], control: bool = True) -> str:
        """The text of ids; `control`: special tokens too. What is no whole character is `\ufffd`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not control)


def _from_file(path: Path) -> Tokenizer:
    """Raises SettingError."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is Exception:  # all that this library ever raises
            raise SettingError(f"{path}: not a tokenizer: {one_line(error)}") from None
        raise
