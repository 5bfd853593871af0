"""Turns pieces of text into token ids and a loss mask, and ids back into text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from qwen35.data.files import read_config
from qwen35.data.template import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Piece
from qwen35.errors import SettingError, one_line

# Special tokens that separate turns, end an answer, or stand for something other than text. Text
# that spells one of them stays text, whoever wrote it: as a token it would forge a turn, an image
# or the end of the answer. The audio tokens are here because speech models of this family act on
# them. All other special tokens are markup (`<|box_start|>`, and those that users add).
CONTROL_TOKENS = (
    IM_START, IM_END, "<|endoftext|>", VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD, "<|audio_start|>",
    "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_bos_single>", "<tts_text_eod>",
)  # fmt: skip
# The chat template writes these around thoughts, calls and responses. They are tokens in any text,
# even with a tokenizer that, unlike the published one, marks them as special.
TEMPLATE_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# The family's other added tokens; what else a tokenizer has, somebody added.
MARKUP = """<|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|fim_prefix|>
    <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
# Where text is cut before BPE. transformers puts this in place of what the file says, whose pattern
# is Qwen2's in some checkpoints: there, combining marks (\p{M}) are cut off from their letters.
# Source: transformers 5.23, Qwen3_5Tokenizer, and pretokenize_regex in the published
# tokenizer_config.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Outcome = Literal["control", "text", "token"]  # a control token kept as text, markup kept as text, markup as a token
Spelled = dict[Outcome, set[str]]  # the special tokens that the text of one record spells
Extent = int | Sequence[tuple[float, int]]  # number of tokens of an image; (seconds, tokens) per pair of video frames


