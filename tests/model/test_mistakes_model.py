"""Mistakes in a model folder or checkpoint are reported early, in one line with file and field."""

import json
import pickle
from pathlib import Path

import torch
from checkpoint_cases import as_before, tensors_in
from mistakes import (
    CONVERT,
    EVALUATE,
    EXPORT,
    RESUME,
    SHOW,
    TRAIN,
    Break,
    Case,
    becomes_folder,
    change,
    check,
    cut,
    parametrized,
    place,
    remove,
    whole,
    write,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

__all__ = ["place", "whole"]  # fixtures

CONFIG, PROCESSOR, TOKENS = "hf/config.json", "hf/preprocessor_config.json", "hf/tokenizer_config.json"
INDEX, FIRST, SECOND = (
    "hf/model.safetensors.index.json",
    "hf/model.safetensors-00001-of-00004.safetensors",
    "hf/model.safetensors-00002-of-00004.safetensors",
)
ASK = ("generate", "--model", "hf", "--prompt", "What?")
DATA, MARKER, PICKLE = (f"dcp/release/{name}" for name in ("__0_0.distcp", "complete.json", ".metadata"))


def twice(path: str) -> Break:
    """The first key of a file stands at its end too, with another value."""

    def break_it(place: Path) -> None:
        file = place / path
        text = file.read_text().rstrip().removesuffix("}")
        file.write_text(f"{text}, {json.dumps(next(iter(json.loads(file.read_text()))))}: 1}}")

    return break_it


TWICE = "' appears twice in one object; keep one of them"


def config(name: str, where: str, value: object, *words: str) -> Case:
    return Case(name, TRAIN, (CONFIG, *words), change(CONFIG, where, value))


def more_tokens(place: Path) -> None:
    tokenizer = Tokenizer.from_file(str(place / "hf/tokenizer.json"))
    tokenizer.add_tokens([f"<more {i}>" for i in range(200)])
    tokenizer.save(str(place / "hf/tokenizer.json"))


CONFIGS = [
    Case("no config", TRAIN, ("hf/config.json: not there",), remove(CONFIG)),
    Case("folder for a config", TRAIN, ("hf/config.json: cannot be read: Is a directory",), becomes_folder(CONFIG)),
    Case("half a config", TRAIN, ("hf/config.json: not JSON: ",), cut(CONFIG, 500)),
    Case("empty config", CONVERT, ("hf/config.json: not JSON: ",), write(CONFIG, "")),
    Case("list for a config", TRAIN, ("hf/config.json: not a JSON object",), write(CONFIG, "[]")),
    Case("deep config", TRAIN, ("hf/config.json: not JSON: ",), write(CONFIG, "[" * 100_000)),
    Case("not UTF-8", TRAIN, ("hf/config.json: not UTF-8 text", "at byte 7"), write(CONFIG, b'{"a": "\xe9"}')),
    *(
        Case(f"a key twice, {path}", TRAIN, (f"{path}: the key '", TWICE), twice(path))
        for path in (CONFIG, PROCESSOR, TOKENS)
    ),
    config("other model", "model_type", "llama", "model_type 'llama' is not one of qwen3_5, qwen3_5_moe"),
    config("no section", "text_config", ..., "lacks text_config"),
    config("list for a section", "vision_config", [1], "vision_config is [1], not a valid dictionary"),
    config("no field", "text_config.head_dim", ..., "text_config lacks head_dim"),
    config(
        "text for a number", "text_config.hidden_size", "48", "text_config.hidden_size is '48', not a valid integer"
    ),
    config(
        "negative size", "text_config.vocab_size", -1, "text_config.vocab_size is -1, not greater than or equal to 1"
    ),
    config(
        "huge size",
        "vision_config.depth",
        10**12,
        "vision_config.depth is 1000000000000",
        "not less than or equal to 1000",
    ),
    config(
        "no number", "text_config.rms_norm_eps", float("nan"), "text_config.rms_norm_eps is nan, not a finite number"
    ),
    config("yes for a size", "vision_config.num_heads", True, "vision_config.num_heads is True, not a valid integer"),
    config("no yes or no", "tie_word_embeddings", "no", "tie_word_embeddings is 'no', not true or false"),
    config(
        "unknown layer",
        "text_config.layer_types.0",
        "mamba",
        "text_config.layer_types.0 is 'mamba', not 'linear_attention' or 'full_attention'",
    ),
    config(
        "number of layers", "text_config.num_hidden_layers", 5, "num_hidden_layers is 5, but layer_types has 2 layers"
    ),
    config(
        "shared heads",
        "text_config.num_key_value_heads",
        3,
        "num_attention_heads 4 is no multiple of",
    ),
    config("delta heads", "text_config.linear_num_key_heads", 3, "linear_num_value_heads 4 is no multiple"),
    config(
        "vision heads", "vision_config.num_heads", 3, "vision_config.hidden_size 32 is no multiple of 4 x num_heads 12"
    ),
    config(
        "rope",
        "text_config.rope_parameters.mrope_section",
        [2, 1, 2],
        "mrope_section [2, 1, 2] must add up",
    ),
    config("experts chosen", "text_config.num_experts_per_tok", 9, "num_experts_per_tok 9 is above num_experts 8"),
    config("dense with experts", "model_type", "qwen3_5", "text_config lacks intermediate_size"),
    config(
        "width of the tower",
        "vision_config.out_hidden_size",
        64,
        "out_hidden_size 64 is not text_config.hidden_size 48",
    ),
    config("positions", "vision_config.num_position_embeddings", 35, "num_position_embeddings 35 is not a square"),
    config("token beyond", "image_token_id", 512, "image_token_id 512 is not below text_config.vocab_size 512"),
    config(
        "other activation",
        "text_config.hidden_act",
        "gelu",
        "text_config.hidden_act is 'gelu'; this model",
    ),
]
AGREEMENT = [
    config("image token", "image_token_id", 5, "<|image_pad|> is token", "hf/tokenizer.json, but image_token_id is 5"),
    config("video token", "video_token_id", 5, "<|video_pad|> is token", "but video_token_id is 5"),
    Case(
        "vocabulary",
        TRAIN,
        ("<more 199> is token", "in hf/tokenizer.json, but vocab_size is 512 in hf/config"),
        more_tokens,
    ),
    Case("vocabulary, shown", SHOW, ("vocab_size is 410",), change(CONFIG, "text_config.vocab_size", 410)),
    Case("vocabulary, evaluated", EVALUATE, ("vocab_size is 410",), change(CONFIG, "text_config.vocab_size", 410)),
    Case(
        "patch",
        TRAIN,
        ("patch_size is 14 in hf/preprocessor_config.json", "16 in"),
        change(PROCESSOR, "patch_size", 14),
    ),
    Case("frames", TRAIN, ("temporal_patch_size is 1 in hf/pre", "2 in"), change(PROCESSOR, "temporal_patch_size", 1)),
    Case(
        "merge", TRAIN, ("merge_size is 4 in hf/pre", "spatial_merge_size is 2 in"), change(PROCESSOR, "merge_size", 4)
    ),
    Case("channels", SHOW, ("in_channels is 4 in hf/config", "as RGB"), change(CONFIG, "vision_config.in_channels", 4)),
    Case(
        "weights of another shape",
        TRAIN,
        ("hf does not fit the model", "lm_head.weight is [512, 48] instead of [600, 48]"),
        change(CONFIG, "text_config.vocab_size", 600),
    ),
    Case(
        "converted weights of another shape",
        RESUME,
        ("dcp/release does not fit the model", "[512, 48] instead of [600, 48]"),
        change(CONFIG, "text_config.vocab_size", 600),
    ),
    Case("no processor", TRAIN, ("hf/preprocessor_config.json: no such file",), remove(PROCESSOR)),
    Case(
        "mean of two",
        TRAIN,
        (PROCESSOR, "image_mean: [0, 1] is not a list of"),
        change(PROCESSOR, "image_mean", [0, 1]),
    ),
    Case("division by zero", TRAIN, (PROCESSOR, "image_std", "has a 0"), change(PROCESSOR, "image_std", [0, 1, 1])),
    Case(
        "size of a patch", TRAIN, (PROCESSOR, "patch_size: 16.5 is not a whole"), change(PROCESSOR, "patch_size", 16.5)
    ),
    Case("no tokenizer", TRAIN, ("hf/tokenizer.json: no such file",), remove("hf/tokenizer.json")),
    Case("half a tokenizer", TRAIN, ("hf/tokenizer.json: not a tokenizer: EOF",), cut("hf/tokenizer.json", 5000)),
    Case("other JSON", SHOW, ("hf/tokenizer.json: not a tokenizer: ",), write("hf/tokenizer.json", "{}")),
    Case("no control tokens", TRAIN, ("hf/tokenizer.json: ",), change("hf/tokenizer.json", "added_tokens", [])),
    Case("pad token", TRAIN, (f"{TOKENS}: pad_token: 7 is not a token",), change(TOKENS, "pad_token", 7)),
    Case(
        "ends", EVALUATE, ("hf/generation_config.json: not JSON: ",), write("hf/generation_config.json", "[" * 100_000)
    ),
]


def header(fields: object) -> bytes:
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: object = "F32", shape: object = (1,)) -> bytes:
    return header({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}) + b"1234"


