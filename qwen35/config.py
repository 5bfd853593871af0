"""From a recipe to settings: YAML plus `a.b=c` overrides, checked and frozen. The settings themselves are in settings.py.

The paths are those of the seed's user guide (`data.dataset_param.basic_parameters.dataset`, …). Every field below is read
somewhere; a key that is not a field is an error that names the nearest one.
"""

import argparse
import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from qwen35.settings import Settings


class SettingError(ValueError):
    """A setting that is unknown, misspelt, of the wrong type or in contradiction with another."""


SHORT_FORMS = {"model.loss_type": "model.loss_cfg.loss_type"}  # as the seed's text writes it


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply `a.b=c` overrides (values in YAML). Raises SettingError with one line that says what to do."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such recipe; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"{path}: a recipe is a mapping with data, model, parallel and training")
    flat = _flatten(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SettingError(f"{override!r} is not of the form a.b=c, e.g. training.train_iters=20")
        # an override of a whole section replaces it
        flat = {k: v for k, v in flat.items() if not k.startswith(key + ".")}
        flat |= _flatten({key: _parse(key, value)})
    settings = from_flat({SHORT_FORMS.get(key, key): value for key, value in flat.items()})
    _check(settings)
    return settings


def _parse(key: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        if value.startswith("[") and value.endswith("]"):  # names with * or {*}, whose quotes the shell took
            return [word.strip() for word in value[1:-1].split(",")]
        raise SettingError(f"{key}: {value!r} is not YAML") from None


def from_flat(flat: Mapping[str, Any]) -> Settings:
    """{"training.lr": 1e-5, …} -> Settings."""
    known = _leaves(Settings)
    # a section whose lines are all commented out is null in YAML
    flat = {k: v for k, v in flat.items() if v is not None or not any(name.startswith(f"{k}.") for name in known)}
    for key in flat:
        if key not in known and not any(key.startswith(f"{k}.") for k, t in known.items() if _is_mapping(t)):
            raise SettingError(_unknown(key, known))
    return _build(Settings, flat, "")


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        names = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.5)]
    return f"unknown setting {key}" + (f"; did you mean {near[0]}?" if near else "")


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat |= _flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def _leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every setting below a dataclass."""
    leaves: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        leaves |= _leaves(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {f"{prefix}{name}": kind}
    return leaves


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is not None and issubclass(get_origin(kind), Mapping) if _is_generic_class(kind) else False


def _is_generic_class(kind: Any) -> bool:
    return isinstance(get_origin(kind), type)


def _build(cls: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    values = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        path, kind = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(kind):
            values[f.name] = _build(kind, flat, f"{path}.")
        elif _is_mapping(kind):
            below = {k[len(path) + 1 :]: v for k, v in flat.items() if k.startswith(f"{path}.")}
            values[f.name] = {k: _coerce(v, get_args(kind)[1], f"{path}.{k}") for k, v in below.items()}
        elif path in flat:
            values[f.name] = _coerce(flat[path], kind, path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SettingError(f"{path} is not set; it has no default")
    return cls(**values)


def _coerce(value: Any, kind: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in get_args(kind) if k is not type(None))
        origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise SettingError(f"{path}: {value!r} is not one of {', '.join(get_args(kind))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(v, get_args(kind)[0], f"{path}[{i}]") for i, v in enumerate(value))
        raise SettingError(f"{path}: {value!r} is not a list")
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except ValueError:
            pass
    if type(value) is kind:
        return value
    raise SettingError(f"{path}: {value!r} is not of type {kind.__name__}")


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def difference(old: Settings, new: Settings) -> list[str]:
    """The settings that changed, "training.lr: 0.001 -> 0.0001" each."""
    before, after = _flatten(_plain(old)), _flatten(_plain(new))
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in before | after if before.get(k) != after.get(k)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check(s: Settings) -> None:
    """Ranges, and settings that contradict each other."""
    t, b, p = s.training, s.data.dataset_param.basic_parameters, s.data.dataset_param.preprocess_parameters
    positive = {
        "training.train_iters": t.train_iters,
        "training.micro_batch_size": t.micro_batch_size,
        "training.gradient_accumulation_steps": t.gradient_accumulation_steps,
        "training.log_interval": t.log_interval,
        "training.save_interval": t.save_interval,
        "training.zero_grad_patience": t.zero_grad_patience,
        "training.lr": t.lr,
        "training.peak_tflops": t.peak_tflops,
        "training.adam_eps": t.adam_eps,
        "parallel.fully_shard_parallel_size": s.parallel.fully_shard_parallel_size,
        "data.dataset_param.basic_parameters.cutoff_len": b.cutoff_len,
        "data.dataset_param.basic_parameters.max_samples": b.max_samples,
        "data.dataset_param.preprocess_parameters.image_min_pixels": p.image_min_pixels,
        "data.dataloader_param.patch_bucket": s.data.dataloader_param.patch_bucket,
    }
    not_negative = {
        "training.weight_decay": t.weight_decay,
        "training.clip_grad": t.clip_grad,
        "training.min_lr": t.min_lr,
        "training.seed": t.seed,
        "model.loss_cfg.router_aux_loss_coef": s.model.loss_cfg.router_aux_loss_coef,
        "data.dataloader_param.num_workers": s.data.dataloader_param.num_workers,
    }
    fraction = {
        "training.lr_warmup_ratio": t.lr_warmup_ratio,
        "training.adam_beta1": t.adam_beta1,
        "training.adam_beta2": t.adam_beta2,
    }
    for rule, group, holds in (
        ("more than 0", positive, lambda v: v > 0),
        ("0 or more", not_negative, lambda v: v >= 0),
        ("at least 0 and below 1", fraction, lambda v: 0 <= v < 1),
    ):
        for name, value in group.items():
            if value is not None and not (holds(value) and math.isfinite(value)):
                raise SettingError(f"{name}: {value} must be {rule}")
    if p.image_min_pixels > p.image_max_pixels:
        raise SettingError(f"image_min_pixels {p.image_min_pixels} is above image_max_pixels {p.image_max_pixels}")
    if t.min_lr > t.lr:
        raise SettingError(f"training.min_lr {t.min_lr} is above training.lr {t.lr}")
    if t.load and t.init_from_hf_path:
        raise SettingError("training.load and training.init_from_hf_path both say where the weights come from; set one")
    if b.enable_thinking is not None and b.template != "qwen3_5":
        raise SettingError(
            f"enable_thinking means nothing to template {b.template}; use template: qwen3_5 or leave it out"
        )
    if b.train_on_prompt and b.mask_history:
        raise SettingError("train_on_prompt and mask_history contradict each other; set one")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen35.config", description="Print the resolved settings.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument(
        "--get", metavar="NAME", nargs="+", help="print these settings alone, a line each: training.save"
    )
    args = parser.parse_args()
    try:
        settings = load_settings(args.config, args.overrides)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.get:
        flat = _flatten(_plain(settings))
        print(*(flat[name] for name in args.get), sep="\n")
    else:
        print(to_yaml(settings), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