class ChatTokenizer:
    """The tokenizer.json of a model folder.

    The ids are those that transformers gives for the whole rendered text, with two exceptions. Only
    the template's own control pieces become control tokens (see CONTROL_TOKENS): text that spells
    `<|im_end|>` or `<|image_pad|>` gets the tokens of its characters. If special_tokens_in_prompts
    is "text", so does any special token that user, system or tools spell. Added tokens that are not
    special (`<think>`, `<tool_call>`) are recognised in any text.
    """

    def __init__(self, folder: str | Path, special_tokens_in_prompts: str = "tokens"):
        """Raises SettingError."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise SettingError(f"{path}: no such file; model_name_or_path must name a whole Hugging Face folder")
        self.file = path
        self._tokenizer = _from_file(path)
        self.notes = _use_own_steps(self._tokenizer, path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets count white space
        added = self._tokenizer.get_added_tokens_decoder()
        self._control = {
            token: self._id(token, added) for token in (IM_START, IM_END, VISION_START, IMAGE_PAD, VISION_END)
        }
        config, files = _config(Path(folder))
        ends = [
            _name(folder, config, key, usual) for key, usual in (("pad_token", "<|endoftext|>"), ("eos_token", IM_END))
        ]
        self.pad_id, _ = (self._id(name, added) for name in ends)
        self.image_id = self._control[IMAGE_PAD]
        has_video = self._tokenizer.token_to_id(VIDEO_PAD) is not None
        self.video_id = self._id(VIDEO_PAD, added) if has_video else None
        self.im_end_id = self._control[IM_END]
        self.eos_token = named_tokens(folder)["eos_token"]
        own = {*CONTROL_TOKENS, *TEMPLATE_TAGS, *MARKUP}
        self.new_tokens = {number: token.content for number, token in added.items() if token.content not in own}
        self.control_ids = list(self._control.values())
        self._tokens_in_prompts = special_tokens_in_prompts == "tokens"
        self._special = {i: t.content for i, t in added.items() if t.special and t.content not in TEMPLATE_TAGS}
        self.control_names = sorted({name for name in self._special.values() if name in (*CONTROL_TOKENS, *ends)})
        self._markup = {i for i, name in self._special.items() if name not in self.control_names}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, longest_first)))
        self._tags = {i for i, t in added.items() if t.special and t.content in TEMPLATE_TAGS}
        for key in ("split_special_tokens", "add_prefix_space"):
            if config.get(key):
                raise SettingError(
                    f"{folder}/tokenizer_config.json: {key}: changes the tokens of texts; set it to false"
                )
        if names := _disagreements(config, added.values()):
            shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            raise SettingError(
                f"{path}: does not agree with {' and '.join(files)}, which transformers uses too, about the added tokens "
                f"{shown}; save the tokenizer with transformers' save_pretrained, which writes all that counts"
            )

    def _id(self, token: str, added: dict[int, AddedToken]) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise SettingError(f"{self.file}: has no token {token}; is it a Qwen3.5 tokenizer?")
        if number not in added or not added[number].special:
            raise SettingError(f"{self.file}: {token} is not marked as special, so any text could contain it")
        return number

    def last(self) -> tuple[str, int]:
        """The token with the highest id, and that id."""
        return max(self._tokenizer.get_vocab().items(), key=lambda item: item[1])

    def encode(
        self, pieces: Sequence[Piece], visuals: Sequence[Extent] = (), spelled: Spelled | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] int32, loss mask [T] bool; visuals: images and videos in order of appearance.

        An image becomes its number of tokens between a start and an end token; a video becomes, for
        each pair of frames, the time as text, then their tokens between a start and an end token.
        The special tokens that the text spells are added to `spelled`.

        No start and end tokens surround a whole video, although the chat template writes them. The
        models were trained without: the Qwen team's own processor replaces them together with the
        pad (huggingface/transformers pull request 40795, in releases up to 5.9; the published
        configs name 4.57). Their code for training and positions describes the same layout
        (QwenLM/Qwen3-VL, qwen-vl-finetune/qwenvl/data/rope2d.py, get_rope_index_3), as does their
        model in vLLM. Since 5.10, after a refactoring of all processors (pull request 45493), the
        processor replaces only the pad and leaves an outer pair in the prompt; so does vLLM with
        such a release (vllm-project/vllm pull request 41359).
        """
        spelled = {} if spelled is None else spelled
        ids: list[int] = []
        loss_mask: list[bool] = []
        run: list[Piece] = []
        extents = iter(visuals)
        for piece in pieces:
            if piece.fresh or piece.kind not in ("text", "video"):  # a video begins with text, its time
                self._encode_run(run, ids, loss_mask, spelled)
                run = []
            if piece.kind == "text":
                run.append(piece)
            elif piece.kind == "control":
                ids.append(self._control[piece.text])
                loss_mask.append(piece.trained)
            else:
                extent = next(extents)
                if isinstance(extent, int):
                    self._encode_visual(extent, self.image_id, ids, loss_mask)
                    continue
                if self.video_id is None:
                    raise SettingError(f"{self.file}: has no token {VIDEO_PAD}; is it a Qwen3.5 tokenizer?")
                for seconds, n in extent:
                    self._encode_run([*run, Piece(f"<{seconds:.1f} seconds>")], ids, loss_mask, spelled)
                    run = []
                    self._encode_visual(n, self.video_id, ids, loss_mask)
        self._encode_run(run, ids, loss_mask, spelled)
        return np.array(ids, dtype=np.int32), np.array(loss_mask, dtype=bool)

    def _encode_visual(self, n: int, token: int, ids: list[int], loss_mask: list[bool]) -> None:
        ids += [self._control[VISION_START], *[token] * n, self._control[VISION_END]]
        loss_mask += [False] * (n + 2)

    def encode_text(self, text: str, answer: bool = False) -> list[int]:
        """The ids of plain text, which never becomes a control token. answer: as in a Piece."""
        return self.encode([Piece(text, answer=answer)])[0].tolist()

    def _encode_run(self, run: list[Piece], ids: list[int], loss_mask: list[bool], spelled: Spelled) -> None:
        """Text between control tokens, tokenised in one go as at inference."""
        if not run:
            return
        is_markup = self._tokens_in_prompts or any(p.answer for p in run)
        new_ids, starts = self._encode_text("".join(p.text for p in run), is_markup, spelled)
        ids += new_ids
        if len({p.trained for p in run}) == 1:
            loss_mask += [run[0].trained] * len(new_ids)
            return
        mask = np.repeat([p.trained for p in run], [len(p.text) for p in run])
        loss_mask += [bool(mask[start]) for start in starts]

    def _encode_text(self, text: str, is_markup: bool, spelled: Spelled) -> tuple[list[int], list[int]]:
        """The ids of a text, and the character where each begins; is_markup: markup is tokens."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        special = self._special.keys() & set(ids)
        if not special:
            return ids, [start for start, _ in offsets]
        for token in special:
            outcome: Outcome = "control" if token not in self._markup else "token" if is_markup else "text"
            spelled.setdefault(outcome, set()).add(self._special[token])
        tokens = self._tags | self._markup if is_markup else self._tags
        if special <= tokens:
            return ids, [start for start, _ in offsets]
        # The tokenizer treats the text between two added tokens independently, so each such part
        # can be encoded again, as characters.
        kept = [(token, *offset) for token, offset in zip(ids, offsets, strict=True) if token in tokens]
        out: list[int] = []
        starts: list[int] = []
        done = 0
        for token, start, end in [*kept, (-1, len(text), len(text))]:
            part = self._encode_characters(text[done:start])
            out += [*part.ids, token]
            starts += [*(done + begin for begin, _ in part.offsets), start]
            done = end
        return out[:-1], starts[:-1]

    def _encode_characters(self, text: str) -> Encoding:
        self._tokenizer.encode_special_tokens = True
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        self._tokenizer.encode_special_tokens = False
        return encoding

    def decode(self, ids: Sequence[int], control: bool = True) -> str:
        """The text of ids, with control tokens if asked; an incomplete character is `\ufffd`."""
        shown = ids if control else [i for i in ids if i not in self._special or i in self._markup]
        return self._tokenizer.decode(list(shown), skip_special_tokens=False)

    def special_in(self, text: str) -> list[tuple[int, int]]:
        """The spans of a text that spell special tokens."""
        return [match.span() for match in self._spelling.finditer(text)]

    def is_special(self, token: int) -> bool:
        return token in self._special


def _config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the files beside tokenizer.json say, and their names. Raises SettingError.

    As in transformers, two files of older releases count if the newest lists no added tokens.
    """
    config, files = read_config(folder, "tokenizer_config.json"), ["tokenizer_config.json"]
    if "added_tokens_decoder" not in config:
        files += [name for name in ("special_tokens_map.json", "added_tokens.json") if (folder / name).is_file()]
    old = {name: read_config(folder, name) for name in files[1:]}
    added = {"added_tokens": list(old.get("added_tokens.json", ()))}
    return config | old.get("special_tokens_map.json", {}) | added, files


