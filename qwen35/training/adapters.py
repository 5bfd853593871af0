"""Adapters as `training.lora` asks for them: on a plain model, and their values at the start."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels import Kernels
from qwen35.checkpoint.hf_names import saved_parameters
from qwen35.checkpoint.slices import TensorSlice, TensorSpec
from qwen35.config.schema import LoraSettings, Settings
from qwen35.errors import SettingError
from qwen35.model import ModelConfig, Qwen35
from qwen35.model.lora import LoraError, LoraSpec, adapted_by, add_adapters, initial_adapter, is_adapter
from qwen35.training.parameter_groups import chosen_patterns, freeze

TOGETHER = ("in_proj_qkv", "in_proj_z"), ("experts.gate_up_proj", "experts.down_proj")  # as vLLM wants them


def build_model(
    settings: Settings, config: ModelConfig, kernels: Kernels | None = None, device: torch.device | str = "meta"
) -> Qwen35:
    """A plain model that trains what the settings say. Raises SettingError."""
    with torch.device(device):
        model = Qwen35(config, kernels=kernels, mtp=bool(settings.model.mtp_num_layers))
    choose_trained(model, settings)
    return model


def choose_trained(model: Qwen35, settings: Settings) -> None:
    """Make a plain model train what the settings say: all, a part, or adapters. SettingError."""
    if settings.training.lora:
        try:
            add_adapters(model, lora_spec(settings.training.lora))
        except LoraError as error:
            raise SettingError(f"training.lora: {error}") from None
    else:
        freeze(model, settings.model.freeze)
    chosen_patterns(model, settings.training.lr_by_module)  # a wrong one is found at once


def lora_spec(lora: LoraSettings) -> LoraSpec:
    names = lora.target_modules, lora.target_parameters, lora.exclude_modules
    return LoraSpec(lora.r, lora.lora_alpha, *names, lora.expert_r or lora.r, lora.use_rslora)


class InitialAdapters:
    """New adapters as a TensorSource: the same bits for each seed, however they are sharded."""

    def __init__(self, parameters: Mapping[str, Tensor], seed: int):
        self.specs = {name: TensorSpec(tuple(p.shape), torch.float32) for name, p in parameters.items()}
        self.seed = seed

    def read(self, name: str, region: TensorSlice) -> Tensor:
        shape, slices = self.specs[name].shape, region.slices()
        if len(shape) == 2:
            return initial_adapter(name, shape, self.seed)[slices]
        experts = range(*slices[0].indices(shape[0]))
        if not experts:
            return torch.empty(region.lengths)
        return torch.stack([initial_adapter(name, shape[1:], self.seed, e)[slices[1:]] for e in experts])


def serving_warnings(model: nn.Module) -> list[str]:
    """What servers make of the adapters, where that is less than a user may expect."""
    adapted, lines = {adapted_by(name) for name in filter(is_adapter, saved_parameters(model))}, []
    for pair in TOGETHER:
        found = [name for name in pair if any(a.endswith(f".{name}") for a in adapted)]
        if len(found) == 1:
            lines.append(
                f"training.lora: {found[0]} has an adapter and {next(n for n in pair if n != found[0])} none, which vLLM does"
                " not load; name both to serve the adapter, or serve the merged model"
            )
    return lines
