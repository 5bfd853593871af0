"""Where a server of the exported model would do otherwise than the training: lines for its start.

A server prompts by the model folder's chat template and stops at the tokens that the folder's
configs name. Neither knows what was trained.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qwen35.config.schema import Settings
from qwen35.data.dataset import Dataset
from qwen35.data.files import read_chat_template, read_config
from qwen35.data.style import DEFAULT_EFFORT, thinks_by_default
from qwen35.data.template import EMPTY_THOUGHT, IM_END
from qwen35.errors import SettingError
from qwen35.wording import number_of

OPEN_THOUGHT = EMPTY_THOUGHT[: EMPTY_THOUGHT.index("\n") + 1]  # as a prompt ends that asks for a thought
GENERATION_CONFIG, MODEL_CONFIG = "generation_config.json", "config.json"


def serving_notes(settings: Settings, dataset: Dataset) -> list[str]:
    """Raises SettingError."""
    finders = (_other_prompts, _other_ends, _cut_answers)
    return [line for find in finders if (line := find(settings, dataset))]


def _other_prompts(settings: Settings, dataset: Dataset) -> str | None:
    """A line if servers write other prompts by default than those that all answers follow."""
    _, file = read_chat_template(settings.tokenizer_dir) or ("", "")
    style = dataset.preparation.style
    opens: bool | None = None
    with suppress(SettingError):  # a template without think blocks, or none
        opens = thinks_by_default(settings.tokenizer_dir)
    if style.template == "qwen3_vl_nothink":
        advice = "serve it with a template that writes none, or train template: qwen3_5"
        how = f"qwen3_vl_nothink trains answers after no think block, and servers write one by {file}"
        return None if opens is None else f"{how}; {advice}"
    ask: dict[str, Any] = {}
    reasons: list[str] = []
    thoughts, empty = _openings(dataset)
    if opens is not None and bool(thoughts) != bool(empty) and opens != bool(thoughts):
        ask["enable_thinking"] = not opens
        trained, asked = ("an empty", "opens one") if opens else ("an open", "writes an empty one")
        reasons.append(f"all answers are trained after {trained} think block, and {file} {asked}")
    if style.preserve_thinking not in (None, style.dialect.keeps_thoughts):
        ask["preserve_thinking"] = style.preserve_thinking
    if style.reasoning_effort not in (None, DEFAULT_EFFORT):
        ask["reasoning_effort"] = style.reasoning_effort
    if own := [name for name in ask if name != "enable_thinking"]:
        reasons.append(
            f"{' and '.join(own)} of the recipe {'is' if len(own) == 1 else 'are'} not the default of {file}"
        )
    if not ask:
        return None
    how = f"ask servers with chat_template_kwargs {json.dumps(ask)} (vLLM: --default-chat-template-kwargs)"
    return f"{'; '.join(reasons)}: {how}"


def _openings(dataset: Dataset) -> tuple[int, int]:
    """How many answers are trained after an open thought, and how many after an empty one."""
    encode, counts = dataset.preparation.tokenizer.encode_text, []
    for opening in (encode(OPEN_THOUGHT), encode(EMPTY_THOUGHT)):
        before, count = np.arange(-len(opening), 0), 0
        for samples in dataset.files:
            trained = samples.loss_mask.numpy()
            starts = np.flatnonzero(trained[1:] & ~trained[:-1]) + 1  # of what is trained
            starts = starts[starts >= len(opening)]
            count += int((samples.ids.numpy()[starts[:, None] + before] == opening).all(1).sum())
        counts.append(count)
    return counts[0], counts[1]


def _other_ends(settings: Settings, dataset: Dataset) -> str | None:
    """A line if the end of an answer is no token at which servers stop."""
    tokenizer = dataset.preparation.tokenizer
    end = tokenizer.im_end_id
    folder = settings.model.model_name_or_path
    found = stop_tokens(folder, GENERATION_CONFIG) or stop_tokens(folder, MODEL_CONFIG)
    if end in found:
        return None
    by_tokenizer = tokenizer.eos_token == IM_END  # vLLM stops there too
    who = "transformers' generate() does" if by_tokenizer else "servers and transformers' generate() do"
    return (
        f"answers are trained to end with {IM_END}, where {who} not stop by {folder}/{GENERATION_CONFIG}: name it there, "
        f'"eos_token_id": [{end}, {tokenizer.pad_id}], before the export copies that file'
    )


def _cut_answers(settings: Settings, dataset: Dataset) -> str | None:
    """A line if answers are longer than those that servers give by default. Raises SettingError."""
    file = Path(settings.model.model_name_or_path) / GENERATION_CONFIG
    limit = read_config(file.parent, file.name).get("max_new_tokens") if file.is_file() else None
    if type(limit) is not int:
        return None
    edges = [np.flatnonzero(np.diff(s.loss_mask.numpy().astype(np.int8), prepend=0, append=0)) for s in dataset.files]
    count = sum(int((at[1::2] - at[::2] > limit).sum()) for at in edges)
    cut = f"of more than {limit:,} tokens, at which vLLM and transformers' generate() cut them unless asked for more"
    advice = f"raise max_new_tokens in {file}, or take it out, before the export copies that file"
    return f"{number_of(count, 'trained answer')} {cut}: {advice}" if count else None


def stop_tokens(folder: str | Path, name: str) -> set[int]:
    """The tokens that a config of a model folder, if it is there, names as ends. SettingError."""
    ids: set[int] = set()
    if not (Path(folder) / name).is_file():
        return ids
    config = read_config(folder, name)
    for level in (config, config.get("text_config")):
        named = level.get("eos_token_id") if isinstance(level, dict) else None
        tokens: list[Any] = [t for t in (named if isinstance(named, list) else [named]) if t is not None]
        if not all(type(token) is int for token in tokens):
            raise SettingError(f"{folder}/{name}: eos_token_id: {str(named)[:80]} is no token's number")
        ids.update(tokens)
    return ids
