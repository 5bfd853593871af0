"""Every setting with its meaning and default. The paths are those of the seed's user guide.

Each field is read somewhere; load.py makes these from a recipe, and refuses a key that is not a field.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

TRAIN_SET, VALIDATION_SET = (
    "data.dataset_param",
    "data.val_dataset_param",
)  # the second is as the first where it says nothing


def for_validation(words: str) -> str:
    """What names a setting of the records that are trained, with that of the validation set in its place."""
    return words.replace(TRAIN_SET, VALIDATION_SET)


REQUIRED: Any = dataclasses.MISSING


# -- data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessParameters:
    # folder of the tokenizer and the processor; default: model.model_name_or_path
    model_name_or_path: str | None = None
    image_max_pixels: int = 262144  # larger images are scaled down to this many pixels
    image_min_pixels: int = 1024  # smaller images are scaled up to this many
    video_max_pixels: int = 65536  # all frames of a video are scaled alike, down to this many pixels a frame
    video_min_pixels: int = 1024  # or up to this many pixels a frame
    video_fps: float = 2.0  # frames taken per second of video; a list of frames without a rate of its own has this one
    video_maxlen: int = 64  # most frames taken of one video; of a longer one they are evenly spaced


@dataclass(frozen=True)
class DatasetFile:
    file: str = REQUIRED
    weight: float = 1.0  # how often an epoch shows its samples: 2 is each twice, 0.5 another half in each epoch


def dataset_entries(dataset: str | Sequence[DatasetFile]) -> list[DatasetFile]:
    """One entry a file, of a list or of names with commas between them."""
    if isinstance(dataset, str):
        return [DatasetFile(name.strip()) for name in dataset.split(",") if name.strip()]
    return list(dataset)


@dataclass(frozen=True)
class BasicParameters:
    # one file of records, or several separated by commas; or a list with weights: [{file: a.json, weight: 2}, b.json] shows
    # every sample of the first file twice in an epoch
    dataset: str | tuple[DatasetFile, ...] = REQUIRED
    dataset_dir: str = "."  # where the images of the records lie; none may lie outside
    # keeps tokenised samples, and as files the images that records hold themselves; default: nothing is kept
    cache_dir: str | None = None
    max_samples: int | None = None  # read only the first so many records of all files together; default: all
    cutoff_len: int = 2048  # tokens of one packed sequence; a longer sample is an error, see truncation
    # the chat template: the checkpoint's own, or that of MindSpeed-MM's recipes
    template: Literal["qwen3_vl_nothink", "qwen3_5"] = "qwen3_5"
    # with template qwen3_5: true trains thoughts, false drops them; default: as each record has it
    enable_thinking: bool | None = None
    # what a special token becomes that user, system or tools spell out: that token, as transformers and vLLM have it when
    # the model is asked, or the text of its characters. In answers it is a token; control tokens are text everywhere
    special_tokens_in_prompts: Literal["tokens", "text"] = "tokens"
    train_on_prompt: bool = False  # true: the loss also counts what the user says
    mask_history: bool = False  # true: the loss counts only the last answer of a conversation
    # what becomes of a sample longer than cutoff_len: error as any record that cannot be used, drop leaves it out, truncate
    # keeps its beginning up to the last trained token that fits, never half an image or video; both are counted
    truncation: Literal["error", "drop", "truncate"] = "error"
    # what becomes of a record that cannot be used: stop, or leave it out, counted and named
    on_bad_record: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class Attr:
    """The names of a record's fields, where they are not the usual ones (which are found by themselves).

    With dots for a field inside another: `dialog.turns`.
    """

    messages: str | None = None  # the turns; usually messages or conversations
    images: str | None = None  # usually images or image
    videos: str | None = None  # usually videos or video
    tools: str | None = None  # what can be called; usually tools
    system: str | None = None  # the text of a system turn, where it stands beside the turns; usually system
    role_tag: str | None = None  # who speaks; usually role or from
    content_tag: str | None = None  # what is said; usually content or value
    user_tag: str | None = None  # usually user or human
    assistant_tag: str | None = None  # usually assistant or gpt
    system_tag: str | None = None  # usually system or developer
    observation_tag: str | None = None  # a tool's answer; usually tool or observation
    function_tag: str | None = None  # the assistant's call of a tool; usually function_call or tool_call
    ignore: tuple[str, ...] = ()  # fields that do not matter although they look as if they did: [label]


@dataclass(frozen=True)
class DatasetParam:
    basic_parameters: BasicParameters
    preprocess_parameters: PreprocessParameters = PreprocessParameters()
    attr: Attr = Attr()


@dataclass(frozen=True)
class DataloaderParam:
    num_workers: int = 1  # processes a rank that decode and pack ahead of the training step; 0: none
    shuffle: bool = True  # a new order in each epoch, from training.seed
    patch_bucket: int = 256  # a micro-batch's image patches are padded to a multiple of this, so that shapes stay few


@dataclass(frozen=True)
class DataSettings:
    dataset_param: DatasetParam
    # the validation set of training.val_interval, with the same settings; what is not given is as in dataset_param, except
    # basic_parameters.dataset, which must be given; default: no validation
    val_dataset_param: DatasetParam | None = None
    dataloader_param: DataloaderParam = DataloaderParam()


# -- model, parallel, training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCfg:
    # how the losses of trained tokens are averaged: docs/guide.md says what each minimises; model.loss_type is a short form
    loss_type: Literal["default", "per_sample_loss", "per_token_loss"] = "default"
    router_aux_loss_coef: float = 0.0  # weight of the experts' load-balancing loss


@dataclass(frozen=True)
class ModelSettings:
    model_name_or_path: str = REQUIRED  # folder with config.json (and the tokenizer)
    freeze: tuple[str, ...] = ()  # module names; `*` and `{*}` match one level: model.language_model.layers.{*}.mlp
    # 1: train the checkpoint's multi-token prediction too, which looks one token further; 0: keep its weights as they are
    mtp_num_layers: int = 0
    mtp_loss_scaling_factor: float = 0.1  # weight of the loss of multi-token prediction
    loss_cfg: LossCfg = LossCfg()
    # operator -> implementation: auto, native, torch_npu, triton or fla; `python -m kernels` prints the table
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ParallelSettings:
    # ranks that share one copy of the weights; fewer than all give replicas (HSDP); default: all
    fully_shard_parallel_size: int | None = None
    # of these, ranks that each own a part of the experts, to whom the tokens travel
    expert_parallel_size: int = 1
    # ranks that share each packed sequence: each holds a part of its tokens, and inside attention and the gated delta net
    # computes a part of the heads for all of them
    ulysses_parallel_size: int = 1
    # true: keep only each layer's input for backward, and run the layer again; selective: also keep what attention and the
    # delta rule return, which then do not run again
    recompute: bool | Literal["selective"] = False
    # what a layer keeps for backward waits in the host's memory until backward comes near: with recompute its input, with
    # selective those outputs too; on a CPU it is only copied, and nothing is saved
    activation_offload: bool = False


@dataclass(frozen=True)
class ProfileSettings:
    """Some steps under the profiler of the device."""

    steps: int = 0  # how many steps run under the profiler: a trace and a table of operators a rank; 0: none
    start: int = 3  # the first of them
    ranks: tuple[int, ...] = (0,)  # the ranks that are profiled
    memory_snapshot: bool = False  # also what the device's memory holds, or on a CPU each allocation in the trace
    folder: str = "profile"  # where it is written, below training.save


@dataclass(frozen=True)
class TrainingSettings:
    train_iters: int = REQUIRED  # optimizer steps of the whole run
    save: str = REQUIRED  # the folder that the run leaves behind
    micro_batch_size: int = 1  # packed sequences of cutoff_len tokens a rank and micro-step
    gradient_accumulation_steps: int = 1  # micro-steps of one optimizer step
    # adamw_swap: AdamW's two moments (8 bytes a parameter) live in the host's memory and come to the device chunk by chunk
    # in each step; checkpoints and numbers are the same
    optimizer: Literal["adamw", "adamw_swap"] = "adamw"
    lr: float = 1e-5  # the highest learning rate
    min_lr: float = 0.0  # the learning rate that the decay ends at
    # how the learning rate goes from lr to min_lr after the warm-up
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_ratio: float = 0.1  # share of train_iters in which the learning rate rises to lr
    weight_decay: float = 0.0  # of matrices; vectors (norms, biases, gates) never decay
    adam_beta1: float = 0.9  # AdamW's decay of the first moment
    adam_beta2: float = 0.95  # AdamW's decay of the second moment
    adam_eps: float = 1e-8  # AdamW's smallest divisor
    clip_grad: float = 1.0  # largest global gradient norm; 0: not clipped
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic; weights, gradients' sums and optimizer are always fp32
    seed: int = 42  # of the order of the data and of every random draw
    deterministic: bool = False  # the same bits from the same step each time, on an NPU too: slower there
    log_interval: int = 1  # steps between log lines; a run that is asked to stop does so at the next of them
    peak_tflops: float | None = None  # bf16 peak of one device, for the metric mfu; default: no mfu
    save_interval: int | None = None  # steps between checkpoints; default: only one at the end
    # newest checkpoints that stay once a newer one is whole; release/ and one that is being read stay too; default: all
    save_total_limit: int | None = None
    # write checkpoints between steps while training goes on, from a copy of each rank's share in the host's memory; false:
    # the steps wait
    async_save: bool = True
    # steps between validations on data.val_dataset_param, one more at the end; default: none
    val_interval: int | None = None
    # have the model answer the validation records too, on a whole copy of it on each device, and report the share of exactly
    # right answers
    val_generate: bool = False
    load: str | None = None  # DCP folder: converted weights, or another run's save folder; this or init_from_hf_path
    init_from_hf_path: str | None = None  # Hugging Face folder that is read directly; this or load
    init_model_with_meta_device: bool = True  # no rank ever holds the whole model; false: build it whole, then shard
    # seconds that a rank may stand still, in a step, a save or the start, before the job is ended; reading data has this time
    # for each record, loading weights for each part
    timeout: float = 1800.0
    # how often the ranks are started again, from the newest checkpoint, after a failure that a new start can get past
    max_restarts: int = 0
    zero_grad_patience: int = 5  # steps that a trained group may have a gradient of exactly zero before the run stops
    profile: ProfileSettings = ProfileSettings()


@dataclass(frozen=True)
class Settings:
    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    parallel: ParallelSettings = ParallelSettings()

    @property
    def tokenizer_dir(self) -> str:
        return self.data.dataset_param.preprocess_parameters.model_name_or_path or self.model.model_name_or_path

    @property
    def validation(self) -> "Settings | None":
        """The same with the validation set for the records, where there is one."""
        held_out = self.data.val_dataset_param
        return replace(self, data=replace(self.data, dataset_param=held_out)) if held_out else None
