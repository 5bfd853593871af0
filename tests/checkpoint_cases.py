"""Small checkpoints for tests: any layout, one file or many, tied or not, with or without MTP."""

import json
from pathlib import Path

import torch
from hf_folder import write_hf
from peer import config_dict, text_only
from safetensors.torch import load_file, save_file

from qwen35.checkpoint.dcp import training_state, write_shards
from qwen35.checkpoint.dcp_write import local_shards
from qwen35.checkpoint.hf import shapes_by_config
from qwen35.checkpoint.hf_names import published_dtype, shapes_of
from qwen35.checkpoint.hf_read import HFFolder, HFSource
from qwen35.checkpoint.slices import TensorSlice, TensorSpec
from qwen35.model import Qwen35, load_config

DATA = Path(__file__).parent / "fixtures"
CONFIGS = Path(__file__).parents[1] / "assets/configs"  # of all published sizes


def build(config: dict, mtp: bool = True, seed: int = 0) -> Qwen35:
    """A model with random fp32 weights everywhere."""
    model = Qwen35(load_config(config), mtp=mtp)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def published_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a published model with its MTP layer."""
    with torch.device("meta"):
        return shapes_of(Qwen35(load_config(CONFIGS / f"{size}.json"), mtp=True).named_parameters())


def state_of(model: torch.nn.Module, dtype_of=published_dtype) -> dict[str, torch.Tensor]:
    return {name: p.detach().to(dtype_of(name)) for name, p in model.named_parameters()}


def write_folder(
    folder: Path, moe=True, tied=False, mtp=True, layout="hub", shard_size=2**30, dtype_of=published_dtype, **kwargs
) -> Path:
    """A model folder with the small files of published ones."""
    config = config_dict(moe=moe, tied=tied, **kwargs, **({"mtp_num_hidden_layers": 1} if mtp else {}))
    state = state_of(build(config, mtp), dtype_of)
    write_hf(state, config, folder, layout=layout, shard_size=shard_size, dtype_of=dtype_of)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def write_text_only(folder: Path, **kwargs) -> Path:
    """The same as a text-only checkpoint: flat config, names like `model.layers.0.…`, no tower."""
    write_folder(folder, **kwargs)
    config = text_only(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def change(tensors: dict) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if not name.startswith("model.visual."):
                tensors[name.replace("model.language_model.", "model.")] = value

    resave(folder, change)
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the safetensors library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        one_bytes, other_bytes = (t.detach().reshape(-1).view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(one_bytes, other_bytes), name


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def write_index(folder: Path, index: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resave(folder, change) -> None:
    """Rewrite a one-file folder after `change(tensors)`, index included."""
    tensors = tensors_in(folder)
    change(tensors)
    (file,) = folder.glob("*.safetensors")
    save_file(tensors, file)
    write_index(folder, {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)})


def empty_model(config: dict, mtp: bool = False) -> Qwen35:
    model = Qwen35(load_config(config), mtp=mtp)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def source_of(folder) -> HFSource:
    """The weights of a model folder, under the model's names."""
    disk = HFFolder(folder)
    return HFSource(disk, shapes_by_config(disk), f"{folder}")


class MemorySource:
    """A TensorSource over whole tensors in memory, on any device."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, region: TensorSlice) -> torch.Tensor:
        return self.tensors[name][region.slices()].cpu()


def save_checkpoint(folder, step, model, optimizer=None, extra=None, rank_extra=None) -> Path:
    return write_shards(folder, step, local_shards(training_state(model, optimizer)), extra, rank_extra)


def as_before(checkpoint: Path) -> None:
    """Turn a checkpoint into one of format 1, which had no tensors.json and no checksums."""
    (checkpoint / "tensors.json").unlink(missing_ok=True)
    manifest = json.loads((checkpoint / "complete.json").read_text())
    files = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != "complete.json"}
    kept = {name: manifest[name] for name in ("step", "world_size")}
    (checkpoint / "complete.json").write_text(json.dumps({**kept, "files": files}))
