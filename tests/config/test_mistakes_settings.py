"""Mistakes in a recipe or command line: one line names the setting, and nothing starts."""

import pytest
from mistakes import (
    BASIC,
    CONVERT,
    DATA,
    EVALUATE,
    EXPORT,
    SHOW,
    TRAIN,
    Case,
    Done,
    change,
    check,
    launch,
    parametrized,
    place,
    recipe,
    run,
    whole,
    write,
)

__all__ = ["place", "whole"]  # fixtures

VAL = "data.val_dataset_param.basic_parameters"
CONFIG, IMAGES = ("config", "r.yaml"), "data.dataset_param.preprocess_parameters"


def on(*overrides: str) -> tuple[str, ...]:
    return (*CONFIG, *overrides)


FILES = [
    Case("empty recipe", CONFIG, ("r.yaml: a recipe is a mapping with data, model, parallel",), write("r.yaml", "")),
    Case("no recipe", ("launch", "nope.yaml"), ("nope.yaml: no such recipe", "configs/")),
    Case("folder for a recipe", ("train", "data"), ("data: cannot be read: Is a directory",)),
    Case(
        "twice",
        CONFIG,
        ("r.yaml, line 18", "lr is there twice"),
        recipe(lambda t: t.replace("  lr:", "  lr: 1\n  lr:")),
    ),
    Case("section twice", CONFIG, ("model is there twice",), recipe(lambda t: t + "model:\n  freeze: []\n")),
    Case(
        "nested and dotted", CONFIG, ("r.yaml: training.lr is there twice",), recipe(lambda t: t + "training.lr: 1\n")
    ),
    Case(
        "tab", CONFIG, ("r.yaml is not YAML, line", "indent with spaces"), recipe(lambda t: t.replace("  lr:", "\tlr:"))
    ),
    Case("open bracket", CONFIG, ("r.yaml is not YAML, line 2, column 1",), write("r.yaml", "model: [a,\n")),
    Case("two documents", CONFIG, ("r.yaml is not YAML", "another document"), recipe(lambda t: f"{t}---\n{t}")),
    Case(
        "runs code",
        CONFIG,
        ("is not YAML", "python/object/apply"),
        write("r.yaml", "a: !!python/object/apply:os.getcwd []"),
    ),
    Case(
        "endless",
        CONFIG,
        ("r.yaml, line 2, column 6: *a is an alias, which recipes do not have; write out",),
        write("r.yaml", "training: &a\n  x: *a\n"),
    ),
    Case("very deep", CONFIG, ("r.yaml is not YAML",), write("r.yaml", "a: " + "[" * 5000)),
    Case("not UTF-8", CONFIG, ("r.yaml: not UTF-8 text", "byte 0"), write("r.yaml", "training:".encode("utf-16"))),
    Case("not text", CONFIG, ("r.yaml: not UTF-8 text", "at byte 127"), write("r.yaml", bytes(range(1, 256)))),
    Case(
        "value for a section",
        CONFIG,
        ("model: 'hf' is not a section", "; it is model.model_name_or_path here"),
        write("r.yaml", "model: hf\n"),
    ),
]
SETTINGS = [
    Case(
        "misspelt",
        on("training.trian_iters=3"),
        ("unknown setting training.trian_iters; did you mean training.train_iters",),
    ),
    Case("capitals", on("TRAINING.LR=3"), ("unknown setting TRAINING.LR; did you mean training.lr?",)),
    Case("wrong section", on("model.lr=3"), ("unknown setting model.lr; did you mean training.lr?",)),
    Case("below a setting", on("training.lr.x=3"), ("unknown setting training.lr.x; did you mean training.lr?",)),
    Case("no value", on("training.lr"), ("'training.lr' is not of the form a.b=c",)),
    Case("empty value", on("training.save="), ("training.save: None is not of type str",)),
    Case("empty text", on("training.save=''"), ("training.save: '' names nothing",)),
    Case("Python's None", on("training.load=None"), ("training.load: 'None' names nothing; leave it out",)),
    Case("none in a list", on("model.freeze=[none]"), ("model.freeze[0]: 'none' names nothing; leave it out",)),
    Case("empty mapping", on("training.lr={}"), ("training.lr: {} is not of type float",)),
    Case("list for a number", on("training.lr=[1]"), ("training.lr: [1] is not of type float",)),
    Case(
        "list for a path",
        on("training.save=[runs/a]"),
        ("training.save: ['runs/a'] is not of type str",),
    ),
    Case(
        "date for a path",
        on("training.save=2020-01-01"),
        ("training.save: datetime.date(2020, 1, 1) is not of type str",),
    ),
    Case("text for yes or no", on("parallel.recompute='true'"), ("parallel.recompute: 'true' is not of type bool",)),
    Case("list of numbers", on("model.freeze=[1]"), ("model.freeze[0]: 1 is not of type str",)),
    Case("kernels by one name", on("model.kernels=native"), ("model.kernels: 'native' is not a section",)),
    Case("base 8", on("training.seed=0042"), ("training.seed", "0042 is no decimal number to YAML")),
    Case(
        "base 60", CONFIG, ("r.yaml, line ", "1:30 is no dec"), recipe(lambda t: t.replace("iters: 1", "iters: 1:30"))
    ),
    Case("twice in a value", on("model.kernels={swiglu: native, swiglu: auto}"), ("swiglu is there twice",)),
    Case("not a number", on("training.lr=.nan"), ("training.lr: nan must be a finite number",)),
    Case("infinite", on("training.weight_decay=.inf"), ("training.weight_decay: inf must be a finite number",)),
    Case("huge", on("training.seed=99999999999999999999"), ("training.seed: 99999999999999999999 is too large",)),
    Case("negative size", on(f"{BASIC}.cutoff_len=-1"), (f"{BASIC}.cutoff_len: -1 must be more than 0",)),
    Case("two layers ahead", on("model.mtp_num_layers=2"), ("model.mtp_num_layers: 2 must be at most 1",)),
    Case("yes for a number", on("model.mtp_num_layers=true"), ("model.mtp_num_layers: True is not of type int",)),
    Case(
        "nothing ahead",
        on("model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0"),
        ("model.mtp_loss_scaling_factor: 0 must be more than 0",),
    ),
    Case(
        "too many workers", on("data.dataloader_param.num_workers=100000"), ("num_workers: 100000 must be at most 512",)
    ),
    Case(
        "other choice",
        on(f"{BASIC}.on_bad_record=ignore"),
        (f"{BASIC}.on_bad_record: 'ignore' is not one of 'error' or 'skip'",),
    ),
]
RULES = [
    Case("two sources", on("training.load=dcp"), ("training.load and training.init_from_hf_path", "set one")),
    Case(
        "constant has no least", on("training.min_lr=1e-5", "training.lr_decay_style=constant"), ("min_lr", "constant")
    ),
    Case("least above", on("training.min_lr=1"), ("training.min_lr 1.0 is above training.lr 0.001",)),
    Case(
        "thinking without a place for it",
        on(f"{BASIC}.template=qwen3_vl_nothink", f"{BASIC}.enable_thinking=true"),
        ("enable_thinking means nothing to template qwen3_vl_nothink",),
    ),
    Case(
        "all and only the last",
        on(f"{BASIC}.train_on_prompt=true", f"{BASIC}.mask_history=true"),
        ("contradict each other",),
    ),
    Case(
        "no size between",
        on("data.dataset_param.preprocess_parameters.image_min_pixels=5000"),
        ("is above image_max_pixels",),
    ),
    Case(
        "too many tokens", on("training.micro_batch_size=100000000"), ("micro_batch_size 100000000 x cutoff_len 160",)
    ),
    Case(
        "balance of one rank",
        on("training.expert_balance=1.2"),
        ("training.expert_balance 1.2 means nothing without parallel.expert_parallel_size",),
    ),
    Case(
        "balance without saves",
        on("training.expert_balance=1.2", "parallel.expert_parallel_size=2"),
        ("training.expert_balance moves experts when the run saves; set training.save_interval",),
    ),
    Case(
        "balance by less than none",
        on("training.expert_balance=1"),
        ("training.expert_balance: 1 must be more than 1",),
    ),
    Case(
        "weight of what is not trained",
        on("model.mtp_loss_scaling_factor=0.3"),
        ("mtp_loss_scaling_factor 0.3 means nothing without model.mtp_num_layers: 1",),
    ),
    Case(
        "saves into the model",
        on("training.save=hf/run"),
        ("training.save: hf/run lies in model.model_name_or_path hf",),
    ),
    Case(
        "saves as a checkpoint",
        on("training.save=runs/release"),
        ("training.save: runs/release is named like",),
    ),
    Case("caches in the model", on(f"{BASIC}.cache_dir=hf"), ("cache_dir: hf lies in model.model_name_or_path hf",)),
    Case(
        "validates nothing",
        on("training.val_interval=5"),
        ("training.val_interval says when to validate, and nothing on",),
    ),
    Case(
        "never validates", on(f"{VAL}.dataset=data/a.json"), ("val_dataset_param means nothing without training.val_i",)
    ),
    Case(
        "asks and never validates",
        on("training.val_generate=true"),
        ("val_generate means nothing without training.val_",),
    ),
    Case(
        "validates with weights",
        on("training.val_interval=5", f"{VAL}.dataset=[{{file: data/a.json, weight: 2}}]"),
        ("data.val_dataset_param: a validation takes each record once; leave the weights out",),
    ),
    Case(
        "validates without records",
        on("training.val_interval=5", f"{VAL}.cutoff_len=100"),
        (f"{VAL}.dataset is not set; it has no default",),
    ),
    Case(
        "validates on bins of nothing",
        on("training.val_interval=5", f"{VAL}.dataset=data/a.json", f"{VAL}.cutoff_len=0"),
        (f"{VAL}.cutoff_len: 0 must be more than 0",),
    ),
    Case(
        "one tag for both",
        on("data.dataset_param.attr.user_tag=x", "data.dataset_param.attr.assistant_tag=x"),
        ("user_tag and assistant_tag are both 'x'",),
    ),
]
EP, ULYSSES = "parallel.expert_parallel_size", "parallel.ulysses_parallel_size"
TEXT = "text_config"


