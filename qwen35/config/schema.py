"""Every setting with its meaning, bounds and default; `make docs` turns them into docs/settings.md.

load.py makes these from a recipe; what they hold, rules.py compares. Every field is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, with_config

TRAIN_SET, VALIDATION_SET = "data.dataset_param", "data.val_dataset_param"  # the second inherits from the first


def for_validation(message: str) -> str:
    """The message with the validation set's setting in place of the training set's."""
    return message.replace(TRAIN_SET, VALIDATION_SET)


Float = Annotated[StrictFloat, BeforeValidator(lambda v: float(v) if isinstance(v, str) else v)]  # YAML: 1e-5 is text
PositiveInt = Annotated[StrictInt, Field(gt=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeInt = Annotated[StrictInt, Field(ge=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Dtype = Annotated[Literal["bf16", "fp32"], BeforeValidator(lambda v: LONG_NAMES.get(str(v), v))]
LONG_NAMES = {"bfloat16": "bf16", "float32": "fp32"}


# -- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessParameters:
    model_name_or_path: str | None = None  # folder of tokenizer and processor; default: model.model_name_or_path
    image_max_pixels: PositiveInt = 262144  # larger images are scaled down to this many pixels
    image_min_pixels: PositiveInt = 1024  # smaller images are scaled up to this many pixels
    video_max_pixels: PositiveInt = 65536  # videos with larger frames are scaled down to this many pixels per frame
    video_min_pixels: PositiveInt = 1024  # videos with smaller frames are scaled up to this many pixels per frame
    video_fps: PositiveFloat = 2.0  # frames sampled per second of video; also the rate of frame lists that name none
    # most frames sampled from one video, evenly if it is longer; at least 2: models take pairs
    video_maxlen: Annotated[StrictInt, Field(ge=2)] = 64


@dataclass(frozen=True)
class Attr:
    """How records are read, above all the names of fields and roles, of which the usual are found.

    Dots name a field inside another: `dialog.turns`.
    """

    # sharegpt: a list of turns, also of messages; alpaca: a record is a question and its answer
    format: Literal["sharegpt", "alpaca"] = "sharegpt"
    messages: str | None = None  # the field with the turns; default: messages or conversations
    images: str | None = None  # the field with the images; default: images or image
    videos: str | None = None  # the field with the videos; default: videos or video
    tools: str | None = None  # the field with the tools' definitions; default: tools
    system: str | None = None  # the field with the system prompt, where it is no turn; default: system
    role_tag: str | None = None  # a turn's field with the role; default: role or from
    content_tag: str | None = None  # a turn's field with the text; default: content or value
    user_tag: str | None = None  # the role of the user; default: user or human
    assistant_tag: str | None = None  # the role of the assistant; default: assistant or gpt
    system_tag: str | None = None  # the role of the system prompt; default: system or developer
    observation_tag: str | None = None  # the role of a tool's result; default: tool or observation
    function_tag: str | None = None  # the role of a tool call; default: function_call or tool_call
    prompt: str | None = None  # the question's field: of format alpaca, default: instruction; of pairs, default: prompt
    query: str | None = None  # format alpaca: the field with what follows it on a new line; default: input
    response: str | None = None  # format alpaca: the field with the answer; default: output
    history: str | None = None  # format alpaca: the field with earlier [question, answer] pairs; default: history
    chosen: str | None = None  # stage dpo: the field with the chosen answer; default: chosen
    rejected: str | None = None  # stage dpo: that with the other; default: rejected, rejected_response, …_messages
    # how a record's `objects` are written, by ms-swift's names (QWENVL_BBOX_FORMAT). legacy:
    # <|box_start|>(x1,y1),(x2,y2)<|box_end|>; new: [x1, y1, x2, y2], as Qwen3-VL and 3.5 answer
    bbox_format: Literal["legacy", "new"] = "legacy"
    ignore: tuple[str, ...] = ()  # fields to ignore without a warning that they look like data: [label]


@dataclass(frozen=True)
class DatasetFile:
    file: str
    weight: PositiveFloat = 1.0  # times an epoch shows each sample; 0.5: every epoch another half of them
    format: Literal["sharegpt", "alpaca"] | None = None  # of this file, in place of attr.format
    attr: Attr | None = None  # of this file, in place of dataset_param.attr


# a file's name alone is an entry, too
Entry = Annotated[DatasetFile, BeforeValidator(lambda v: v if isinstance(v, dict | DatasetFile) else {"file": v})]


def dataset_entries(dataset: str | Sequence[DatasetFile]) -> list[DatasetFile]:
    """One entry per file, from a list or from names separated by commas."""
    if isinstance(dataset, str):
        return [DatasetFile(name.strip()) for name in dataset.split(",") if name.strip()]
    return list(dataset)


def attr_of(entry: DatasetFile, attr: Attr) -> Attr:
    """How the records of a file are read; attr: the one for all files."""
    own = entry.attr or attr
    return replace(own, format=entry.format or own.format)


@dataclass(frozen=True)
class BasicParameters:
    # one file of records, or several separated by commas; or a list with weights:
    # [{file: a.json, weight: 2}, b.json] shows every sample of the first file twice per epoch. An
    # entry may also have a format, and an attr that is read in place of dataset_param.attr:
    # {file: a.json, format: alpaca}
    dataset: str | tuple[Entry, ...]
    dataset_dir: str = "."  # the folder of the images and videos that records name; they must lie inside it
    # folder that caches tokenised samples and the images embedded in records; default: no cache
    cache_dir: str | None = None
    max_samples: PositiveInt | None = None  # read only this many records, from the first file on; default: all
    cutoff_len: PositiveInt = 2048  # tokens of one packed sequence; see truncation for longer samples
    # the chat template: qwen3_5 is the family's, in the form that the checkpoint has (3.5, 3.6 or
    # 3.8); checkpoint is any other that the checkpoint has, which then says by itself what it
    # generates; qwen3_vl_nothink is that of MindSpeed-MM's recipes
    template: Literal["qwen3_vl_nothink", "qwen3_5", "checkpoint"] = "qwen3_5"
    # not for qwen3_vl_nothink: true trains on thoughts, false drops them; default: as recorded
    enable_thinking: StrictBool | None = None
    # for the templates of Qwen3.6 and 3.8: whether answers before the last question keep their
    # thoughts; default: as the template does it, 3.6 false, 3.8 true
    preserve_thinking: StrictBool | None = None
    # for the template of Qwen3.8, which opens with a sentence on it; default: the template's, xhigh
    reasoning_effort: Literal["xhigh", "medium", "low"] | None = None
    # how a special token that is spelled out in a user, system or tools text is encoded: as that
    # token, which is what transformers and vLLM do at inference, or as plain text. In answers it is
    # always the token; control tokens such as <|im_end|> are text everywhere
    special_tokens_in_prompts: Literal["tokens", "text"] = "tokens"
    train_on_prompt: StrictBool = False  # true: the loss also counts the user's turns
    # answers before the last question, which the templates of Qwen3.5 and 3.6 write without the
    # think block that each one's prompt ended with: split trains them in samples of their own, each
    # up to the next question; joined makes one sample of a record, without those blocks
    multi_turn: Literal["split", "joined"] = "split"
    mask_history: StrictBool = False  # true: the loss counts only the last answer of a conversation
    # a sample longer than cutoff_len: error treats it as a bad record (see on_bad_record), drop
    # leaves it out, truncate keeps its beginning, up to the last trained token that fits and
    # without splitting an image or video. Dropped and truncated samples are counted in the log
    truncation: Literal["error", "drop", "truncate"] = "error"
    # a record that cannot be used: error stops the run, skip leaves it out, and counts and logs it
    on_bad_record: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class DatasetParam:
    basic_parameters: BasicParameters
    preprocess_parameters: PreprocessParameters = PreprocessParameters()
    attr: Attr = Attr()


@dataclass(frozen=True)
class DataloaderParam:
    # processes per rank that decode and pack ahead of the training step; 0: none
    num_workers: Annotated[StrictInt, Field(ge=0, le=512)] = 1
    # shuffle anew in each epoch, by training.seed; false: the order of the files, but packing may
    # take a sample forward by up to 63 packed sequences
    shuffle: StrictBool = True
    # a micro-batch's image patches are padded to a multiple of this, so that few shapes occur
    patch_bucket: PositiveInt = 256


@dataclass(frozen=True)
class DataSettings:
    dataset_param: DatasetParam
    # the validation set, with the settings of dataset_param, from which it inherits those that are
    # not given, except basic_parameters.dataset; see training.val_interval; default: no validation
    val_dataset_param: DatasetParam | None = None
    dataloader_param: DataloaderParam = DataloaderParam()


# -- model, parallel, training ---------------------------------------------------------------------


@dataclass(frozen=True)
class LossCfg:
    # how token losses are averaged, which docs/guide.md explains; model.loss_type is a short form
    loss_type: Literal["default", "per_sample_loss", "per_token_loss"] = "default"
    router_aux_loss_coef: NonNegativeFloat = 0.0  # weight of the load-balancing loss of mixture-of-experts models


@dataclass(frozen=True)
class ModelSettings:
    model_name_or_path: str  # Hugging Face folder with config.json and the tokenizer
    # modules to freeze; `*` and `{*}` match one level: model.language_model.layers.{*}.mlp
    freeze: tuple[str, ...] = ()
    # 1: also train the checkpoint's multi-token prediction (MTP) layer; 0: leave it as it is
    mtp_num_layers: Annotated[StrictInt, Field(ge=0, le=1)] = 0
    mtp_loss_scaling_factor: PositiveFloat = 0.1  # weight of the multi-token prediction loss
    loss_cfg: LossCfg = LossCfg()
    # operator: implementation (auto, native, torch_npu, triton, fla); see `python -m kernels`
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ParallelSettings:
    # ranks that share one copy of the weights (FSDP); fewer than all: replicas (HSDP); default: all
    fully_shard_parallel_size: PositiveInt | None = None
    # of these, ranks that hold different experts; tokens are sent to the ranks of their experts
    expert_parallel_size: PositiveInt = 1
    # ranks that share each packed sequence (Ulysses context parallelism): each holds a part of the
    # tokens, and in attention and the gated delta net computes a part of the heads for all tokens
    ulysses_parallel_size: PositiveInt = 1
    # true: save only the input of each layer, and run the layer again in the backward pass;
    # selective: also save what attention and the delta rule return, which then do not run again
    recompute: StrictBool | Literal["selective"] = False
    # hold what the layers save for the backward pass in the host's memory until it is needed
    # (recompute decides what they save); on a CPU this copies without saving memory
    activation_offload: StrictBool = False


@dataclass(frozen=True)
class ProfileSettings:
    """Steps under the device's profiler."""

    steps: NonNegativeInt = 0  # number of steps to profile; each rank writes a trace and a table of operators; 0: none
    # the first step to profile, at least 2: the profiler warms up in the step before
    start: Annotated[StrictInt, Field(ge=2)] = 3
    ranks: tuple[NonNegativeInt, ...] = (0,)  # the ranks to profile
    # also write a snapshot of the device's memory; on a CPU, allocations in the trace
    memory_snapshot: StrictBool = False
    folder: str = "profile"  # folder of the profile, below training.save


