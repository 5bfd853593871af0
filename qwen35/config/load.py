"""From a recipe to settings: YAML plus `a.b=c` overrides, checked against the schema.

A key that is no setting is an error that names the nearest one.
"""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from qwen35.config.other_names import ADVICE
from qwen35.config.rules import check_rules
from qwen35.config.schema import TRAIN_SET, VALIDATION_SET, Attr, DatasetFile, Settings, dataset_entries, for_validation
from qwen35.errors import Parser, SettingError, complain, one_line, read_text

SHORT_FORMS = {  # as the user guide and MindSpeed-MM write it
    "model.loss_type": "model.loss_cfg.loss_type",
    "training.lora.rank": "training.lora.r",
    "training.lora.alpha": "training.lora.lora_alpha",
    "training.lora.pretrained_lora_path": "training.lora.adapter",
}
ENABLE_LORA = "training.lora.enable"  # MindSpeed-MM's switch, no setting: the section itself is one
BASE = "base"  # of a recipe: another one, whose settings hold where it has none of its own
OTHER_BASE = re.compile("^[-+]?0[0-9_]|:")  # a number of base 8 or 60
NO_PATHS = ("model.freeze", "data.dataset_param.attr", "data.val_dataset_param.attr")
OF_A_SHELL = re.compile(r"(?:^|,)\s*(~)/|(\$(?:\{\w+\}|[A-Z_]\w*))")  # in a path: a home, a variable
LENGTHS = ("training.train_epochs", "training.train_iters")  # of a run, in one unit or the other
NO_RUN = {"model.model_name_or_path": "-", "training.save": "no-run", "training.train_iters": 1}
DATA = "one file, several with commas, or a list as `dataset` of a recipe: [{file: a.json, format: alpaca}]"
LONGEST_RECIPE = 1 << 20  # characters; YAML takes seconds for each million


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply `a.b=c` overrides, whose values are YAML. Raises SettingError."""
    flat = _below(_read_flat(Path(path)), {override.partition("=")[0] for override in overrides})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith("-"):
            form = f"{override!r} is not of the form a.b=c, e.g. training.train_iters=20"
            raise SettingError(no_option(override) if key.startswith("-") else form)
        parsed = _override(key, value)
        if parsed in (None, {}) and not _mapping_of(key):  # of a section it takes all away; a name may begin another
            flat = {k: v for k, v in flat.items() if not k.startswith(key + ".")}
        flat |= _flatten({key: parsed}, key)
    settings = from_flat(flat)
    check_rules(settings)
    return settings


def parse_dataset(text: str, stage: str = "sft") -> str | tuple[DatasetFile, ...]:
    """What --data of a command names, a list of entries as in a recipe too. Raises SettingError."""
    if not text.startswith("["):
        return text
    dataset_of = {f"{TRAIN_SET}.basic_parameters.dataset": _override("--data", text), "training.stage": stage}
    settings = from_flat(dataset_of | NO_RUN)
    check_rules(settings)
    dataset = settings.data.dataset_param.basic_parameters.dataset
    if any(entry.weight != 1 for entry in dataset_entries(dataset)):
        raise SettingError("--data: each record is read once; leave the weights out")
    return dataset


def _read_flat(path: Path, is_base: bool = False) -> dict[str, Any]:
    """A recipe's settings by dotted names, over those of its base. Raises SettingError."""
    text = read_text(path, SettingError, "no such recipe; the shipped ones are in configs/")
    if len(text) > LONGEST_RECIPE:
        raise SettingError(
            f"{path}: {len(text):,} characters, a recipe has at most {LONGEST_RECIPE:,}; is it another file?"
        )
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise SettingError(f"{path}: a recipe is a mapping with data, model, parallel and training")
    base = tree.pop(BASE, None)
    if base is None:
        return _flatten(tree, str(path))
    if is_base:
        raise SettingError(f"{path}: {BASE}: a base has no base itself; name the one that has none, or write all out")
    if not isinstance(base, str):
        raise SettingError(f"{path}: {BASE}: {base!r} is not the path of a recipe, from this one's folder")
    below, own = _read_flat(path.parent / base, is_base=True), _flatten(tree, str(path))
    for key in (k for k, v in own.items() if k in SECTIONS and v in (None, {})):
        if kept := next((k for k in below if k.startswith(f"{key}.")), None):
            raise SettingError(
                f"{path}: {key}: says nothing, while {base} sets {kept}; leave it out to keep what {base} has, or take all of"
                f" {key} away on the command line: {key}=null"
            )
    return _below(below, own) | own


