"""Whether the tokenizer that is used is that of the weights: their folder may have another."""

from pathlib import Path
from typing import Any

from qwen35.config.schema import TRAIN_SET, Settings
from qwen35.data.files import read_chat_template
from qwen35.errors import SettingError, read_object
from qwen35.wording import number_of


def other_tokenizers(settings: Settings, base: Path) -> list[str]:
    """Lines about the tokenizers and templates of config and weights that differ from those used.

    base: where the weights come from. Raises SettingError if a token has another id in one of these
    folders, since its weights would be trained on ids that mean something else to them.
    """
    used = Path(settings.tokenizer_dir)
    folders = {path.resolve(): path for path in (Path(settings.model.model_name_or_path), base)}
    folders.pop(used.resolve(), None)
    lines = []
    for folder in folders.values():
        lines += _differences(folder, used) if (folder / "tokenizer.json").is_file() else []
        if settings.data.dataset_param.basic_parameters.template == "qwen3_5" and (own := read_chat_template(used)):
            try:
                other = read_chat_template(folder)
            except SettingError as error:  # it is not used, so it stops nothing
                lines.append(f"not read: {error}; records are rendered by {own[1]}")
                continue
            if other and other[0] != own[0]:
                lines.append(f"{other[1]}: not read: differs from {own[1]}, by which records are rendered")
    return lines


def _differences(folder: Path, used: Path) -> list[str]:
    path, own_path = folder / "tokenizer.json", used / "tokenizer.json"
    if path.read_bytes() == own_path.read_bytes():
        return []
    other, own = (read_object(file, SettingError) for file in (path, own_path))
    ids, own_ids = _ids(other), _ids(own)
    if moved := [token for token, number in ids.items() if own_ids.get(token, number) != number]:
        first = moved[0]
        raise SettingError(
            f"{path}: gives {number_of(len(moved), 'token')} other ids than {own_path}, which is used: {ascii(first)[:80]} is"
            f" {ids[first]} and not {own_ids[first]}; name {folder} in {TRAIN_SET}.preprocess_parameters.model_name_or_path,"
            " or take the tokenizer out of it if its weights are for the other"
        )
    lines = []
    if missing := [token for token in ids if token not in own_ids]:
        count = number_of(len(missing), "token")
        lines.append(f"{path}: not read: has {count} that {own_path} lacks, {ascii(missing[0])[:80]} first")
    if _part(other, "merges") != _part(own, "merges"):
        lines.append(f"{path}: not read: its merges differ from those of {own_path}, so texts have other tokens")
    return lines


def _part(tokenizer: dict[str, Any], name: str) -> Any:
    model = tokenizer.get("model")
    part = model.get(name) if isinstance(model, dict) else None
    if name == "merges" and isinstance(part, list):  # "a b", as files of before 2024 have them, or ["a", "b"]
        return [" ".join(pair) if isinstance(pair, list) else pair for pair in part]
    return part


def _ids(tokenizer: dict[str, Any]) -> dict[str, Any]:
    added = tokenizer.get("added_tokens") or []
    return {**(_part(tokenizer, "vocab") or {}), **{token["content"]: token["id"] for token in added}}