def on_processes(count: int, *sizes: str) -> tuple[str, ...]:
    return (*launch(count), *sizes)


# The model has 8 experts of 2 x 24 and 48 rows, 4 heads (2 of keys and values), in the delta net 2
# and 4, in the vision tower 2.
LAYOUTS = [
    Case(
        "copies", on_processes(4, "parallel.fully_shard_parallel_size=3"), ("size 3 does not divide the 4 processes",)
    ),
    Case(
        "more to an expert than to a copy",
        on_processes(4, "parallel.fully_shard_parallel_size=2", f"{EP}=4"),
        (f"{EP} 4 does not divide the 2 processes that share a copy of the weights",),
    ),
    Case(
        "experts left over", on_processes(3, f"{EP}=3"), (f"{EP} 3 does not divide the 8 experts (hf on 3 processes)",)
    ),
    Case(
        "rows left over",
        on_processes(10, f"{EP}=2"),
        (
            f"10 processes that share a copy of the weights / {EP} 2 = 5 does not divide the 48 rows",
            "moe_intermediate_size",
        ),
    ),
    Case(
        "other rows left over",
        on_processes(10, f"{EP}=2"),
        (f"{EP} 2 = 5 does not divide the 48 rows", "hidden_size"),
        change("hf/config.json", f"{TEXT}.moe_intermediate_size", 25),
    ),
    Case(
        "no experts",
        on_processes(2, f"{EP}=2"),
        (f"{EP} 2 means nothing to a dense model",),
        change("hf/config.json", "model_type", "qwen3_5"),
    ),
    Case("bins", on_processes(4, f"{ULYSSES}=3"), (f"{ULYSSES} 3 does not divide the 4 processes",)),
    Case("heads", on_processes(8, f"{ULYSSES}=8"), (f"{ULYSSES} 8 does not divide the 4 attention heads",)),
    Case(
        "keys and values",
        on_processes(2, f"{ULYSSES}=2"),
        (f"{ULYSSES} 2 neither divides the 3 key-value heads", "nor is a multiple of them"),
        change("hf/config.json", f"{TEXT}.num_key_value_heads", 3),
    ),
    Case(
        "keys of the delta net",
        on_processes(4, f"{ULYSSES}=4"),
        (f"{ULYSSES} 4 does not divide the 2 key heads of the delta net, linear_num_key_heads",),
    ),
    Case(
        "values of the delta net",
        on_processes(2, f"{ULYSSES}=2"),
        (f"{ULYSSES} 2 does not divide the 3 value heads of the delta net",),
        change("hf/config.json", f"{TEXT}.linear_num_value_heads", 3),
    ),
    Case(
        "heads of the tower",
        on_processes(2, f"{ULYSSES}=2"),
        (f"{ULYSSES} 2 does not divide the 1 heads of the vision tower",),
        change("hf/config.json", "vision_config.num_heads", 1),
    ),
    Case(
        "tokens",
        on_processes(2, f"{ULYSSES}=2", f"{BASIC}.cutoff_len=161"),
        (f"{ULYSSES} 2 does not divide the 161 tokens of a micro-batch, 1 x cutoff_len 161",),
    ),
    Case(
        "patches",
        on_processes(2, f"{ULYSSES}=2", "data.dataloader_param.patch_bucket=20"),
        ("patch_bucket 20 is no multiple of", f"{ULYSSES} 2 x the 4 patches"),
    ),
    Case("without a launcher", (*TRAIN, f"{EP}=2"), (f"{EP} 2 does not divide the 1 processes that share a copy",)),
]
COMMANDS = [
    Case("option of train", (*TRAIN, "--lr", "1"), ("--lr is no option", "did you mean training.lr?", "--help")),
    Case("no config", ("train",), ("required: config", "--help")),
    Case(
        "no such setting to get",
        (*CONFIG, "--get", "training.sav"),
        ("unknown setting training.sav; did you mean",),
    ),
    Case("section to get", (*CONFIG, "--get", "training"), ("unknown setting training",)),
    Case("no samples", (*SHOW, "--samples", "-1"), ("--samples: '-1' is not a whole number from 1",)),
    Case("zero samples", (*SHOW, "--samples", "0"), ("--samples: '0' is not a whole number from 1",)),
    Case("what to do about missing", (*DATA, "--on_missing", "ignore"), ("--on_missing", "'ignore'", "skip")),
    Case("no command", ("data",), ("required: command",)),
    Case("reads what it writes", (*DATA[:-1], "data/a.json"), ("data/a.json: is the input file; set OUT",)),
    Case("writes over a folder", (*DATA[:-1], "hf"), ("hf: cannot be written", "not a regular file")),
    Case("no LLaVA file", (*DATA, "--llava", "no.json"), ("no.json: no such file; set LLAVA",)),
    Case("file for a folder", (*DATA, "--images", "r.yaml"), ("r.yaml: no such folder; set IMAGES",)),
    Case("tie", (*CONVERT, "--tie_weight_mapping", "[1]"), ("--tie_weight_mapping", "is not a JSON object of names")),
    Case(
        "converts into the model",
        (*CONVERT, "--dcp_dir", "hf/dcp"),
        ("hf/dcp and the original hf must be two folders",),
    ),
    Case("converts to nowhere", (*CONVERT, "--dcp_dir", ""), ("--dcp_dir: names no folder",)),
    Case("exports over the model", (*EXPORT, "--save_hf_dir", "hf"), ("hf and the original hf must be two folders",)),
    Case("exports over others' files", (*EXPORT, "--save_hf_dir", "data"), ("data exists already", "choose another")),
    Case("batch of none", (*EVALUATE, "--batch", "0"), ("--batch: '0' is not a whole number from 1",)),
    Case("pixels of evaluate", (*EVALUATE, "--image_min_pixels", "999999"), ("image_min_pixels 999999 is above",)),
    Case(
        "rank beyond",
        ("launch", "--nnodes", "2", "--node_rank", "2", "r.yaml"),
        ("--node_rank 2 is not below --nnodes 2",),
    ),
    Case(
        "no processes", ("launch", "--nproc_per_node", "0", "r.yaml"), ("--nproc_per_node: '0' is not a whole number",)
    ),
    Case("port beyond", ("launch", "--master_port", "65536", "r.yaml"), ("--master_port: '65536'", "from 1 to 65535")),
]


@parametrized([*FILES, *SETTINGS, *RULES, *LAYOUTS, *COMMANDS])
def test_a_mistake_is_one_line(place, case):
    check(place, case)


@pytest.mark.parametrize(
    ("start", "end"), [(b"", b"\r\n"), (b"\xef\xbb\xbf", b"\n")], ids=["Windows lines", "byte-order mark"]
)
def test_line_ends_and_byte_order_marks_are_accepted(place, start, end):
    text = (place / "r.yaml").read_bytes()
    (place / "r.yaml").write_bytes(start + text.replace(b"\n", end))
    assert run(place, *CONFIG, "--get", "training.lr") == Done(0, "0.001\n", "")