def _below(flat: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Settings without the length of the run, if those `given` above them say another."""
    return {name: value for name, value in flat.items() if name not in LENGTHS or not {*LENGTHS} & {*given}}


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that recipes must not use."""


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML quietly takes the last, numbers that it reads in base 8
    or 60, and aliases, a few lines of which expand to more values than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias, which recipes do not have; write out what it stands for"
            raise _Refused(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.endswith((":int", ":float")) and OTHER_BASE.search(node.value):
            problem = (
                f"{node.value} is no decimal number to YAML (017 is 15, 1:30 is 90); write it in decimal, or in quotes"
            )
            raise _Refused(problem=problem, problem_mark=node.start_mark)
        return super().construct_object(node, deep)

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


def _types(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted name and the type of every setting below a section."""
    for name, kind in get_type_hints(cls).items():
        section = next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)
        yield from _types(section, f"{prefix}{name}.") if section else [(f"{prefix}{name}", kind)]


SCHEMA = TypeAdapter(Settings)
TYPES = dict(_types(Settings))
MAPPINGS = {name for name, kind in TYPES.items() if get_origin(kind) is Mapping}
SECTIONS = {name.rsplit(".", i)[0] for name in TYPES for i in range(1, name.count(".") + 1)} | MAPPINGS


def from_flat(flat: Mapping[str, Any]) -> Settings:
    """{"training.lr": 1e-5, …} -> Settings, each valid by itself. Raises SettingError."""
    enabled = flat.get(ENABLE_LORA, True)
    if type(enabled) is not bool:
        raise SettingError(f"{ENABLE_LORA}: {enabled!r} is not of type bool")
    flat = {k: v for k, v in flat.items() if k != ENABLE_LORA and (enabled or not k.startswith("training.lora."))}
    # YAML reads a section whose lines are all commented out as null
    flat = {k: v for k, v in flat.items() if not (k in SECTIONS and v in (None, {}))}
    for key, value in flat.items():
        if key in SECTIONS:
            advice = f"; {ADVICE.get(key)}" * (key in ADVICE)
            raise SettingError(f"{key}: {value!r} is not a section with settings in it{advice}")
        if key not in TYPES and not _mapping_of(key):
            raise SettingError(_unknown(key, TYPES))
    required = ["model", "training", f"{TRAIN_SET}.basic_parameters"]
    if any(key.startswith(f"{VALIDATION_SET}.") for key in flat):
        required.append(f"{VALIDATION_SET}.basic_parameters")
        own = f"{TRAIN_SET}.basic_parameters.dataset"
        inherited = {for_validation(k): v for k, v in flat.items() if k.startswith(f"{TRAIN_SET}.") and k != own}
        flat = flat | inherited | flat  # what is given comes first and wins
    tree: dict[str, Any] = {}
    for section in required:
        _branch(tree, section)
    for key, value in flat.items():
        section = _mapping_of(key) or key.rpartition(".")[0]
        _branch(tree, section)[key[len(section) + 1 :]] = value
    try:
        settings = SCHEMA.validate_python(tree)
    except ValidationError as error:
        raise SettingError(_message(error)) from None
    for key, value in flat.items():
        _check_value(key, value)
    return settings


def _mapping_of(key: str) -> str | None:
    """The mapping that a name, which may have dots of its own, is in."""
    return next((name for name in MAPPINGS if key.startswith(f"{name}.")), None)


def _branch(tree: dict[str, Any], path: str) -> dict[str, Any]:
    for name in path.split("."):
        tree = tree.setdefault(name, {})
    return tree


def _check_value(path: str, value: Any) -> None:
    """Refuse numbers and texts that no setting may have. Raises SettingError."""
    if isinstance(value, list | dict):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_value(f"{path}.{name}" if isinstance(value, dict) else f"{path}[{name}]", part)
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise SettingError(f"{path}: {value} is too large")
    elif isinstance(value, str) and (value in ("", "None", "none") or "\0" in value):
        raise SettingError(f"{path}: {value!r} names nothing; leave it out, or set it")
    elif isinstance(value, str) and not path.startswith(NO_PATHS) and (found := OF_A_SHELL.search(value)):
        what = f"{found[1] or found[2]} is not expanded here, it would be a folder of that name"
        raise SettingError(f"{path}: {value!r}: {what}; write out the path")


PROBLEMS = {  # of pydantic's types of errors; others are of the form int_type
    "missing": "is not set; it has no default",
    "string_type": "is not of type str",
    "value_error": "is not of type float",
    "tuple_type": "is not a list",
    "dataclass_type": "is not a section with settings in it",
    "literal_error": "is not one of {expected}",
    "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "is no multiple of {multiple_of}",
}


def _message(errors: ValidationError) -> str:
    """What is wrong with the first setting that is; in a list, with its entry."""
    found: dict[str, list[str]] = {}
    for error in errors.errors():
        path, kind = _path(error["loc"]), error["type"]
        if kind == "unexpected_keyword_argument":
            entry = path.rpartition(".")[0]
            owner = Attr if entry.endswith(".attr") else DatasetFile
            return _unknown(path, [f"{entry}.{f.name}" for f in dataclasses.fields(owner)])
        subject = path if kind == "missing" else f"{path}: {error['input']!r}"
        problem = PROBLEMS.get(kind, f"is not of type {kind.removesuffix('_type')}")
        found.setdefault(path, [subject]).append(problem.format(**error.get("ctx", {})))
    first = next(iter(found))
    subject, *problems = next((found[path] for path in found if path.startswith(f"{first}[")), found[first])
    return f"{subject} {' and '.join(problems)}"


def _path(loc: tuple[int | str, ...]) -> str:
    depth = next(i for i in range(1, len(loc) + 1) if ".".join(map(str, loc[:i])) in TYPES)
    name, inside = ".".join(map(str, loc[:depth])), loc[depth:]
    if name not in MAPPINGS:  # where a type is a union, its member comes before the entry
        inside = tuple(dropwhile(lambda part: isinstance(part, str), inside))
    return name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)


def _unknown(key: str, known: Iterable[str]) -> str:
    last = key.rsplit(".", 1)[-1].strip().lower().replace("-", "_")
    if advice := ADVICE.get(last):
        return f"{key} is no setting; {for_validation(advice) if key.startswith(VALIDATION_SET) else advice}"
    names = {name.rsplit(".", 1)[-1]: name for name in reversed([*known])}  # the first of those that are alike
    near = [names[last]] if last in names else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = near or [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.5)]
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


def flat_settings(settings: Settings) -> dict[str, Any]:
    """Every setting by its dotted name: {"training.lr": 1e-5, …}."""
    return _flatten(_plain(settings))


def to_yaml(settings: Settings) -> str:
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def _plain(settings: Settings) -> dict[str, Any]:
    return SCHEMA.dump_python(settings, mode="json")


def difference(old: Settings, new: Settings) -> list[str]:
    """The settings that changed, each as "training.lr: 0.001 -> 0.0001"."""
    before, after = ({k: v for k, v in flat_settings(s).items() if v != {}} for s in (old, new))
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in before | after if before.get(k) != after.get(k)]


def parse_words(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with a recipe and settings. An option that is none names the setting."""
    parser.add_argument("config", help="a recipe, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the recipe's")
    args, rest = parser.parse_known_args(argv)
    if option := next((word for word in rest if word.startswith("-")), None):
        parser.error(no_option(option))
    args.overrides += rest  # argparse takes them in one row alone
    return args


def no_option(word: str) -> str:
    name = word.lstrip("-").partition("=")[0]
    advice = f"write {name}=…" if name in TYPES else _unknown(name, TYPES)
    return f"{word} is no option, and settings are given as a.b=c: {advice}"


def main() -> int:
    parser = Parser(prog="python -m qwen35.config.load", description="Print the resolved settings.")
    parser.add_argument("--get", metavar="NAME", nargs="+", help="print these settings alone, a line each")
    args = parse_words(parser)
    try:
        settings = load_settings(args.config, args.overrides)
        flat = flat_settings(settings)
        for name in args.get or []:
            if name not in flat:
                raise SettingError(_unknown(name, flat))
    except SettingError as error:
        return complain(error)
    print("\n".join(str(flat[name]) for name in args.get) if args.get else to_yaml(settings).rstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
