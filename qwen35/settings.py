"""Every setting with its meaning and default. The paths are those of the seed's user guide.

Each field is read somewhere; config.py makes these from a recipe, and refuses a key that is not a field.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

TRAINED, HELD_OUT = "data.dataset_param", "data.val_dataset_param"  # the second is as the first where it says nothing


def of_held_out(words: str) -> str:
    """What names a setting of the records that are trained, with that of the validation set in its place."""
    return words.replace(TRAINED, HELD_OUT)


REQUIRED: Any = dataclasses.MISSING


# -- data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreprocessParameters:
    model_name_or_path: str | None = None  # folder of the tokenizer; default: model.model_name_or_path
    image_max_pixels: int = 262144  # larger images are scaled down to this many pixels
    image_min_pixels: int = 1024  # smaller ones are scaled up
    video_max_pixels: int = 65536  # of one frame: a video's frames are scaled down, all alike, to this many pixels each
    video_min_pixels: int = 1024  # or up
    video_fps: float = 2.0  # frames a second that are taken of a video; a list of frames without a rate has this one
    video_maxlen: int = 64  # most frames that are taken; of a longer video, evenly spaced ones


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
    # one file, or several separated by commas; or a list of names and of {file: …, weight: …}
    dataset: str | tuple[DatasetFile, ...] = REQUIRED
    dataset_dir: str = "."  # where the images of the records lie; none may lie outside
    cache_dir: str | None = None  # tokenised samples are kept here; default: not kept
    max_samples: int | None = None  # read only the first so many records
    cutoff_len: int = 2048  # tokens of one packed bin
    template: Literal["qwen3_vl_nothink", "qwen3_5"] = "qwen3_5"
    enable_thinking: bool | None = (
        None  # qwen3_5: True trains the thoughts, False drops them, None as the record has it
    )
    # what a special token that user, system or tools spell becomes: that token, as transformers and vLLM have it when the model
    # is asked; or the text of its characters. In answers it is a token; the template's control tokens are text everywhere
    special_tokens_in_prompts: Literal["tokens", "text"] = "tokens"
    train_on_prompt: bool = False  # the loss also counts what the user says
    mask_history: bool = False  # the loss counts only the last answer of a conversation
    # of a sample longer than cutoff_len: error as any record that cannot be used, drop leaves it out, truncate keeps its first
    # tokens, up to the last that is trained and never through an image or video; all counted
    truncation: Literal["error", "drop", "truncate"] = "error"
    on_bad_record: Literal["error", "skip"] = "error"  # that cannot be used: stop, or leave it out, counted and named


@dataclass(frozen=True)
class Attr:
    """The names of a record's fields, where they are not the usual ones (which are found by themselves).

    With dots for a field inside another: `dialog.turns`.
    """

    messages: str | None = None  # "messages", "conversations"
    images: str | None = None  # "images", "image"
    videos: str | None = None  # "videos", "video"
    tools: str | None = None  # "tools"
    system: str | None = None  # "system": the text of a system turn, beside the turns
    role_tag: str | None = None  # "role", "from"
    content_tag: str | None = None  # "content", "value"
    user_tag: str | None = None  # "user", "human"
    assistant_tag: str | None = None  # "assistant", "gpt"
    system_tag: str | None = None  # "system", "developer"
    observation_tag: str | None = None  # "tool", "observation": what a tool answered
    function_tag: str | None = None  # "function_call", "tool_call": the assistant's call of a tool
    ignore: tuple[str, ...] = ()  # fields that do not matter, although they look as if they did


@dataclass(frozen=True)
class DatasetParam:
    basic_parameters: BasicParameters
    preprocess_parameters: PreprocessParameters = PreprocessParameters()
    attr: Attr = Attr()


@dataclass(frozen=True)
class DataloaderParam:
    num_workers: int = 1  # processes a rank that decode and pack ahead of the training step; 0: none
    shuffle: bool = True  # a new order each epoch, from training.seed
    patch_bucket: int = 256  # a micro-batch's image patches are filled up to a multiple of this (shapes stay few)


@dataclass(frozen=True)
class DataSettings:
    dataset_param: DatasetParam
    # held-out records for training.val_interval; what is not given here is as in dataset_param, all but the dataset itself
    val_dataset_param: DatasetParam | None = None
    dataloader_param: DataloaderParam = DataloaderParam()


# -- model, parallel, training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCfg:
    loss_type: Literal["default", "per_sample_loss", "per_token_loss"] = "default"
    router_aux_loss_coef: float = 0.0  # weight of the experts' load-balancing loss


@dataclass(frozen=True)
class ModelSettings:
    model_name_or_path: str = REQUIRED  # folder with config.json (and the tokenizer)
    freeze: tuple[str, ...] = ()  # module names; `*` and `{*}` match one level: model.language_model.layers.{*}.mlp
    mtp_num_layers: int = (
        0  # 1: train multi-token prediction too, which looks one token further; 0: keep its weights as they are
    )
    mtp_loss_scaling_factor: float = 0.1  # weight of its loss
    loss_cfg: LossCfg = LossCfg()
    kernels: Mapping[str, str] = field(default_factory=dict)  # op -> implementation, see `python -m kernels`


@dataclass(frozen=True)
class ParallelSettings:
    fully_shard_parallel_size: int | None = None  # ranks that share one copy of the weights; default: all
    expert_parallel_size: int = 1  # of these, ranks that each hold some of the experts whole, and exchange tokens
    ulysses_parallel_size: int = 1  # ranks that share each bin: a part of the tokens each, in attention of the heads
    # keep only each layer's input for backward, and run the layer again; selective: keep what attention and delta rule return
    # too, so that these do not run again
    recompute: bool | Literal["selective"] = False
    activation_offload: bool = False  # what a layer keeps for backward lies in the host's memory meanwhile


@dataclass(frozen=True)
class ProfileSettings:
    """Some steps under the profiler of the device."""

    steps: int = 0  # how many; 0: none
    start: int = 3  # the first of them
    ranks: tuple[int, ...] = (0,)
    memory_snapshot: bool = False  # also what the device's memory holds, or on a CPU each allocation in the trace
    folder: str = "profile"  # below save


@dataclass(frozen=True)
class TrainingSettings:
    train_iters: int = REQUIRED
    save: str = REQUIRED  # folder that the run leaves behind
    micro_batch_size: int = 1  # bins of cutoff_len a rank and micro-step
    gradient_accumulation_steps: int = 1
    optimizer: Literal["adamw", "adamw_swap"] = "adamw"  # adamw_swap: its moments live in the host's memory
    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_ratio: float = 0.1  # of train_iters
    weight_decay: float = 0.0  # of matrices; vectors (norms, biases, gates) never decay
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # largest global gradient norm; 0: not clipped
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the arithmetic; weights, gradients' sums and optimizer are always fp32
    seed: int = 42
    deterministic: bool = False  # the same bits from the same step each time, on an NPU too: slower there
    log_interval: int = 1
    peak_tflops: float | None = None  # bf16 peak of one device, for the metric mfu; default: no mfu
    save_interval: int | None = None  # steps between checkpoints; default: only one at the end
    save_total_limit: int | None = None  # newest checkpoints that stay, once a newer one is whole; default: all
    async_save: bool = True  # write them while training goes on, from a copy in the host's memory
    val_interval: int | None = (
        None  # steps between validations on data.val_dataset_param, one more at the end; default: none
    )
    val_generate: bool = False  # have the model answer its records too, on a whole copy of it on each device
    load: str | None = None  # DCP folder: converted weights, or another run's save folder
    init_from_hf_path: str | None = None  # Hugging Face folder, read directly
    init_model_with_meta_device: bool = True  # no rank ever holds the whole model; False: build it whole, then shard
    timeout: float = 1800.0  # seconds that a rank may stand still, in a step or between steps, before the job is ended
    max_restarts: int = 0  # so often the ranks are started again, from the newest checkpoint, after a failure
    zero_grad_patience: int = 5  # steps that a trainable group may have a gradient of exactly zero
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