def swapped(place: Path) -> None:
    one, other = (place / FIRST).read_bytes(), (place / SECOND).read_bytes()
    (place / FIRST).write_bytes(other)
    (place / SECOND).write_bytes(one)


def tensor(name: str, value: torch.Tensor | None) -> Break:
    """Replace a tensor in whichever shard has it; None removes it."""

    def broken(place: Path) -> None:
        file = place / "hf" / json.loads((place / INDEX).read_text())["weight_map"][name]
        tensors = load_file(file)
        tensors.pop(name)
        save_file(tensors | ({} if value is None else {name: value}), file)

    return broken


def only_bin(place: Path) -> None:
    torch.save(tensors_in(place / "hf"), place / "hf/pytorch_model.bin")
    for file in (place / "hf").glob("*.safetensors*"):
        file.unlink()


BROKEN = f"{FIRST}: truncated, damaged, or not a safetensors file: "
WEIGHTS = [
    Case(
        "no shard",
        TRAIN,
        ("hf: 1 of 4 weight files missing: model.safetensors-00002-of-00004.safetensors",),
        remove(SECOND),
    ),
    Case("no shard to convert", CONVERT, ("mm-convert: hf: 1 of 4 weight files missing",), remove(SECOND)),
    Case("no shard of the original", EXPORT, ("mm-convert: hf: 1 of 4 weight files missing",), remove(SECOND)),
    Case(
        "cut shard",
        TRAIN,
        (BROKEN, "; fetch it again"),
        cut(FIRST, -1),
    ),
    Case("cut header", CONVERT, (BROKEN,), cut(FIRST, 100)),
    Case("empty shard", EVALUATE, (BROKEN,), write(FIRST, "")),
    Case(
        "swapped shards",
        TRAIN,
        (
            "hf: ",
            "tensors missing: lm_head.weight",
        ),
        swapped,
    ),
    Case(
        "list for a header",
        TRAIN,
        (BROKEN,),
        write(FIRST, header([1])),
    ),
    Case(
        "negative shape",
        TRAIN,
        (BROKEN,),
        write(FIRST, entry(shape=(-1, -1))),
    ),
    Case(
        "endless shape",
        TRAIN,
        (BROKEN,),
        write(FIRST, entry(shape=(float("inf"),))),
    ),
    Case(
        "unknown dtype", TRAIN, (f"{FIRST}: a has dtype F4, which is not supported",), write(FIRST, entry("F4", (8,)))
    ),
    Case("no tensor", TRAIN, ("hf: 1 tensor missing: lm_head.weight",), tensor("lm_head.weight", None)),
    Case(
        "integers",
        TRAIN,
        ("1 tensor of torch.int32, as quantized weights are: lm_head.weight",),
        tensor("lm_head.weight", torch.ones(512, 48).int()),
    ),
    Case("index without a map", TRAIN, (f"{INDEX}: has no weight_map",), write(INDEX, "{}")),
    Case(
        "index that leaves",
        TRAIN,
        (f"{INDEX}: '../x' is not a file",),
        write(INDEX, '{"weight_map": {"a": "../x"}}'),
    ),
    Case("no index", TRAIN, ("hf: 4 safetensors files, but no model.safetensors.index.json",), remove(INDEX)),
    Case("pickled weights", TRAIN, ("hf: no safetensors files",), only_bin),
    Case("no model folder", (*TRAIN, "training.init_from_hf_path=nowhere"), ("nowhere: no such folder",)),
]


