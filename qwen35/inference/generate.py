"""Answers of a model to text, images and videos.

`python -m qwen35.inference.generate --model DIR [--image FILE …] --prompt TEXT`.

The prompts run once, packed on one token axis; each further step runs one token per sequence.
"""

import argparse
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from qwen35.batch import IGNORE, PackedBatch, VisionSpec, derive
from qwen35.config.load import SettingError
from qwen35.config.schema import BasicParameters
from qwen35.data import Record
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn, Video, with_visuals
from qwen35.data.style import thinks_by_default
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.errors import USER_ERRORS, Parser, complain
from qwen35.inference.generation_config import (
    FILE,
    SAMPLING_ONLY,
    add_sampling,
    read_generation_config,
    sampling_of,
    stop_ids,
)
from qwen35.inference.kv_cache import caching
from qwen35.inference.load_model import add_options, add_thinking, find_model, load_model, positive, prepare, tell_sizes
from qwen35.inference.sampling import Penalties, Sampling, draw
from qwen35.model import Qwen35
from qwen35.wording import number_of

GREEDY = Sampling()  # the likeliest token each time


def generate(
    model: Qwen35,
    prompts: Sequence[PackedBatch],
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """-> the new tokens of each prompt, up to one of eos_ids, which is left out, or max_new_tokens.

    prompts: one sequence each, on the host, from `qwen35.data.collator.prompt_batch`.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in steps(model, prompts, max_new_tokens, eos_ids, sampling):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


@torch.inference_mode()
def steps(
    model: Qwen35, prompts: Sequence[PackedBatch], max_new_tokens: int, eos_ids: Collection[int], sampling: Sampling
) -> Iterator[list[int | None]]:
    """Yields each step's new token of every prompt, None for those that have ended, until all have.

    The model can do nothing else until the iterator is exhausted or closed. Raises ValueError on a
    prompt without tokens.
    """
    if not all(len(prompt.input_ids) for prompt in prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue")
    if not prompts or max_new_tokens < 1:
        return
    head, going_on = model.head_weight, [True] * len(prompts)
    generators = sampling.generators(len(prompts))
    penalties = Penalties(sampling, [prompt.input_ids for prompt in prompts], len(head), head.device)
    with caching(model, max_new_tokens - 1):
        hidden, position = _run_prompts(model, prompts)
        for left in reversed(range(max_new_tokens)):
            tokens = draw(penalties.apply(hidden @ head.T), sampling, generators)  # [S]
            penalties.add(tokens)
            new = tokens.tolist()
            going_on = [going and token not in eos_ids for going, token in zip(going_on, new, strict=True)]
            if not any(going_on):
                return
            yield [token if going else None for going, token in zip(going_on, new, strict=True)]
            if left:  # ended sequences run along, so that shapes stay the same; their tokens are ignored
                hidden, position = _run_tokens(model, tokens, position), position + 1


def _run_prompts(model: Qwen35, prompts: Sequence[PackedBatch]) -> tuple[Tensor, Tensor]:
    """-> hidden [S, H] of each prompt's last token, and the next position [S] (largest + 1)."""
    spec, device = model.config.vision_spec, model.head_weight.device
    batch = pack([_without_dummy(prompt, spec) for prompt in prompts])
    last = (batch.cu_seqlens[1:] - 1).to(device)
    position = torch.stack([prompt.position_ids.max() + 1 for prompt in prompts]).to(device)
    return model(derive(batch, spec).to(device))[last], position


def _run_tokens(model: Qwen35, tokens: Tensor, position: Tensor) -> Tensor:
    """One token per sequence [S], at position [S] -> hidden [S, H]; runs no vision tower."""
    language_model, count = model.model.language_model, len(tokens)
    batch = PackedBatch(
        input_ids=tokens,
        labels=torch.full_like(tokens, IGNORE),
        position_ids=position.expand(3, -1),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
        pixel_values=torch.empty(0, 0),
        grid_thw=torch.empty(0, 3, dtype=torch.int64),
    )
    return language_model(language_model.embed_tokens(tokens), batch)[0]


def pack(sequences: Sequence[PackedBatch]) -> PackedBatch:
    """Concatenate batches without dummy images. The derived fields are left empty."""
    ends = torch.cat([s.cu_seqlens.diff() for s in sequences]).cumsum(0)
    return PackedBatch(
        input_ids=torch.cat([s.input_ids for s in sequences]),
        labels=torch.cat([s.labels for s in sequences]),
        position_ids=torch.cat([s.position_ids for s in sequences], dim=1),
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        pixel_values=torch.cat([s.pixel_values for s in sequences]),
        grid_thw=torch.cat([s.grid_thw for s in sequences]),
    )


def _without_dummy(prompt: PackedBatch, spec: VisionSpec | None) -> PackedBatch:
    """Keep the images that tokens refer to: a dummy would pass for the next prompt's image."""
    if spec is None:
        return prompt
    is_vision = (prompt.input_ids == spec.image_token_id) | (prompt.input_ids == spec.video_token_id)
    patches = int(is_vision.sum()) * spec.merge_size**2
    grids = prompt.grid_thw[prompt.grid_thw.prod(-1).cumsum(0) <= patches]
    images = replace(prompt, pixel_values=prompt.pixel_values[:patches], grid_thw=grids)
    return replace(images, vision=None, vision_index=None, vision_token=None)


# -- the command -----------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m qwen35.inference.generate", description=__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--prompt", help="the user's text, with `<image>` and `<video>` at their places; default: standard input")
    add("--image", nargs="+", action="extend", default=[], help="files; before the text if it has no `<image>`")
    frames = "one video: a file, a folder of frames, or its frames; before the text if it has no `<video>`"
    add("--video", nargs="+", action="append", default=[], help=frames)
    add("--system", help="system prompt; default: none")
    add("--max_new_tokens", type=positive, help=f"default: the model's {FILE}, else 512")
    add("--greedy", action="store_true", help=f"take the likeliest token even if the model's {FILE} samples")
    add_sampling(parser, "if its do_sample is true")
    add_thinking(parser, "as the run's or recipe's enable_thinking, else as the model's own template")
    return parser.parse_args(arguments)


def question(args: argparse.Namespace) -> Record:
    """The prompt as a record. Raises SettingError."""
    try:
        text = args.prompt
        if text is None:
            text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
        (text + (args.system or "")).encode()
    except UnicodeError:
        raise SettingError("the prompt is not UTF-8 text") from None
    if not text.strip():
        raise SettingError("the prompt is empty; give --prompt TEXT, or text on standard input (PROMPT='…' with make)")
    before = ""
    for kind, files, placeholder in (
        ("image", args.image, IMAGE_PLACEHOLDER),
        ("video", args.video, VIDEO_PLACEHOLDER),
    ):
        placeholders, count = text.count(placeholder), len(files)
        if not placeholders:
            before += placeholder * count
        elif placeholders != count:
            raise SettingError(f"{placeholders} {placeholder} in the prompt, but {number_of(count, kind)}")
    system = () if args.system is None else (Turn("system", args.system),)
    videos = (Video(Path(names[0]) if len(names) == 1 else tuple(map(Path, names))) for names in args.video)
    content = with_visuals(before + text, {IMAGE_PLACEHOLDER: map(Path, args.image), VIDEO_PLACEHOLDER: videos})
    return Record("the prompt", (*system, Turn("user", content)))


def is_thinking(asked: bool | None, basic: BasicParameters, tokenizer: Path) -> bool:
    """Whether the answer begins with an open thought. Raises SettingError."""
    if basic.template == "qwen3_vl_nothink":
        return False
    chosen = basic.enable_thinking if asked is None else asked
    return thinks_by_default(tokenizer) if chosen is None else chosen


def whole_characters(tokens: Iterable[int], tokenizer: ChatTokenizer) -> Iterator[str]:
    """Decode tokens one by one, without control tokens; characters of several tokens come whole."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, control=False)
        if not text.endswith("\ufffd"):
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending, control=False)


def write(pieces: Iterable[str]) -> None:
    """Print to standard output, each piece as it comes, into a pipe too."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        record = question(args)
        if args.greedy and args.temperature:
            raise SettingError("--greedy takes the likeliest token and --temperature samples; give one of them")
        source = find_model(args.model, args.hf)
        config = read_generation_config(source.config)
        sampling = sampling_of(args, config, drawn=not args.greedy)
        limit = args.max_new_tokens or config.get("max_new_tokens", 512)
        preparation = prepare(args, source)
        thinking = is_thinking(args.thinking, preparation.basic, source.tokenizer)
        prompt = prompt_batch(record, preparation, vision_spec(source.config), thinking)
        stop = stop_ids(source.config, preparation.tokenizer)
        model = load_model(source)
        tell_sizes(args, source, preparation, [record])
    except USER_ERRORS as error:
        return complain(error)
    opening = ["<think>\n"] if thinking else []  # the prompt opens the thought
    started, times = time.perf_counter(), []  # when each token came

    def timed() -> Iterator[int]:
        for (token,) in steps(model, [prompt], limit, stop, sampling):
            assert token is not None  # the only prompt has not ended
            times.append(time.perf_counter())
            yield token

    try:
        write(chain(opening, whole_characters(timed(), preparation.tokenizer)))
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print()
        return 130
    finished, is_cut = time.perf_counter(), len(times) == limit
    first = times[0] if times else finished
    decoding = f", decoding {(len(times) - is_cut) / (finished - first):.1f} tokens/s" if len(times) > is_cut else ""
    by_file = args.temperature is None and not args.greedy and config.keys() & {"do_sample", *SAMPLING_ONLY}
    origin = f" (by {FILE})" if by_file else ""
    truncation = f", cut at max_new_tokens {limit}" if is_cut else ""
    count = len(prompt.input_ids)
    prefill = f"prefill of {count} tokens {count / (first - started):.1f} tokens/s"
    print(
        f"{len(times)} tokens in {finished - started:.2f} s: {prefill}{decoding}, {sampling}{origin}{truncation}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