def named_tokens(folder: str | Path) -> dict[str, str]:
    """The tokens that chat templates can name, with transformers' defaults. Raises SettingError."""
    config, _ = _config(Path(folder))
    usual = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    return {key: _name(folder, config, key, usual.get(key, "")) for key in NAMED if config.get(key) or key in usual}


def _name(folder: str | Path, config: dict[str, Any], key: str, usual: str) -> str:
    """The name of a token in tokenizer_config.json, or the usual one. Raises SettingError."""
    token = config.get(key) or usual
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or not name.isprintable():
        raise SettingError(f"{folder}/tokenizer_config.json: {key}: {str(token)[:80]} is not a token")
    return name


def _from_file(path: Path) -> Tokenizer:
    """Raises SettingError."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        if type(error) is Exception:  # all that this library ever raises
            raise SettingError(f"{path}: not a tokenizer: {one_line(error)}") from None
        raise


def _use_own_steps(tokenizer: Tokenizer, path: Path) -> list[str]:
    """Use transformers' normalizer and pre_tokenizer. Returns messages where the file has others.

    Raises SettingError for a model whose tokens are random.
    """
    if getattr(tokenizer.model, "dropout", None):
        raise SettingError(f"{path}: its model has dropout, which makes tokens random; set it to null")
    parts = [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ours: dict[str, Any] = {"normalizer": normalizers.NFC(), "pre_tokenizer": pre_tokenizers.Sequence(parts)}
    differ = [name for name, step in ours.items() if _state(getattr(tokenizer, name)) != _state(step)]
    tokenizer.normalizer, tokenizer.pre_tokenizer = ours.values()
    return [f"{path}: its {name} is not Qwen3.5's, which is used instead, as in transformers" for name in differ]


def _state(step: Any) -> str:
    """What a step does to the text, to be compared: without the offsets that it reports."""
    return "" if step is None else re.sub(r'"trim_offsets":\w+,?', "", step.__getstate__().decode())


def _disagreements(config: Mapping[str, Any], added: Iterable[AddedToken]) -> list[str]:
    """Names of added tokens that transformers would treat differently from tokenizer.json.

    config: as from `_config`; added: the added tokens of tokenizer.json. If config has an
    added_tokens_decoder, transformers uses only its tokens, with its flags. It adds tokens that
    config names elsewhere and tokenizer.json lacks.
    """
    tokens = {token.content: token for token in added}
    named = [entry for key, entry in config.items() if key.endswith("_token") and not isinstance(entry, bool)]
    for key in ("added_tokens_decoder", "added_tokens", "additional_special_tokens", "extra_special_tokens"):
        entries = config.get(key)
        named += entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else []
    names = [entry.get("content") if isinstance(entry, dict) else entry for entry in named if entry is not None]
    odd = {str(name) for name in names if not isinstance(name, str) or name not in tokens}
    if isinstance(listed := config.get("added_tokens_decoder"), dict):
        entries = {
            entry["content"]: entry
            for entry in listed.values()
            if isinstance(entry, dict) and isinstance(entry.get("content"), str)
        }
        for name, token in tokens.items():
            flags = {flag: getattr(token, flag) for flag in ("normalized", "lstrip", "rstrip", "single_word")}
            if name not in entries or flags != {flag: entries[name].get(flag, flags[flag]) for flag in flags}:
                odd.add(name)
    return sorted(odd)
