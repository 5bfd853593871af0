"""Which parameters are trained: `model.freeze`, parameter groups, the table that a run prints."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from qwen35.config.load import SettingError
from qwen35.model.lora import adapted_by, is_adapter

# A parameter belongs to the first group whose name occurs in its own.
GROUPS = (
    "visual.merger",
    "visual",
    "mtp",
    "embed_tokens",
    "lm_head",
    "linear_attn",
    "self_attn",
    "mlp.gate.",
    "shared_expert",
    "experts",
    "mlp",
    "norm",
)


MAX_NAMES = 5  # that a message names


def group_of(name: str) -> str:
    return next(g for g in GROUPS if g in name).rstrip(".")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that the patterns name, or that lie in the modules they name.

    `*` and `{*}` match one level: `model.language_model.layers.{*}.mlp`. Raises SettingError for a
    pattern that matches nothing.
    """
    for pattern in patterns:
        for _, parameter in _matching(model, pattern, "model.freeze"):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingError(f"model.freeze: {', '.join(patterns)} leave nothing to train")


def chosen_patterns(model: nn.Module, patterns: Iterable[str]) -> dict[str, str]:
    """Trained parameter -> the last of the patterns of training.lr_by_module that names it.

    Raises SettingError for a pattern without effect.
    """
    setting, chosen = "training.lr_by_module", dict[str, str]()
    patterns = list(patterns)
    for pattern in patterns:
        trained = [name for name, p in _matching(model, pattern, setting) if p.requires_grad]
        if not trained:
            raise SettingError(f"{setting}: {pattern} matches nothing that is trained; leave it out")
        chosen |= dict.fromkeys(trained, pattern)
    for pattern in patterns:
        if pattern not in chosen.values():
            raise SettingError(f"{setting}: {pattern}: later patterns match all that it does; put it after them")
    return chosen


def _matching(model: nn.Module, pattern: str, setting: str) -> list[tuple[str, nn.Parameter]]:
    levels = pattern.replace("{*}", "*").split(".")
    matching = [(name, p) for name, p in model.named_parameters() if _matches(name.split("."), levels)]
    if not matching:
        names = ", ".join(n for n, _ in model.named_modules() if n and n.count(".") <= 1)
        raise SettingError(f"{setting}: {pattern} matches no module; there are {names}, …")
    return matching


def _matches(name: list[str], levels: list[str]) -> bool:
    return len(name) >= len(levels) and all(fnmatchcase(n, level) for n, level in zip(name, levels, strict=False))


def by_module(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """As by_group, but adapters are by themselves, under the name of what they adapt."""
    named = list(named)
    groups = by_group((n, p) for n, p in named if not is_adapter(n))
    for name, parameter in named:
        if is_adapter(name):
            groups.setdefault(adapted_by(name), []).append(parameter)
    return groups


def by_group(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
    """Group name -> its parameters, in the order of GROUPS."""
    groups: dict[str, list[nn.Parameter]] = {g.rstrip("."): [] for g in GROUPS}
    for name, parameter in named:
        groups[group_of(name)].append(parameter)
    return {name: parameters for name, parameters in groups.items() if parameters}


def check_visuals(model: nn.Module, visuals: int) -> list[str]:
    """What the vision tower learns from data with this many images and videos: a line if nothing.

    Raises SettingError if only the tower is trained, since such a run would train nothing.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name in trained if not group_of(name).startswith("visual")]
    if visuals or len(others) == len(trained):
        return []
    if not others:
        raise SettingError(
            "the data has no images or videos, and only the vision tower is trained, which learns nothing without; train more"
            " than that (model.freeze, training.lora.target_modules), or use other data"
        )
    return ["the data has no images or videos: what is trained of the vision tower stays as it is"]


def check_new_tokens(model: nn.Module, names: Sequence[str]) -> list[str]:
    """A line if tokens of the data that are not the family's own cannot be learnt.

    Adapters leave embedding and head as they are, and there lies what a token means.
    """
    parts = {"embed_tokens": "the embedding", "lm_head": "the head"}
    frozen = {
        parts[group] for n, p in model.named_parameters() if (group := group_of(n)) in parts and not p.requires_grad
    }
    if not names or not frozen:
        return []
    shown = ", ".join(names[:MAX_NAMES]) + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES)
    line = (
        f"the data has {shown}, not of the family's own tokens, and {' and '.join(sorted(frozen))}, frozen here, hold what "
        "they mean: unless the weights know them already, train all weights first, or write them in other words"
    )
    return [line]


def parameter_table(model: nn.Module) -> str:
    """Number of parameters by group: all, trained, frozen; global numbers for a sharded model."""
    lines = [f"{'parameters':16}{'all':>16}{'trained':>16}{'frozen':>16}"]
    for name, parameters in (by_group(model.named_parameters()) | {"all": [*model.parameters()]}).items():
        trained, frozen = count(parameters, True), count(parameters, False)
        lines.append(f"{name:16}{trained + frozen:>16,}{trained:>16,}{frozen:>16,}")
    return "\n".join(lines)


def count(parameters: Iterable[Tensor], trained: bool) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad == trained)