def foreign(place: Path) -> None:
    (place / PICKLE).write_bytes(pickle.dumps({"state": print}))


def lying(broken: Break) -> Break:
    """Damage that the completion marker does not reveal, in a checkpoint without checksums."""

    def lie(place: Path) -> None:
        broken(place)
        as_before(place / "dcp/release")

    return lie


CHECKPOINTS = [
    Case("cut data", RESUME, ("dcp: no complete checkpoint", f"{DATA}: ", "bytes, complete.json says"), cut(DATA, -10)),
    Case("cut data to export", EXPORT, ("dcp: no complete checkpoint", f"{DATA}: "), cut(DATA, -10)),
    Case("no data", RESUME, ("dcp: no complete checkpoint", f"{DATA}: no such file"), remove(DATA)),
    Case("no description", RESUME, ("dcp: no complete checkpoint", f"{PICKLE}: no such file"), remove(PICKLE)),
    Case("no marker", RESUME, ("dcp: no complete checkpoint", f"{MARKER}: no such file"), remove(MARKER)),
    Case("other marker", RESUME, (f"{MARKER}: does not list the files",), write(MARKER, '{"files": {}}')),
    Case("no JSON for a marker", EXPORT, (f"{MARKER}: not JSON",), write(MARKER, "done")),
    Case("no checkpoint", (*RESUME, "training.load=data"), ("data: no complete checkpoint in it (release or iter_…",)),
    Case(
        "marker that lies",
        RESUME,
        ("dcp/release: .metadata is broken", "model.", "lies beyond the end of __0_0.distcp"),
        lying(cut(DATA, 3000)),
    ),
    Case("marker that lies to export", EXPORT, ("dcp/release: .metadata", "beyond the end"), lying(write(DATA, ""))),
    Case(
        "data that is gone",
        EXPORT,
        ("dcp/release: .metadata", "its file is not one of this checkpoint"),
        lying(remove(DATA)),
    ),
    Case(
        "foreign description",
        RESUME,
        ("dcp/release: .metadata is broken", "dict has no place in it"),
        lying(foreign),
    ),
    Case("cut description", EXPORT, ("dcp/release: .metadata is broken",), lying(cut(PICKLE, 300))),
    Case(
        "weights from nowhere",
        (*TRAIN, "training.init_from_hf_path=null"),
        ("nothing says where the weights come from",),
    ),
]


@parametrized([*CONFIGS, *AGREEMENT, *WEIGHTS, *CHECKPOINTS])
def test_a_mistake_is_reported_in_one_line(place, case):
    check(place, case)
