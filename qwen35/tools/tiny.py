"""The tiny recipe's model and data, made without a download: `python -m qwen35.tools.tiny`.

A random Qwen3.5-MoE vision-language checkpoint of 1.3 M parameters in the published layout, with
the config, tokenizer and processors of assets/tiny, and the handwritten digits of assets/digits as
LLaVA records, every fifth of them for validation. The base of configs/lora/tiny.yaml is trained on
those of the others that show 0 to 4. For configs/dpo/tiny.yaml each record has a wrong answer, too.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.folders import file_sizes, new_folder
from qwen35.checkpoint.hf_names import EXPERT_PARTS, published_dtype
from qwen35.checkpoint.hf_read import WEIGHTS_FILE, HFFolder
from qwen35.checkpoint.hf_write import EXPORT_MANIFEST
from qwen35.console import outlive_readers
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.model import Qwen35

ASSETS = Path(__file__).parents[2] / "assets"
MODEL_DIR, DIGITS_DIR = Path("ckpt/hf_path/tiny"), Path("data/digits")
TILE, COLUMNS = 8, 64  # a digit's width and height in pixels, digits in a row of assets/digits/digits.png
VALIDATION_STRIDE = 5  # every fifth record is for validation
QUESTION = "<image>\nWhich digit is this?"


def make_model(folder: Path = MODEL_DIR, seed: int = 0, force: bool = False) -> bool:
    """Write the checkpoint folder, the same bytes for the same seed. False if it exists already.

    It exists if its weights are complete and every other file is as it would be written: the model
    of an older version is replaced. Raises CheckpointError if something else is in the folder.
    """
    small = [*sorted((ASSETS / "tiny").glob("*.json")), ASSETS / "chat_template.jinja"]
    files = {path.name: path.read_text(encoding="utf-8") for path in small}
    if not force and _is_there(folder, files):
        return False
    tensors = _as_published(Qwen35.from_config(json.loads(files["config.json"]), seed, mtp=True))
    content: dict[str, Any] = {}
    with new_folder(folder, EXPORT_MANIFEST, content) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        content |= {"files": list(file_sizes(temporary))}
    return True


def _as_published(model: Qwen35) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, in which the experts of `mtp.` are not stacked."""
    found = {}
    for name, tensor in model.state_dict().items():
        experts, _, stack = name.rpartition(".")
        if not (name.startswith("mtp.") and stack in EXPERT_PARTS):
            found[name] = tensor
            continue
        for j, matrix in enumerate(tensor):
            parts = EXPERT_PARTS[stack]
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                found[f"{experts}.{j}.{part}.weight"] = rows
    return {name: tensor.to(published_dtype(name)) for name, tensor in found.items()}


def _is_there(folder: Path, files: dict[str, str]) -> bool:
    try:
        HFFolder(folder)
        return all((folder / name).read_text(encoding="utf-8") == content for name, content in files.items())
    except (CheckpointError, OSError):
        return False


def make_digits(folder: Path = DIGITS_DIR, force: bool = False) -> bool:
    """Write images, records, source and licence of the digits. False if they exist already."""
    source = ASSETS / "digits"
    labels = (source / "labels.txt").read_text(encoding="ascii").replace("\n", "")
    names = [f"images/{i:04}.png" for i in range(len(labels))]
    records = [_record(name, label) for name, label in zip(names, labels, strict=True)]
    train = [
        (record, label) for i, (record, label) in enumerate(zip(records, labels, strict=True)) if i % VALIDATION_STRIDE
    ]
    texts = {
        "README.md": (source / "README.md").read_text(encoding="utf-8"),
        "train.json": _json_list([record for record, _ in train]),
        "train_0-4.json": _json_list([record for record, label in train if label < "5"]),
        "heldout.json": _json_list(records[::VALIDATION_STRIDE]),
        "pairs.json": _json_list([_pair(record) for record, _ in train]),
        "heldout_pairs.json": _json_list([_pair(record) for record in records[::VALIDATION_STRIDE]]),
    }
    if not force and all((folder / name).is_file() for name in names):
        found = [(folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else None for name in texts]
        if found == list(texts.values()):
            return False
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    with Image.open(source / "digits.png") as sheet:
        for i, name in enumerate(names):
            row, column = divmod(i, COLUMNS)
            left, top = column * TILE, row * TILE
            sheet.crop((left, top, left + TILE, top + TILE)).save(folder / name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return True


def _record(image: str, label: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": label}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _pair(record: dict[str, Any]) -> dict[str, Any]:
    """The right digit is chosen, and one of the others, by the record's number, is rejected."""
    question, right = record["conversations"]
    wrong = (int(right["value"]) + 1 + int(record["id"]) % 9) % 10
    return record | {"conversations": [question], "chosen": right, "rejected": right | {"value": str(wrong)}}


def _json_list(records: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m qwen35.tools.tiny", description=__doc__)
    parser.add_argument("--force", action="store_true", help="make model and data anew even if they exist")
    force = parser.parse_args(arguments).force
    try:
        for folder, made in ((MODEL_DIR, make_model(force=force)), (DIGITS_DIR, make_digits(force=force))):
            print(f"{folder}: {'made' if made else 'exists already'}")
    except USER_ERRORS as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
