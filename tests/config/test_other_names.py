"""Names of other trainers and near misses lead to the setting that is meant."""

import contextlib
import io
import re
from dataclasses import fields
from importlib import import_module

import pytest
from transformers import TrainingArguments

from qwen35.config.load import SECTIONS, TYPES, SettingError, from_flat, parse_words
from qwen35.config.other_names import ADVICE, NOT_THE_SAME, SAME
from qwen35.errors import Parser

REQUIRED = {
    "data.dataset_param.basic_parameters.dataset": "a.json",
    "model.model_name_or_path": "hf",
    "training.train_iters": 1,
    "training.save": "run",
}
OURS = {name.rpartition(".")[2] for name in TYPES}
# what people set in their recipes, of the arguments of transformers' Trainer
COMMON = """output_dir per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps learning_rate
    lr_scheduler_type warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    gradient_accumulation_steps bf16 fp16 tf32 gradient_checkpointing torch_compile use_liger_kernel logging_steps
    logging_strategy report_to run_name eval_strategy eval_steps save_strategy save_steps save_total_limit save_only_model
    load_best_model_at_end metric_for_best_model full_determinism seed data_seed dataloader_num_workers
    dataloader_pin_memory dataloader_drop_last remove_unused_columns ddp_timeout fsdp fsdp_config deepspeed do_train
    resume_from_checkpoint""".split()


def refused(key: str, value: object = 1) -> str:
    with pytest.raises(SettingError) as caught:
        from_flat(REQUIRED | {key: value})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("training.learning_rate", "training.learning_rate is no setting; it is training.lr here"),
        ("learning_rate", "learning_rate is no setting; it is training.lr here"),
        ("training.output-dir", "training.output-dir is no setting; it is training.save here"),
        ("num_train_epochs", "num_train_epochs is no setting; it is training.train_epochs here"),
        (
            "model.lora_rank",
            "model.lora_rank is no setting; it is training.lora.r here",
        ),
        (
            "training.lora.lora_dropout",
            "training.lora.lora_dropout is no setting; it is not here: a resume would not be",
        ),
        ("packing", "packing is no setting; samples are always packed"),
        (
            "data.val_dataset_param.basic_parameters.max_length",
            "data.val_dataset_param.basic_parameters.max_length is no setting; it is data.val_dataset_param.basic",
        ),
        ("model_name_or_path", "model_name_or_path is no setting; it is model.model_name_or_path here"),
        ("weight_decay", "unknown setting weight_decay; did you mean training.weight_decay?"),
        ("training.learning_rat", "unknown setting training.learning_rat; did you mean training."),
    ],
)
def test_a_name_of_another_trainer_leads_to_ours(key, message):
    assert refused(key).startswith(message)


def test_every_setting_that_a_message_names_exists():
    named = {
        name for text in ADVICE.values() for name in re.findall(r"\b(?:data|model|parallel|training)\.[a-z_.]*\w", text)
    }
    assert len(named) > 40 and set(SAME) <= named
    assert named - TYPES.keys() - SECTIONS == set()


def test_each_name_has_one_meaning_and_is_not_one_of_ours():
    names = [name for names in (*SAME.values(), *NOT_THE_SAME.values()) for name in names.split()]
    assert len(names) == len(set(names)) == len(ADVICE)
    assert set(names) & OURS == {"model_name_or_path"}  # two settings, of which the model's is meant


def test_the_common_arguments_of_transformers_are_all_answered():
    known = {f.name for f in fields(TrainingArguments)}
    assert set(COMMON) <= known | {"warmup_ratio"}
    assert [name for name in COMMON if name not in ADVICE and name not in OURS] == []


@pytest.mark.parametrize(("written", "kept"), [("bfloat16", "bf16"), ("float32", "fp32"), ("bf16", "bf16")])
def test_dtypes_by_their_long_names(written, kept):
    assert from_flat(REQUIRED | {"training.dtype": written}).training.dtype == kept


def test_other_dtypes_are_refused():
    message = refused("training.dtype", "float16")
    assert message == "training.dtype: 'float16' is not one of 'bf16' or 'fp32'"


PROGRAMS = {
    "qwen35.launch.launcher": ["r.yaml"],
    "qwen35.train": ["r.yaml"],
    "qwen35.launch.hosts": ["hosts", "r.yaml"],
    "qwen35.data.__main__": ["show", "r.yaml"],
    "rehearse.__main__": ["r.yaml"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--learning_rate", "1e-5"], "learning_rate is no setting; it is training.lr here"),
        (
            ["--num-train-epochs=3"],
            "num-train-epochs is no setting; it is training.train_epochs here",
        ),
        (["--training.lr", "1e-5"], "write training.lr=…"),
    ],
)
def test_a_name_as_an_option_is_answered_with_ours(program: str, words: list[str], answer: str) -> None:
    """In one line of the program, whatever it would have done."""
    for line in ([*PROGRAMS[program], *words], [*PROGRAMS[program][:-1], *words, "r.yaml"]):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            try:
                code = import_module(program).main(line)
            except SystemExit as end:
                code = end.code
        assert code and err.getvalue().count("\n") == 1
        assert f"{words[0]} is no option, and settings are given as a.b=c: {answer}" in err.getvalue()


def test_settings_may_stand_before_and_behind_options() -> None:
    parser = Parser()
    parser.add_argument("--nodes")
    args = parse_words(parser, ["r.yaml", "training.lr=1", "--nodes", "2", "training.seed=3"])
    assert (args.config, args.nodes, args.overrides) == ("r.yaml", "2", ["training.lr=1", "training.seed=3"])
