"""From a recipe to settings: YAML plus `a.b=c` overrides, checked against the schema.

A key that is no setting is an error that names the nearest one.
"""

import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from qwen35.config.rules import check_rules
from qwen35.config.schema import TRAIN_SET, VALIDATION_SET, DatasetParam, Settings, for_validation
from qwen35.errors import Parser, SettingError, complain, one_line, read_text

SHORT_FORMS = {"model.loss_type": "model.loss_cfg.loss_type"}  # as the user guide writes it
LONGEST_RECIPE = 1 << 20  # characters; YAML takes seconds for each million


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply `a.b=c` overrides, whose values are YAML. Raises SettingError."""
    text = read_text(Path(path), SettingError, "no such recipe; the shipped ones are in configs/")
    if len(text) > LONGEST_RECIPE:
        raise SettingError(
            f"{path}: {len(text):,} characters, a recipe has at most {LONGEST_RECIPE:,}; is it another file?"
        )
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise SettingError(f"{path}: a recipe is a mapping with data, model, parallel and training")
    flat = _flatten(tree, str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise SettingError(f"{override!r} is not of the form a.b=c, e.g. training.train_iters=20")
        # overriding a section replaces all of it
        flat = {k: v for k, v in flat.items() if not k.startswith(key + ".")}
        flat |= _flatten({key: _override(key, value)}, key)
    settings = from_flat(flat)
    _check(settings)
    return settings


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that recipes must not use."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML quietly takes the last, and aliases.

    A few lines of nested aliases expand to more values than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias, which recipes do not have; write out what it stands for"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _Refused(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; `where` names it in messages. Raises SettingError."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        problem = " ".join(str(error.problem).split())
        mark = error.problem_mark
        position = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if isinstance(error, _Refused):
            raise SettingError(f"{where}{position}: {problem}") from None
        hint = "; indent with spaces" if "'\\t'" in problem else ""
        raise SettingError(f"{where} is not YAML{position}: {problem}{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise SettingError(f"{where} is not YAML: {one_line(error)}") from None


def _override(key: str, value: str) -> Any:
    try:
        return parse_yaml(value, f"{key}: {value!r}")
    except SettingError:
        if value.startswith("[") and value.endswith("]"):  # names with * or {*} that the shell unquoted
            return [name.strip() for name in value[1:-1].split(",")]
        raise


def from_flat(flat: Mapping[str, Any]) -> Settings:
    """{"training.lr": 1e-5, …} -> Settings."""
    known = _leaves(Settings)
    sections = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
    sections |= {k for k, kind in known.items() if _is_mapping(kind)}
    # YAML reads a section whose lines are all commented out as null
    flat = {k: v for k, v in flat.items() if not (k in sections and v in (None, {}))}
    for key, value in flat.items():
        if key in sections:
            raise SettingError(f"{key}: {value!r} is not a section with settings in it")
        if key not in known and not any(key.startswith(f"{k}.") for k, t in known.items() if _is_mapping(t)):
            raise SettingError(_unknown(key, known))
    if any(key.startswith(f"{VALIDATION_SET}.") for key in flat):
        own = f"{TRAIN_SET}.basic_parameters.dataset"
        shared = {key for key in flat if key.startswith(f"{TRAIN_SET}.") and key != own}
        flat = {for_validation(key): flat[key] for key in shared} | flat
    return _build(Settings, flat, "")


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    last = key.rsplit(".", 1)[-1].strip().lower()
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        names = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [names[n] for n in difflib.get_close_matches(last, names, n=1, cutoff=0.5)]
    return f"unknown setting {key}" + (f"; did you mean {near[0]}?" if near else "")


def _flatten(tree: Mapping[Any, Any], where: str = "", prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one with dotted keys. Raises SettingError for a key that occurs twice."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = SHORT_FORMS.get(f"{prefix}{key}", f"{prefix}{key}")
        below = _flatten(value, where, f"{path}.") if isinstance(value, dict) and value else {path: value}
        if twice := flat.keys() & below.keys():
            raise SettingError(f"{where}: {min(twice)} is there twice")
        flat |= below
    return flat


def _leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type, for every setting below a dataclass."""
    leaves: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        section = _section(kind)
        leaves |= _leaves(section, f"{prefix}{name}.") if section else {f"{prefix}{name}": kind}
    return leaves


