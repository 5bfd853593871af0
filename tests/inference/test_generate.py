"""Generation with a cache equals that without, packed or alone, and transformers'."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from peer import config_dict, continued, pair, peer_inputs, sample
from PIL import Image

from qwen35.batch import IGNORE, PackedBatch, derive
from qwen35.checkpoint import load_pretrained
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data import Record
from qwen35.data.collator import prompt_batch, vision_spec
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.preparation import Preparation
from qwen35.data.record import Turn
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VideoProcessor
from qwen35.inference import evaluate, predict
from qwen35.inference.generate import generate as greedy
from qwen35.inference.generate import stop_ids
from qwen35.model import Qwen35
from qwen35.tools import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.make_model(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Qwen35:
    return load_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder) -> ChatTokenizer:
    return ChatTokenizer(folder)


@pytest.fixture(scope="module")
def prompts(folder, tokenizer, tmp_path_factory) -> list[PackedBatch]:
    """Two images of different sizes, none, one, none."""
    images = tmp_path_factory.mktemp("images")
    for i, (width, height) in enumerate([(64, 96), (40, 30), (32, 64)]):
        pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(images / f"{i}.png")
    paths = [images / f"{i}.png" for i in range(3)]
    images = ImageProcessor.from_folder(folder, 1024, 65536)
    videos = VideoProcessor.from_folder(folder, PreprocessParameters())
    preparation = Preparation(tokenizer, images, BasicParameters("none"), Attr(), videos)
    records = [
        Record("a", (Turn("user", (paths[0], "and ", paths[1], "\nWhich digit is this?")),)),
        Record("b", (Turn("user", "Hello!"),)),
        Record("c", (Turn("system", "Be brief."), Turn("user", (paths[2], "?")), Turn("assistant", "left out"))),
        Record("d", (Turn("user", "Hello"), Turn("assistant", "What?"), Turn("user", "Hello again, " * 20))),
    ]
    return [prompt_batch(record, preparation, vision_spec(folder), thinking=False) for record in records]


@pytest.fixture(scope="module")
def alone(model, prompts) -> list[list[int]]:
    return [greedy(model, [prompt], 8, ())[0] for prompt in prompts]


def test_packed_prompts_equal_single_ones(model, prompts, alone):
    assert all(len(answer) == 8 for answer in alone)
    assert len({tuple(answer) for answer in alone}) == 4
    assert greedy(model, prompts, 8, ()) == alone
    assert greedy(model, prompts[::-1], 8, ()) == alone[::-1]


def uncached(model: Qwen35, text: PackedBatch, count: int) -> list[int]:
    """Greedy decoding that runs the whole text again for each token."""
    text, start = derive(text, model.config.vision_spec), len(text.input_ids)
    for _ in range(count):
        with torch.no_grad():
            token = model.logits(text)[-1].argmax()
        text = dataclasses.replace(
            text,
            input_ids=torch.cat([text.input_ids, token[None]]),
            labels=torch.cat([text.labels, torch.tensor([IGNORE])]),
            position_ids=torch.cat([text.position_ids, (text.position_ids.max() + 1).expand(3, 1)], dim=1),
            cu_seqlens=text.cu_seqlens + torch.tensor([0, 1]),
            vision_index=torch.cat(
                [text.vision_index, torch.tensor([-1])]
            ),  # an image's token, if new, is one by name alone
        )
    return text.input_ids[start:].tolist()


ASKED = {  # prompts of one token, below, at and beyond a chunk of 64, with one image, with several
    "text": [sample([n], seed=n) for n in (1, 3, 63, 64, 65)],
    "image": [sample([6, (4, 6), 5], seed=6)],
    "images": [sample([5, (4, 4), 3, (2, 6), 7], seed=7), sample([(6, 4)], seed=8), sample([70], seed=9)],
    "video": [sample([4, (3, 4, 6), 8], seed=10)],
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(("tied", "heads"), [(False, (2, 2)), (True, (2, 4)), (False, (1, 3))], ids=str)
def test_greedy_equals_itself_without_a_cache_and_transformers(asked, moe, tied, heads):
    check_greedy(ASKED[asked], 8, moe=moe, tied=tied, key_heads=heads[0], value_heads=heads[1])


def test_a_long_answer_equals_itself_without_a_cache():
    """One crosses two chunks of 64, the other one."""
    check_greedy([sample([40, (4, 4), 3], seed=11), sample([2], seed=12)], 90)


@functools.cache
def talkative_pair(**config) -> tuple[Qwen35, torch.nn.Module]:
    ours, theirs = pair(config_dict(**config))
    for model in (ours, theirs):  # else a tied model repeats the last token
        model.model.language_model.embed_tokens.weight.data.mul_(0.1)
    return ours, theirs


def check_greedy(prompts: list[PackedBatch], count: int, **config) -> None:
    ours, theirs = talkative_pair(**config)
    answers = greedy(ours, prompts, count, ())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(set(answer)) > 4
        assert answer == continued(theirs, peer_inputs(prompt), count)
        assert answer == uncached(ours, prompt, count)


def test_answers_equal_transformers(folder, model, prompts, tokenizer):
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    stop = stop_ids(folder, tokenizer)
    for prompt, ours in zip(prompts, greedy(model, prompts, 8, stop), strict=True):
        ids = prompt.input_ids[None]
        is_image = ids == tokenizer.image_id
        images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.grid_thw} if is_image.any() else {}
        kinds = is_image.int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **images}
        assert [token for token in continued(theirs, inputs, 8) if token not in stop] == ours


def test_each_prompt_stops_on_its_own(model, prompts, alone):
    end = alone[0][3]
    stopped = greedy(model, prompts, 8, {end})
    for whole, cut in zip(alone, stopped, strict=True):
        assert cut == (whole[: whole.index(end)] if end in whole else whole)
    assert len(stopped[0]) < 8
    assert greedy(model, prompts, 0, ()) == [[], [], [], []]
    assert greedy(model, [], 8, ()) == []


def test_only_last_tokens_get_logits(model, prompts, alone, monkeypatch):
    """No [T, V] logits: with a real vocabulary they would be the largest tensor."""
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.append((a.shape, b.shape)), matmul(a, b))[1])
    greedy(model, prompts, 1, ())
    vocabulary = model.head_weight.shape[0]
    assert [a[0] for a, b in seen if b[-1] == vocabulary] == [len(prompts)]


def test_answers_end_at_every_token_that_the_folder_names(folder, tokenizer, tmp_path):
    im_end, endoftext = tokenizer.im_end_id, tokenizer.pad_id
    assert stop_ids(folder, tokenizer) == {im_end, endoftext}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 5}}))
    assert stop_ids(tmp_path, tokenizer) == {im_end, endoftext, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert stop_ids(tmp_path, tokenizer) == {im_end, endoftext, 5, 6, 7}


@pytest.fixture
def records(folder, model, tokenizer, tmp_path, monkeypatch) -> Path:
    """Three records with the model's own answers, the first after a thought, and one other.

    A random model ends no answer, so what it says as the fifth token ends it.
    """
    questions = ["Which digit is this?", "Hello!", "Is this the user?", "What?"]
    images = ImageProcessor.from_folder(folder, 1024, 65536)
    videos = VideoProcessor.from_folder(folder, PreprocessParameters())
    preparation = Preparation(tokenizer, images, BasicParameters("none"), Attr(), videos)
    asked = [
        prompt_batch(Record("", (Turn("user", q),)), preparation, vision_spec(folder), thinking=False)
        for q in questions
    ]
    ends = {ids[-1] for ids in greedy(model, asked, 5, stop_ids(folder, tokenizer))}
    given = [tokenizer.decode(ids) for ids in greedy(model, asked, 5, ends)]
    wanted = [f"<think>\nwhy\n</think>\n\n{given[0]}", given[1], given[2] + " not", given[3]]
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(questions, wanted, strict=True)
    ]
    monkeypatch.setattr(predict, "stop_ids", lambda *_: ends)
    monkeypatch.setattr(predict.models, "load_model", lambda _: model)  # in fp32: no answer hangs on a rounding
    file = tmp_path / "records.json"
    file.write_text(json.dumps([{"id": f"r{i}", "messages": t} for i, t in enumerate(turns)]))
    return file


@pytest.mark.parametrize("batch", ["1", "3"])
def test_evaluation_ends_with_the_accuracy(folder, records, batch, capsys):
    arguments = ["--model", str(folder), "--data", str(records), "--batch", batch, "--max_new_tokens", "8"]
    arguments.append("--no_thinking")
    assert evaluate.main(arguments) == 0
    assert capsys.readouterr().out == "held-out accuracy 0.750 (3/4)\n"
    assert evaluate.main([*arguments, "--show"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert last == "held-out accuracy 0.750 (3/4)"
    assert "record 3 (id r2)" in "\n".join(shown) and "r1" not in "\n".join(shown)


def test_an_accuracy_of_zero_is_no_error(folder, records, capsys):
    data = json.loads(records.read_text())
    for record in data:
        record["messages"][1]["content"] = "nothing the like"
    records.write_text(json.dumps(data))
    assert evaluate.main(["--model", str(folder), "--data", str(records)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "held-out accuracy 0.000 (0/4)"


def test_missing_files_are_named_in_one_line(folder, records, tmp_path, capsys):
    for model, data, named in (
        (tmp_path / "none", records, "none/tokenizer.json"),
        (folder, tmp_path / "absent.json", "absent.json"),
    ):
        assert evaluate.main(["--model", str(model), "--data", str(data)]) == 1
        error = capsys.readouterr().err
        assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_dummy_image_does_not_change_other_prompts(model, prompts, alone):
    """A text prompt's dummy image must not become the next prompt's image."""
    assert len(prompts[1].grid_thw) == 1  # so prompt_batch makes it
    bare = dataclasses.replace(
        prompts[1],
        pixel_values=prompts[1].pixel_values[:0],
        grid_thw=prompts[1].grid_thw[:0],
        vision=None,
        vision_index=None,
    )
    assert greedy(model, [bare, *prompts[2:]], 8, ()) == alone[1:]
    assert greedy(model, [prompts[1], *prompts[2:]], 8, ()) == alone[1:]
