"""Grounding records in ms-swift's form become the texts that its documentation gives for them.

The documentation has each record twice, with `objects` and written out for models that take
thousandths; the sizes of its images follow from the two. Here, too, both were written by hand.
"""

import json

import pytest
from mistakes import BASIC, SHOW, place, run, whole
from PIL import Image

from qwen35.config.schema import Attr
from qwen35.data.data_warnings import DataWarnings
from qwen35.data.formats import read_records
from qwen35.data.media import ImageFolder
from qwen35.data.record import RecordError, Turn

__all__ = ["place", "whole"]  # fixtures

SIZES = {"beach.png": (1500, 1800), "sheep.png": (900, 800), "screen.png": (2500, 2000), "wide.png": (1000, 10)}


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        Image.new("1", size).save(tmp_path / name)
    return tmp_path


def raw(question, answer, objects, *images, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), "objects": objects, **more}


def read(folder, *records, **attr):
    (folder / "x.json").write_text(json.dumps(records))
    return list(read_records(folder / "x.json", Attr(**attr), ImageFolder(folder)))


def texts(folder, record, **attr):
    (record,) = read(folder, record, **attr)
    return [turn.text for turn in record.turns]


DOG = {
    "ref": ["a dog", "a woman"],
    "bbox": [[331.5, 761.4, 853.5, 1594.8], [676.5, 685.8, 1099.5, 1427.4]],
}
SHEEP = {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]}
CHROME = {"ref": [], "bbox": [[615, 226]]}
DOCUMENTED = {  # ms-swift, Custom dataset, Grounding: the two forms of each of its three records
    "a description": (
        raw("<image>Describe the image.", "<ref-object><bbox> and <ref-object><bbox> are playing", DOG, "beach.png"),
        [
            "Describe the image.",
            (
                "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(221,423),(569,886)<|box_end|> and "
                "<|object_ref_start|>a woman<|object_ref_end|><|box_start|>(451,381),(733,793)<|box_end|> are playing"
            ),
        ],
    ),
    "a detection": (
        raw("<image>Find the <ref-object> in the image", "<bbox><bbox>", SHEEP, "sheep.png"),
        [
            "Find the <|object_ref_start|>sheep<|object_ref_end|> in the image",
            "<|box_start|>(101,201),(150,266)<|box_end|><|box_start|>(401,601),(550,666)<|box_end|>",
        ],
    ),
    "a point": (
        raw("<image>Help me open Google Chrome", "Action: click(start_box='<bbox>')", CHROME, "screen.png"),
        ["Help me open Google Chrome", "Action: click(start_box='<|box_start|>(246,113)<|box_end|>')"],
    ),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_records(folder, name):
    record, wanted = DOCUMENTED[name]
    assert texts(folder, record) == wanted
    assert texts(folder, record, bbox_format="legacy") == wanted


NEW = raw(
    "<image>Locate the <ref-object> in the image",
    '[\n\t{"bbox_2d": <bbox>, "label": "<ref-object>"},\n\t{"bbox_2d": <bbox>, "label": "<ref-object>"}\n]',
    SHEEP | {"ref": ["sheep"] * 3},
    "sheep.png",
)


def test_the_form_of_the_models_own_answers(folder):
    question, answer = texts(folder, NEW, bbox_format="new")
    assert question == "Locate the sheep in the image"
    assert json.loads(answer) == [
        {"bbox_2d": [101, 201, 150, 266], "label": "sheep"},
        {"bbox_2d": [401, 601, 550, 666], "label": "sheep"},
    ]
    assert '{"bbox_2d": [101, 201, 150, 266], "label": "sheep"},\n\t' in answer
    assert texts(folder, DOCUMENTED["a point"][0], bbox_format="new")[1] == "Action: click(start_box='[246, 113]')"
    with pytest.raises(RecordError, match=r'record 1, objects: "bbox_2d": <bbox> in a text .*attr\.bbox_format: new$'):
        texts(folder, NEW)


def test_boxes_of_several_images_and_relative_boxes(folder):
    boxes = {"ref": [], "bbox": [[250, 5, 1000, 10], [90, 80, 900, 800]]}
    record = raw("<image><image>Where?", "<bbox> <bbox>", boxes | {"image_id": [1, 0]}, "sheep.png", "wide.png")
    assert texts(folder, record, bbox_format="new")[1] == "[250, 500, 1000, 1000] [100, 100, 1000, 1000]"
    record["objects"]["image_id"] = []
    with pytest.raises(RecordError, match=r"objects\.bbox\[0\]: .* lies outside of its image of 900 x 800 pixels"):
        texts(folder, record)
    relative = {"ref": None, "bbox": [[0, 0.0124, 0.5, 1]], "bbox_type": "norm1"}
    assert texts(folder, raw("<image>Where?", "<bbox>", relative, "wide.png"), bbox_format="new")[1] == (
        "[0, 12, 500, 1000]"
    )


def test_boxes_follow_the_image_that_the_model_sees(folder):
    """An image that its EXIF data turns is seen upright, whatever its size becomes."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("L", (40, 80)).save(folder / "turned.jpg", exif=exif)
    record = raw("<image>Where?", "<bbox>", {"bbox": [[40, 10, 80, 40]]}, "turned.jpg")
    assert texts(folder, record, bbox_format="new")[1] == "[500, 250, 1000, 1000]"


def test_placeholders_stand_in_any_text(folder):
    """In thoughts, items of contents, system prompts; they are text in a record without objects."""
    items = [{"type": "image", "image": "sheep.png"}, {"type": "text", "text": "The <ref-object> at <bbox>?"}]
    turns = [
        {"role": "system", "content": "Of <ref-object>."},
        {"role": "user", "content": items},
        {"role": "assistant", "reasoning_content": "<bbox>?", "content": "<bbox>!", "loss_mask": 1},
    ]
    objects = {"ref": ["animals", "sheep"], "bbox": [[9, 8], [18, 16], [27, 24]]}
    (record,) = read(folder, {"messages": turns, "objects": objects}, bbox_format="new")
    assert record.turns == (
        Turn("system", "Of animals."),
        Turn("user", (folder / "sheep.png", "The sheep at [10, 10]?")),
        Turn("assistant", "[30, 30]!", reasoning="[20, 20]?", loss=True),
    )
    plain = raw("What is <bbox>?", "A tag.", None)
    assert texts(folder, plain) == ["What is <bbox>?", "A tag."]


def told(folder, *records, **attr):
    """What the start of a run says about the records."""
    (folder / "x.json").write_text(json.dumps(records))
    warnings = DataWarnings()
    assert list(read_records(folder / "x.json", Attr(**attr), ImageFolder(folder), warnings=warnings))
    return [line.partition("; first: ")[0] for line in warnings.lines()]


def test_which_form_boxes_are_written_in_is_told(folder):
    """A file's own attr, an evaluation and a validation may each have another than was meant."""
    record = DOCUMENTED["a point"][0]
    for form, given in (("legacy", {}), ("new", {"bbox_format": "new"})):
        lines = told(folder, record, {"messages": raw("A", "B", None)["messages"]}, record, **given)
        assert lines == [f"2 records have boxes in objects, written as attr.bbox_format: {form} has them"]


def test_placeholders_without_objects_are_told(folder):
    called = {"function": {"name": "click", "arguments": {"at": ["<bbox>"]}}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "<ref-object>"}]},
        {"role": "assistant", "content": "<bbox><bbox>", "reasoning_content": "<bbox>?", "tool_calls": [called]},
    ]
    empty = raw("<image>A <bbox>", "B", {"ref": [], "bbox": []}, "sheep.png")
    lines = told(folder, {"messages": turns}, empty, raw("A", "B", None))
    assert lines == ["6 placeholders (<bbox>, <ref-object>) are kept as text, in records without objects"]