LORA_TARGETS = tuple("q_proj k_proj v_proj o_proj in_proj_qkv in_proj_z out_proj gate_proj up_proj down_proj".split())


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of low rank beside frozen weights: y = W x + s B A x."""

    r: Annotated[StrictInt, Field(gt=0, multiple_of=8)]  # rank of the adapters; `rank` is a short form
    lora_alpha: PositiveFloat = 32.0  # s = lora_alpha / r, for all adapters; `alpha` is a short form
    # linear modules that get an adapter, by the last parts of their names, in which `*` and `{*}`
    # match one: q_proj, layers.0.self_attn.*. In the vision tower there are attn.qkv, attn.proj,
    # linear_fc1, linear_fc2
    target_modules: tuple[str, ...] = LORA_TARGETS
    # weights of the routed experts that get an adapter for each expert, of
    # mlp.experts.gate_up_proj and mlp.experts.down_proj
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()  # of these, names that get none, written as in target_modules
    expert_r: Annotated[StrictInt, Field(gt=0, multiple_of=8)] | None = None  # rank in target_parameters; default: r
    use_rslora: StrictBool = False  # s = lora_alpha / sqrt(r) instead
    # PEFT folder with the adapters to go on from, of the same settings; default: new ones, which
    # change nothing at first; `pretrained_lora_path` is a short form
    adapter: str | None = None


@dataclass(frozen=True)
class DpoSettings:
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO's own, or that of IPO, on the answers' mean log-probabilities
    beta: PositiveFloat = 0.1  # how strongly the reference holds the model; ipo's margin is 1 / (2 beta)
    label_smoothing: Annotated[Float, Field(ge=0, lt=0.5)] = 0.0  # share of the pairs taken to be the wrong way round
    rpo_alpha: NonNegativeFloat = 0.0  # weight of the chosen answers' loss a token, which is added; 0: none


@dataclass(frozen=True)
class TrainingSettings:
    save: str  # folder for checkpoints, metrics.jsonl and report.html; a run resumes from it
    stage: Literal["sft", "dpo"] = "sft"  # dpo: learn from pairs of a chosen and a rejected answer, see training.dpo
    # passes over the data, for the whole run; 0.5: half of one. Each epoch ends with a step of its
    # own, of what is left of it; give this or train_iters, of which an override replaces the other
    train_epochs: PositiveFloat | None = None
    train_iters: PositiveInt | None = None  # optimizer steps of the whole run, in place of train_epochs
    micro_batch_size: PositiveInt = 1  # packed sequences of cutoff_len tokens per rank and micro-step
    gradient_accumulation_steps: PositiveInt = 1  # micro-steps per optimizer step
    # adamw_swap: AdamW's two moments (8 bytes per parameter) stay in the host's memory and are
    # copied to the device chunk by chunk in each step; results and checkpoints are the same
    optimizer: Literal["adamw", "adamw_swap"] = "adamw"
    lr: PositiveFloat = 1e-5  # peak learning rate
    min_lr: NonNegativeFloat = 0.0  # learning rate at the end of the decay
    # factors of the learning rate, of min_lr too, for parts named as in model.freeze; of several
    # that name a parameter the last counts: {model.visual: 0.1, model.visual.merger: 1}
    lr_by_module: Mapping[str, PositiveFloat] = field(default_factory=dict)
    # shape of the decay from lr to min_lr after the warm-up; constant: no decay
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_ratio: Fraction = 0.1  # share of the run's steps over which the learning rate rises to lr
    weight_decay: NonNegativeFloat = 0.0  # AdamW's weight decay of matrices; vectors (norms, biases, gates) never decay
    adam_beta1: Fraction = 0.9  # AdamW's decay rate of the first moment
    adam_beta2: Fraction = 0.95  # AdamW's decay rate of the second moment
    adam_eps: PositiveFloat = 1e-8  # AdamW's epsilon
    clip_grad: NonNegativeFloat = 1.0  # largest global gradient norm; 0: no clipping
    # NEFTune: noise on the embeddings of text in training, uniform up to this / sqrt(tokens of the
    # sample x hidden size), e.g. 5; default: none
    neftune_noise_alpha: PositiveFloat | None = None
    dtype: Dtype = "bf16"  # of the arithmetic, also bfloat16, float32; weights, gradient sums, optimizer stay in fp32
    seed: NonNegativeInt = 42  # seed of the order of the data and of all random numbers
    deterministic: StrictBool = False  # make every step repeatable bit for bit, which is slower on an NPU
    log_interval: PositiveInt = 1  # steps between log lines; a run that is asked to stop does so at the next one
    # bf16 peak of one device, to log model FLOPs utilization (mfu); default: no mfu
    peak_tflops: PositiveFloat | None = None
    save_interval: PositiveInt | None = None  # steps between checkpoints; default: one at the end
    # number of checkpoints to keep, the newest; older ones are removed once a new one is complete,
    # but not release/ nor one that is being read; default: all
    save_total_limit: PositiveInt | None = None
    # beside those of save_total_limit keep the checkpoint with the best validation, by val_loss or
    # val_exact_match: a validation that is better than all before is saved too, whatever
    # save_interval says, and named in best_checkpointed_iteration.txt; default: none
    save_best: Literal["loss", "exact_match"] | None = None
    # with expert parallelism: where a layer's busiest rank has computed more than this times the
    # mean of all since the last save, a save moves experts to other ranks, e.g. 1.2; default: never
    expert_balance: Annotated[Float, Field(gt=1)] | None = None
    # write checkpoints in the background, from a copy of each rank's part in the host's memory;
    # false: training waits until they are written
    async_save: StrictBool = True
    # experiment trackers that get the metrics, samples and answers, on rank 0; each reads its own
    # environment variables (WANDB_MODE, SWANLAB_API_KEY, MLFLOW_TRACKING_URI, …)
    report_to: tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow"], ...] = ()
    # steps between validations on data.val_dataset_param, with one after the last; default: none
    val_interval: PositiveInt | None = None
    # end the run after so many validations in a row that are not better than the best one, by the
    # figure of save_best, else by val_loss; default: none
    early_stopping_patience: PositiveInt | None = None
    # also have the model answer the validation records, and log the share of exact matches; each
    # device then holds an unsharded copy of the model during validation
    val_generate: StrictBool = False
    load: str | None = None  # DCP folder with the initial weights: converted, or another run's save folder
    init_from_hf_path: str | None = None  # Hugging Face folder with the initial weights, instead of load
    init_model_with_meta_device: StrictBool = True  # no rank holds the whole model; false: build it whole, then shard
    # seconds without progress after which a rank counts as hung and the job is ended; steps, saves,
    # each record that is read and each part of the weights that is loaded are progress
    timeout: Annotated[Float, Field(gt=0, le=31_536_000)] = 1800.0
    # how often a job is restarted from its newest checkpoint after a failure that may pass (a dead
    # process, a lost node); mistakes in settings or data are never retried
    max_restarts: NonNegativeInt = 0
    # steps for which the gradient of a trained group, or of an adapter, may be exactly zero before
    # the run stops
    zero_grad_patience: PositiveInt = 5
    # adapters (LoRA), trained instead of all weights; default: none, as with `enable: false` in it
    lora: LoraSettings | None = None
    dpo: DpoSettings = DpoSettings()  # direct preference optimization
    profile: ProfileSettings = ProfileSettings()


@with_config(ConfigDict(extra="forbid", allow_inf_nan=False))  # and for the sections below
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
        """The settings with the validation set in place of the training set; None without one."""
        val = self.data.val_dataset_param
        return replace(self, data=replace(self.data, dataset_param=val)) if val else None