def _section(kind: Any) -> Any:
    """The dataclass of a field of type `dataclass` or `dataclass | None`, else None."""
    kinds = [k for k in get_args(kind) if k is not type(None)] if isinstance(kind, types.UnionType) else [kind]
    return kinds[0] if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]) else None


def _is_mapping(kind: Any) -> bool:
    return get_origin(kind) is not None and issubclass(get_origin(kind), Mapping) if _is_generic_class(kind) else False


def _is_generic_class(kind: Any) -> bool:
    return isinstance(get_origin(kind), type)


def _build(cls: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    values = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        path, kind = prefix + f.name, hints[f.name]
        if section := _section(kind):
            is_there = section is kind or any(key.startswith(f"{path}.") for key in flat)
            values[f.name] = _build(section, flat, f"{path}.") if is_there else None
        elif _is_mapping(kind):
            below = {k[len(path) + 1 :]: v for k, v in flat.items() if k.startswith(f"{path}.")}
            values[f.name] = {k: _coerce(v, get_args(kind)[1], f"{path}.{k}") for k, v in below.items()}
        elif path in flat:
            values[f.name] = _coerce(flat[path], kind, path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SettingError(f"{path} is not set; it has no default")
    return cls(**values)


def _coerce(value: Any, kind: Any, path: str) -> Any:
    origin, or_else = get_origin(kind), ""
    if origin in (Union, types.UnionType):
        kinds = get_args(kind)
        literals = [literal for k in kinds if get_origin(k) is Literal for literal in get_args(k)]
        if (value is None and type(None) in kinds) or value in literals:
            return value
        is_list = isinstance(value, list | tuple)
        kinds = tuple(k for k in kinds if k is not type(None))
        kind = next((k for k in kinds if (get_origin(k) is tuple) == is_list), kinds[0])
        origin, or_else = get_origin(kind), f", nor {', '.join(literals)}" if literals else ""
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise SettingError(f"{path}: {value!r} is not one of {', '.join(get_args(kind))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(v, get_args(kind)[0], f"{path}[{i}]") for i, v in enumerate(value))
        raise SettingError(f"{path}: {value!r} is not a list")
    if dataclasses.is_dataclass(kind):
        return _entry(value, kind, path)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as a string
        except ValueError:
            pass
    if type(value) is not kind:
        raise SettingError(f"{path}: {value!r} is not of type {kind.__name__}{or_else}")
    if kind is str and (not value or "\0" in value):
        raise SettingError(f"{path}: {value!r} names nothing; leave it out, or set it")
    if kind is str and any(name.strip().startswith("~/") for name in value.split(",")):
        raise SettingError(
            f"{path}: {value!r}: ~ is not expanded here, it would be a folder of that name; write out the path"
        )
    if kind is int and abs(value) >= 2**63:
        raise SettingError(f"{path}: {value} is too large")
    return value


def flat_settings(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted name: {"training.lr": 1e-5, …}."""
    return _flatten(_plain(settings))


def _entry(value: Any, kind: Any, path: str) -> Any:
    """An entry of a list: a mapping, or the value of the first field alone."""
    names = [f.name for f in dataclasses.fields(kind)]
    values = value if isinstance(value, dict) else {names[0]: value}
    if unknown := [key for key in values if key not in names]:
        raise SettingError(_unknown(f"{path}.{unknown[0]}", {f"{path}.{name}": None for name in names}))
    return _build(kind, {f"{path}.{name}": v for name, v in values.items()}, f"{path}.")


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def difference(old: Settings, new: Settings) -> list[str]:
    """The settings that changed, each as "training.lr: 0.001 -> 0.0001"."""
    before, after = flat_settings(old), flat_settings(new)
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in before | after if before.get(k) != after.get(k)]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check(s: Settings) -> None:
    """Check ranges, then the rules between settings. Raises SettingError."""
    t = s.training
    positive = {
        "training.train_iters": t.train_iters,
        "training.micro_batch_size": t.micro_batch_size,
        "training.gradient_accumulation_steps": t.gradient_accumulation_steps,
        "training.log_interval": t.log_interval,
        "training.save_interval": t.save_interval,
        "training.save_total_limit": t.save_total_limit,
        "training.val_interval": t.val_interval,
        "training.zero_grad_patience": t.zero_grad_patience,
        "training.lr": t.lr,
        "training.peak_tflops": t.peak_tflops,
        "training.timeout": t.timeout,
        "training.adam_eps": t.adam_eps,
        "model.mtp_loss_scaling_factor": s.model.mtp_loss_scaling_factor,
        "parallel.fully_shard_parallel_size": s.parallel.fully_shard_parallel_size,
        "parallel.expert_parallel_size": s.parallel.expert_parallel_size,
        "parallel.ulysses_parallel_size": s.parallel.ulysses_parallel_size,
        "data.dataloader_param.patch_bucket": s.data.dataloader_param.patch_bucket,
        **_positive(s.data.dataset_param, f"{TRAIN_SET}."),
        **(_positive(s.data.val_dataset_param, f"{VALIDATION_SET}.") if s.data.val_dataset_param else {}),
    }
    not_negative = {
        "training.weight_decay": t.weight_decay,
        "training.clip_grad": t.clip_grad,
        "training.min_lr": t.min_lr,
        "training.seed": t.seed,
        "training.max_restarts": t.max_restarts,
        "training.profile.steps": t.profile.steps,
        "model.loss_cfg.router_aux_loss_coef": s.model.loss_cfg.router_aux_loss_coef,
        "data.dataloader_param.num_workers": s.data.dataloader_param.num_workers,
    }
    at_most_512 = {"data.dataloader_param.num_workers": s.data.dataloader_param.num_workers}
    zero_or_one = {"model.mtp_num_layers": s.model.mtp_num_layers}  # published models have one MTP layer
    fraction = {
        "training.lr_warmup_ratio": t.lr_warmup_ratio,
        "training.adam_beta1": t.adam_beta1,
        "training.adam_beta2": t.adam_beta2,
    }
    for rule, group, holds in (
        ("more than 0", positive, lambda v: v > 0),
        ("0 or more", not_negative, lambda v: v >= 0),
        ("at least 0 and below 1", fraction, lambda v: 0 <= v < 1),
        ("at most 512", at_most_512, lambda v: v <= 512),
        ("at most a year of 31536000 seconds", {"training.timeout": t.timeout}, lambda v: v <= 31536000),
        ("0 or 1", zero_or_one, lambda v: v in (0, 1)),
    ):
        for name, value in group.items():
            if value is not None and not (holds(value) and math.isfinite(value)):
                raise SettingError(f"{name}: {value} must be {rule}")
    check_rules(s)


def _positive(param: DatasetParam, prefix: str) -> dict[str, Any]:
    """The settings of a dataset that must be more than 0."""
    b, p = param.basic_parameters, param.preprocess_parameters
    basic, limits = f"{prefix}basic_parameters", f"{prefix}preprocess_parameters"
    entries = [] if isinstance(b.dataset, str) else b.dataset
    return {
        f"{basic}.cutoff_len": b.cutoff_len,
        f"{basic}.max_samples": b.max_samples,
        f"{limits}.image_min_pixels": p.image_min_pixels,
        f"{limits}.image_max_pixels": p.image_max_pixels,
        f"{limits}.video_min_pixels": p.video_min_pixels,
        f"{limits}.video_max_pixels": p.video_max_pixels,
        f"{limits}.video_fps": p.video_fps,
        f"{limits}.video_maxlen": p.video_maxlen,
        **{f"{basic}.dataset[{i}].weight": entry.weight for i, entry in enumerate(entries)},
    }


def main() -> int:
    parser = Parser(prog="python -m qwen35.config.load", description="Print the resolved settings.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument(
        "--get", metavar="NAME", nargs="+", help="print these settings alone, a line each: training.save"
    )
    args = parser.parse_args()
    try:
        settings = load_settings(args.config, args.overrides)
        flat = flat_settings(settings)
        for name in args.get or []:
            if name not in flat:
                raise SettingError(_unknown(name, flat))
    except SettingError as error:
        return complain(error)
    if args.get:
        print(*(flat[name] for name in args.get), sep="\n")
    else:
        print(to_yaml(settings), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
