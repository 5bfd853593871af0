"""processor_config.json of transformers 5 against the separate files: which one counts, and how."""

import json
import shutil

import numpy as np
import pytest
import torch
from peer import config_dict
from PIL import Image
from tokenizer_fixture import PUBLISHED, make_model_folder
from transformers import AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from bench.images import peer_processor
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.collator import check_agreement
from qwen35.data.files import ignored_sizes
from qwen35.data.image_processor import CONFIG as IMAGE_CONFIG
from qwen35.data.image_processor import ImageProcessor
from qwen35.data.preparation import Preparation
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_processor import VIDEO_CONFIG, VideoProcessor
from qwen35.errors import SettingError
from qwen35.model import load_config

IMAGE, VIDEO, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"
SETTINGS = PreprocessParameters()
FORMAT = ("patch", "temporal_patch", "merge", "mean", "std", "scale")


class Processor(Qwen3VLProcessor):
    """The real one without its check for torchvision, which saving does not need."""

    def check_argument_for_proper_class(self, *_):
        pass


def images_of(folder):
    return ImageProcessor.from_folder(folder, SETTINGS.image_min_pixels, SETTINGS.image_max_pixels)


def videos_of(folder):
    return VideoProcessor.from_folder(folder, SETTINGS)


def format_of(config):
    """The values of FORMAT in a config as transformers reads it."""
    names = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    patch, temporal, merge, mean, std = (config[name] for name in names)
    return patch, temporal, merge, tuple(mean), tuple(std), config.get("rescale_factor", 1 / 255)


def our_format(processor):
    return tuple(getattr(processor, name) for name in FORMAT)


@pytest.fixture(scope="module")
def separate(tmp_path_factory):
    """A model folder with two separate files, which differ in their std."""
    folder = make_model_folder(tmp_path_factory.mktemp("separate"))
    shutil.copy(PUBLISHED / IMAGE, folder)
    config = json.loads((PUBLISHED / IMAGE).read_text())
    del config["image_processor_type"]
    config |= {"video_processor_type": "Qwen3VLVideoProcessor", "image_std": [0.25, 0.5, 0.75]}
    (folder / VIDEO).write_text(json.dumps(config))
    tokens = json.loads((folder / "config.json").read_text())
    config = config_dict() | {name: value for name, value in tokens.items() if name.endswith("_id")}
    config["text_config"]["vocab_size"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def saved(separate, tmp_path):
    """The same saved by transformers: processor_config.json alone."""
    processor = Processor(
        image_processor=peer_processor(separate),
        tokenizer=AutoTokenizer.from_pretrained(separate),
        video_processor=Qwen3VLVideoProcessor.from_pretrained(separate),
    )
    processor.save_pretrained(tmp_path / "saved")
    shutil.copy(separate / "config.json", tmp_path / "saved")
    assert not (tmp_path / "saved" / IMAGE).exists() and not (tmp_path / "saved" / VIDEO).exists()
    return tmp_path / "saved"


def test_saved_processor_config_equals_the_separate_files(separate, saved):
    assert images_of(saved) == images_of(separate)
    assert videos_of(saved) == videos_of(separate)
    assert our_format(videos_of(saved)) != our_format(images_of(saved))
    rng = np.random.default_rng(1)
    file = saved / "image.png"
    Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(file)
    theirs = type(peer_processor(separate)).from_pretrained(saved, size={"shortest_edge": 1024, "longest_edge": 262144})
    pixels = theirs(images=Image.open(file), return_tensors="pt")["pixel_values"]
    assert torch.equal(images_of(saved).patches(file)[0], pixels)
    check_agreement(saved, saved, preparation(saved), load_config(saved).vision_spec)


def preparation(folder):
    return Preparation(ChatTokenizer(folder), images_of(folder), BasicParameters("x"), Attr(), videos_of(folder))


@pytest.mark.parametrize("sections", ["both", "image_processor", "video_processor", "neither", "null"])
@pytest.mark.parametrize("files", [(IMAGE, VIDEO), (IMAGE,)])
def test_precedence_of_files_is_that_of_transformers(separate, saved, sections, files):
    config = json.loads((saved / BOTH).read_text())
    for name in ("image_processor", "video_processor"):
        if sections == "null":
            config[name] = None
        elif sections not in ("both", name):
            del config[name]
        else:
            config[name]["patch_size"] = 8
    (saved / BOTH).write_text(json.dumps(config))
    for name in files:
        shutil.copy(separate / name, saved)
    images, _ = type(peer_processor(separate)).get_image_processor_dict(saved)
    videos, _ = Qwen3VLVideoProcessor.get_video_processor_dict(saved)
    assert our_format(images_of(saved)) == format_of(images)
    assert our_format(videos_of(saved)) == format_of(videos)


def test_sizes_that_the_recipe_overrides_are_reported(separate, saved, tmp_path):
    """A server of an export resizes by them, and a user who edits them would expect an effect."""
    said = f"{saved}/{BOTH}: image_processor: not read: "
    for size, more, ours in (
        ({"shortest_edge": 65536, "longest_edge": 1 << 24}, {}, (65536, 1 << 24)),
        ({"shortest_edge": 1, "longest_edge": 1 << 24}, {"min_pixels": 65536}, (65536, 1 << 24)),
    ):
        config = json.loads((saved / BOTH).read_text())
        kept = {k: v for k, v in config["image_processor"].items() if k not in ("min_pixels", "max_pixels")}
        config["image_processor"] = kept | {"size": size, **more}
        (saved / BOTH).write_text(json.dumps(config))
        theirs = type(peer_processor(separate)).from_pretrained(saved).size
        assert (theirs["shortest_edge"], theirs["longest_edge"]) == ours
        assert ignored_sizes(saved, *ours, *IMAGE_CONFIG) is None
        assert ignored_sizes(saved, 1024, 262144, *IMAGE_CONFIG).startswith(f"{said}size {size}"[:100])
    fps = {**json.loads((separate / VIDEO).read_text()), "fps": 4}
    (tmp_path / VIDEO).write_text(json.dumps(fps))
    assert ignored_sizes(tmp_path, 4096, 25165824, *VIDEO_CONFIG).endswith(", fps 4")


def test_messages_name_the_section(saved):
    config = json.loads((saved / BOTH).read_text())
    config["image_processor"]["patch_size"] = 14
    (saved / BOTH).write_text(json.dumps(config))
    with pytest.raises(
        SettingError, match=rf"patch_size is 14 in {saved}/{BOTH}: image_processor, but patch_size is 16"
    ):
        check_agreement(saved, saved, preparation(saved), load_config(saved).vision_spec)
    (saved / BOTH).write_text(json.dumps(config | {"image_processor": [1]}))
    with pytest.raises(SettingError, match=rf"{BOTH}: image_processor: \[1\] is not an object"):
        images_of(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_center_crop", True),
        ("do_pad", True),
        ("crop_size", {"height": 224, "width": 224}),
        ("min_frames", 8),
        ("image_processor_type", "SiglipImageProcessor"),
        ("resample", 2),
    ],
)
def test_keys_that_would_change_pixels_are_refused_by_name(separate, tmp_path, key, value):
    shutil.copy(separate / IMAGE, tmp_path)
    config = json.loads((tmp_path / IMAGE).read_text())
    (tmp_path / IMAGE).write_text(json.dumps(config | {"do_pad": False, "crop_size": None}))
    images_of(tmp_path)
    (tmp_path / IMAGE).write_text(json.dumps(config | {key: value}))
    with pytest.raises(SettingError, match=f"{IMAGE}: {key}: "):
        images_of(tmp_path)