@pytest.mark.parametrize(
    ("text", "is_told"),
    [
        ('[{"bbox_2d": [1200, 300, 2400, 1800], "label": "x"}]', True),
        ('{"point_2d":[3, 1001]}', True),
        ('"bbox_2d": [[3, 4], [5, 2000.5]]', True),
        ("<|box_start|>(1,2),(1778, 3)<|box_end|>", True),
        ('[{"bbox_2d": [0, 1000, 999, 1000.0], "label": "1200 x"}]', False),
        ("<|box_start|>(101,201)<|box_end|> in 1999", False),
        ("[1200, 300, 2400, 1800]", False),
    ],
)
def test_boxes_in_pixels_are_told(folder, text, is_told):
    """Qwen2.5-VL's own: Qwen3-VL's and its successors' end at 1000, whatever the image's size."""
    record = raw("<image>Where?", text, None, "screen.png")
    lines = told(folder, record)
    assert bool(lines) == is_told
    assert not lines or lines[0].startswith("1 turn has boxes with numbers above 1000: pixels, it seems, where")


def wrong(question="<image>Where?", answer="<bbox>", images=("sheep.png",), **objects):
    return raw(question, answer, {"bbox": [[1, 2, 3, 4]]} | objects, *images)


WRONG = {
    "more tags": (wrong(answer="<bbox><bbox>"), r"objects\.bbox: has 1, but 2 <bbox> stand in the turns"),
    "more boxes": (wrong(bbox=[[1, 2]] * 3), r"objects\.bbox: has 3, but 1 <bbox>"),
    "more names": (wrong(ref=["a"]), r"objects\.ref: has 1, but 0 <ref-object>"),
    "unknown key": (wrong(boxes=[1]), r"objects: has 'boxes', which is not read; it may have ref, bbox, image_id, bbox_type"),
    "a list": (raw("<image>A", "B", [1], "sheep.png"), r"objects: is a list, not an object with ref and bbox"),
    "ref is text": (wrong(ref="a"), r"objects\.ref: is text, not a list"),
    "ref of numbers": (wrong("<image><ref-object>", ref=[3]), r"objects\.ref\[0\]: is a number, not text"),
    "box is text": (wrong(bbox=["1,2"]), r"objects\.bbox\[0\]: is text, not a list of numbers"),
    "box of texts": (wrong(bbox=[["1", "2"]]), r"objects\.bbox\[0\]: is a list, not a list of numbers"),
    "three numbers": (wrong(bbox=[[1, 2, 3]]), r"objects\.bbox\[0\]: \[1, 2, 3\] is neither a point x, y nor two corners"),
    "left": (wrong(bbox=[[5, 2, 3, 4]]), r"bbox\[0\]: \[5, 2, 3, 4\]: its second corner is left of the first or above"),
    "above": (wrong(bbox=[[1, 5, 3, 4]]), r"bbox\[0\]: \[1, 5, 3, 4\]: its second corner is left of the first or above"),
    "outside": (wrong(bbox=[[1, 2, 901, 4]]), r"bbox\[0\]: \[1, 2, 901, 4\] lies outside of its image of 900 x 800 pixels"),
    "negative": (wrong(bbox=[[-1, 2]]), r"bbox\[0\]: \[-1, 2\] lies outside of its image"),
    "relative": (wrong(bbox=[[0.1, 0.2, 0.3, 1]]), r"lies within one pixel of its image.*; relative boxes have"),
    "not relative": (wrong(bbox_type="norm1"), r"bbox\[0\]: \[1, 2, 3, 4\] lies outside of 0\.\.1"),
    "type": (wrong(bbox_type="norm1000"), r"objects\.bbox_type: 'norm1000' is neither real nor norm1"),
    "ids": (wrong(image_id=[0, 0]), r"objects\.image_id: is not a list of 1 number, one for each box"),
    "id": (wrong(image_id=[1]), r"objects: a box is in image 1, from 0, of a record with 1 image"),
    "no image": (wrong("Where?", images=()), r"objects: a box is in image 0, from 0, of a record with 0 images"),
    "no file": (wrong(images=["gone.png"]), r"objects: image .*gone\.png: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_objects_are_one_line(folder, name):
    record, message = WRONG[name]
    with pytest.raises(RecordError, match=rf"x\.json, record 2, .*{message}") as caught:
        read(folder, DOCUMENTED["a point"][0], record)
    assert "\n" not in str(caught.value)
    if name == "no file":  # so that the cache is outdated once it is there
        assert (caught.value.kind, caught.value.image) == ("image missing", str(folder / "gone.png"))


def test_objects_can_be_ignored_and_lie_around_other_fields(folder):
    record = raw("Hi <bbox>", "Yo", {"mystery": 1})
    assert texts(folder, record, ignore=("objects",)) == ["Hi <bbox>", "Yo"]
    turns = record.pop("messages")
    assert texts(folder, record | {"objects": {"turns": turns}}, messages="objects.turns") == ["Hi <bbox>", "Yo"]


def test_show_prints_boxes_as_they_are_trained(place):
    Image.new("L", (200, 50)).save(place / "data/box.png")
    record = raw("<image>Find <ref-object>", "It is <bbox>.", {"ref": ["it"], "bbox": [[20, 10, 100, 50]]}, "box.png")
    (place / "data/g.json").write_text(json.dumps([record]))
    done = run(place, *SHOW, f"{BASIC}.dataset=data/g.json")
    assert done.code == 0, done.err
    assert "Find <|object_ref_start|>it<|object_ref_end|><|im_end|>" in done.out
    assert "It is <|box_start|>(100,200),(500,1000)<|box_end|>.<|im_end|>" in done.out
    done = run(place, *SHOW, f"{BASIC}.dataset=data/g.json", "data.dataset_param.attr.bbox_format=new")
    assert "Find it<|im_end|>" in done.out and "It is [100, 200, 500, 1000].<|im_end|>" in done.out
    record["objects"]["bbox"] = [[20, 10, 100, 51]]
    (place / "data/g.json").write_text(json.dumps([record]))
    done = run(place, *SHOW, f"{BASIC}.dataset=data/g.json")
    assert (
        done.code in (1, 2)
        and done.err.count("\n") == 1
        and "[20, 10, 100, 51] lies outside of its image of 200 x 50 pixels" in done.err
    )
