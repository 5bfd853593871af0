"""Mistakes in records and images: one line that names file, record and field."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from mistakes import (
    BASIC,
    DATA,
    EVALUATE,
    SHOW,
    TRAIN,
    Break,
    Case,
    becomes_folder,
    both,
    check,
    parametrized,
    place,
    record,
    remove,
    turns,
    whole,
    write,
)
from PIL import Image

__all__ = ["place", "whole"]  # fixtures

FILE, SECOND = "data/a.json", "data/a.json, record 2 (id r1)"
ASKED = ("human", "<image>")
DPO = "training.stage=dpo"


def linked(name: str, target: str):
    return lambda place: ((place / name).unlink(missing_ok=True), (place / name).symlink_to(target))


def a_pipe(place: Path) -> None:
    (place / "data/1.png").unlink()
    os.mkfifo(place / "data/1.png")


def narrow(place: Path) -> None:
    Image.new("L", (1, 300)).save(place / "data/1.png")


def as_lines(place: Path) -> None:
    """Writes JSON lines, of which the second is cut off."""
    lines = [json.dumps(entry) for entry in json.loads((place / FILE).read_text())]
    (place / FILE).write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))


def in_all(change: Callable[[int, dict], object]) -> Break:
    """Changes each record, by its number."""

    def break_(place: Path) -> None:
        records = json.loads((place / FILE).read_text())
        for i, raw in enumerate(records):
            change(i, raw)
        (place / FILE).write_text(json.dumps(records))

    return break_


def a_comma_too_many(place: Path) -> None:
    """Puts a comma after the last record."""
    text = (place / FILE).read_text()
    (place / FILE).write_text(f"{text[:-1]},]")


only_tools = turns(("human", "<tool_response><image></tool_response>"), ("gpt", "x"))

FILES = [
    Case("no file", (*TRAIN, f"{BASIC}.dataset=no.json"), (f"{BASIC}.dataset: no.json: no such file below",)),
    Case("folder", (*TRAIN, f"{BASIC}.dataset=data"), (f"{BASIC}.dataset: data: is a folder; name the files",)),
    Case("one of two", (*SHOW, f"{BASIC}.dataset=data/a.json,b.json"), ("b.json: no such file",)),
    Case("link to itself", TRAIN, ("data/a.json: no such file",), linked(FILE, "a.json")),
    Case("empty file", TRAIN, ("data/a.json: is empty",), write(FILE, "")),
    Case("empty list", SHOW, ("data/a.json: no records",), write(FILE, "[]")),
    Case("nothing to evaluate", EVALUATE, ("data/a.json: no records",), write(FILE, "[]")),
    Case("nothing to convert", DATA, ("data/a.json: no records",), write(FILE, "[]")),
    Case("prose", TRAIN, ("data/a.json, record 1: not JSON",), write(FILE, "Once upon a time")),
    Case("half a list", DATA, ("data/a.json: not JSON", "at line 1, column 10, after 0"), write(FILE, '[{"id": 1')),
    Case("comma too many", TRAIN, ("data/a.json: not JSON", "after 12 records"), a_comma_too_many),
    Case("half a line", TRAIN, ("data/a.json, record 2: not JSON", "column"), as_lines),
    Case("UTF-16", TRAIN, ("data/a.json: not UTF-8 text", "at byte 0"), write(FILE, "[]".encode("utf-16"))),
    Case("very deep", SHOW, ("data/a.json: JSON that cannot be read",), write(FILE, "[" * 100_000)),
    Case("not records", TRAIN, ("data/a.json, record 1: is a number, not an object",), write(FILE, "[1, 2]")),
    Case("archive", TRAIN, ("data/a.json: is compressed; unpack it first",), write(FILE, "PK\3\4 and so on")),
    Case("table", DATA, ("data/a.json, record 1: not JSON", "expected a JSON list, one"), write(FILE, "a,b\n1,2\n")),
    Case(
        "name that no record has",
        (*TRAIN, "data.dataset_param.attr.images=photo"),
        ("data.dataset_param.attr.images: no record of data/a.json has a field 'photo'; they have 'id', ",),
    ),
    Case(
        "preference pair",
        DATA,
        (f"{SECOND}: has chosen, which is not read; training.stage: dpo learns",),
        both(record(chosen="a"), record(rejected="b")),
    ),
    Case(
        "pair without a side",
        (*TRAIN, DPO),
        (f"{SECOND}: has no rejected answer in rejected or ", "training.stage: dpo learns from pairs; it has 'id', "),
        in_all(lambda i, raw: raw.update({"rejected_response": "No."} if i != 1 else {})),
    ),
    Case(
        "pair of equal answers",
        (*SHOW, DPO),
        (
            f"{SECOND}: its two answers are equal as they are trained; leave the pair out; on_bad_record: skip leaves such",
        ),
        in_all(lambda i, raw: raw.update(rejected_response="It is 1." if i == 1 else "No.")),
    ),
    Case(
        "pair that is cut",
        (*TRAIN, DPO, f"{BASIC}.truncation=truncate"),
        (f"{BASIC}.truncation: truncate would cut answers that are compared; use drop or error",),
    ),
    Case("no dataset_dir", (*TRAIN, f"{BASIC}.dataset_dir=pics"), ("dataset_dir: pics: no such folder",)),
    Case("file for a folder", (*TRAIN, f"{BASIC}.dataset_dir=r.yaml"), ("dataset_dir: r.yaml: no such folder",)),
    Case("file for a cache", (*TRAIN, f"{BASIC}.cache_dir=r.yaml"), (f"{BASIC}.cache_dir: r.yaml: Not a directory",)),
]
TURNS = [
    Case("no turns", TRAIN, (f"{SECOND}, conversations: is empty",), record(conversations=[])),
    Case(
        "no conversation",
        TRAIN,
        (f"{SECOND}: has no field messages or conversations", "in attr.messages"),
        record(conversations=None),
    ),
    Case(
        "frames that are not one video",
        TRAIN,
        (
            f"{SECOND}, conversations: 1 <video> in the user and tool turns, but 2 videos; write the frames of one video",
        ),
        both(turns(("human", "<image><video>"), ("gpt", "x")), record(video=["1.png", "1.png"])),
    ),
    Case("text for turns", SHOW, (f"{SECOND}, conversations: is text, not a list",), record(conversations="Hi")),
    Case("answer first", TRAIN, (f"{SECOND}, conversations[0]: assistant turn where",), turns(("gpt", "x"), ASKED)),
    Case("twice the user", TRAIN, (f"{SECOND}, conversations[1]: user turn where",), turns(ASKED, ASKED)),
    Case("no answer", TRAIN, (f"{SECOND}, conversations[0]: ends with a user turn",), turns(ASKED)),
    Case(
        "unknown role",
        TRAIN,
        (f"{SECOND}, conversations[1].from: 'bot' is not one of user", "; name other roles in attr"),
        turns(ASKED, ("bot", "x")),
    ),
    Case(
        "no text", TRAIN, (f"{SECOND}, conversations[1]: has no text in content or value",), turns(ASKED, ("gpt", None))
    ),
    Case("number for a text", EVALUATE, (f"{SECOND}, conversations[1].value: is a number",), turns(ASKED, ("gpt", 7))),
    Case(
        "half a character", TRAIN, (f"{SECOND}, conversations[1].value: half a surr",), turns(ASKED, ("gpt", "\ud800"))
    ),
    Case("field that is not read", TRAIN, (f"{SECOND}: has audio, which is not read",), record(audio="a.wav")),
    Case(
        "two kinds of turns",
        TRAIN,
        (f"{SECOND}: has both messages and conversations",),
        record(messages=[{"role": "user"}]),
    ),
    Case("too long", TRAIN, (f"{SECOND}: ", "more than", "cutoff_len = 160"), turns(ASKED, ("gpt", "word " * 200))),
    Case(
        "only tools",
        (*TRAIN,),
        (f"{SECOND}: has no user question",),
        only_tools,
    ),
]
IMAGES = [
    Case(
        "no image",
        TRAIN,
        (
            f"{SECOND}: image 1 of 1",
            "data/1.png: no such file, dataset_dir is data; on_bad_record: skip leaves such records",
        ),
        remove("data/1.png"),
    ),
    Case(
        "no image to evaluate",
        EVALUATE,
        (f"{SECOND}: image 1 of 1", "data/1.png: no such file; --dataset_dir says where, now data\n"),
        remove("data/1.png"),
    ),
    Case(
        "text for an image to convert",
        DATA,
        ("data/1.png: is not an image; --on_bad_record skip leaves such records out",),
        write("data/1.png", "x"),
    ),
    Case(
        "no image to convert",
        DATA,
        ("data/a.json: 1 image not in data: 1.png", "--on_missing skip"),
        remove("data/1.png"),
    ),
    Case(
        "folder for an image",
        TRAIN,
        (f"{SECOND}: image 1 of 1", "data/1.png: is not a file"),
        becomes_folder("data/1.png"),
    ),
    Case("pipe for an image", SHOW, (f"{SECOND}: image 1 of 1", "data/1.png: is not a file"), a_pipe),
    Case(
        "text for an image", TRAIN, (f"{SECOND}: image 1 of 1", "data/1.png: is not an image"), write("data/1.png", "x")
    ),
    Case("empty image", EVALUATE, (f"{SECOND}: image 1 of 1", "data/1.png: is not an image"), write("data/1.png", "")),
    Case("narrow image", TRAIN, (f"{SECOND}: image 1 of 1", "is 1 x 300 pixels"), narrow),
    Case(
        "image above",
        TRAIN,
        (f"{SECOND}, image: '../r.yaml' lies outside dataset_dir data",),
        record(image="../r.yaml"),
    ),
    Case("image elsewhere", SHOW, (f"{SECOND}, image: '/etc/passwd' lies outside",), record(image="/etc/passwd")),
    Case("link out", TRAIN, (f"{SECOND}, image: '1.png' lies outside",), linked("data/1.png", "../r.yaml")),
    Case("number for an image", TRAIN, (f"{SECOND}, image: is a number, not a path",), record(image=1)),
    Case(
        "too few places",
        TRAIN,
        (f"{SECOND}, conversations: 1 <image>", "2 images"),
        record(image=["1.png"] * 2),
    ),
    Case(
        "too many places",
        TRAIN,
        (f"{SECOND}, conversations: 2 <image> in the", "1 image; one that is plain text belongs in a content list"),
        turns(("human", "<image><image>"), ("gpt", "x")),
    ),
    Case(
        "place in the answer",
        TRAIN,
        (f"{SECOND}, conversations: 1 image but no <image>",),
        turns(("human", "?"), ("gpt", "<image>")),
    ),
    Case("two fields of images", TRAIN, (f"{SECOND}: has both images and image",), record(images=["1.png"])),
]


@parametrized([*FILES, *TURNS, *IMAGES])
def test_one_line(place, case):
    check(place, case)
