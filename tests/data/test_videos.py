"""Videos against transformers' Qwen3-VL video processor, by its parts that need no torchvision."""

import random
import re
import shutil
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from optional import write_video
from packaging.version import Version
from peer import config_dict
from PIL import Image
from tokenizer_fixture import PUBLISHED, make_model_folder
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
from transformers.video_utils import VideoMetadata

from bench.images import peer_processor
from qwen35.batch import VisionSpec
from qwen35.config.schema import Attr, BasicParameters, PreprocessParameters
from qwen35.data.image_processor import ImageError, ImageProcessor
from qwen35.data.mrope import position_ids
from qwen35.data.preparation import Preparation
from qwen35.data.record import Record, RecordError, Turn, Video, with_visuals
from qwen35.data.tokenized import visual_from_json, visual_to_json
from qwen35.data.tokenizer import ChatTokenizer
from qwen35.data.video_frames import decode
from qwen35.data.video_processor import VideoProcessor
from qwen35.errors import SettingError


def preparation(folder, **settings):
    settings = PreprocessParameters(**settings)
    images = ImageProcessor.from_folder(folder, settings.image_min_pixels, settings.image_max_pixels)
    videos = VideoProcessor.from_folder(folder, settings)
    return Preparation(ChatTokenizer(folder), images, BasicParameters("x"), Attr(), videos)


def film(count, height, width, seed=0):
    """[T, H, W, 3] uint8: smooth, moving, with noise."""
    rng = np.random.default_rng([seed, count, height, width])
    t, y, x = np.mgrid[:count, :height, :width]
    base = (
        np.sin(x / 9 + t)[..., None] * 50
        + np.cos(y / 7 + np.arange(3)[:, None, None, None] * 2).transpose(1, 2, 3, 0) * 50
    )
    return (base + 118 + rng.integers(0, 20, (count, height, width, 3))).astype(np.uint8)


def save(frames, folder, name="frame_{}.png"):
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / name.format(i) for i in range(len(frames)))
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    return paths


def expected(frames, numbers, height, width):
    """[P, 1536] patches made the slow and obvious way: resized by Pillow, cut square by square."""
    scaled = [np.asarray(Image.fromarray(frames[i]).resize((width, height), Image.Resampling.BICUBIC)) for i in numbers]
    scaled += [scaled[-1]] * (len(scaled) % 2)
    rows = []
    for t in range(0, len(scaled), 2):
        pair = np.stack(scaled[t : t + 2]).astype(np.float32) / 255 * 2 - 1  # [2, H, W, 3]
        for top in range(0, height, 32):
            for left in range(0, width, 32):
                for y, x in ((0, 0), (0, 16), (16, 0), (16, 16)):
                    square = pair[:, top + y : top + y + 16, left + x : left + x + 16]
                    rows.append(square.transpose(3, 0, 1, 2).reshape(-1))
    return torch.from_numpy(np.stack(rows))


def sampled(count, fps, settings):
    peer = SimpleNamespace(fps=settings.video_fps, min_frames=4, max_frames=settings.video_maxlen)
    metadata = SimpleNamespace(total_num_frames=count, fps=fps)
    return Qwen3VLVideoProcessor.sample_frames(peer, metadata, fps=settings.video_fps).tolist()


def times(numbers, fps):
    return Qwen3VLProcessor._calculate_timestamps(None, list(numbers), fps, 2)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "not counted"])
def test_files_equal_transformers(tmp_path, folder, monkeypatch, counted):
    rng = random.Random(counted)
    for case in range(8):
        count, height, width = rng.choice([2, 3, 5, 16, 41]), 2 * rng.randint(16, 60), 2 * rng.randint(16, 60)
        rate = rng.choice([Fraction(25), Fraction(30000, 1001), Fraction(4), Fraction(1)])
        settings = PreprocessParameters(
            video_fps=rng.choice([2.0, 1.0, 0.7]),
            video_maxlen=rng.choice([5, 64]),
            video_max_pixels=rng.choice([1024, 4000, 65536]),
        )
        frames, path = film(count, height, width, case), tmp_path / f"{case}.mp4"
        write_video(path, frames, rate, monkeypatch, counted)
        ours = VideoProcessor.from_folder(folder, settings)
        selection = ours.select_frames(Video(path))
        numbers = sampled(count, float(rate), settings)
        assert selection.indices == numbers and selection.timestamps == times(numbers, float(rate))
        n = len(numbers)
        high, wide = smart_resize(n, height, width, 2, 32, 1024 * n, settings.video_max_pixels * n)
        assert selection.grid == ((n + 1) // 2, high // 16, wide // 16)
        patches, grid = ours.patches(Video(path))
        assert grid == selection.grid and patches.dtype == torch.float32
        # torch's resizing, which that processor uses, is now and then off Pillow's by a level
        difference = (patches - expected(frames, numbers, high, wide)).abs()
        assert patches.shape == (grid[0] * grid[1] * grid[2], 1536)
        assert difference.max() < 2.01 / 127.5


def test_frames_that_come_unevenly_or_too_early_an_end_are_told(tmp_path, folder, monkeypatch):
    """Screen recorders and browsers write such files, broken downloads the last one.

    Headers say 30 frames a second here, which ffmpeg believes of matroska. transformers' default,
    torchcodec, looks at all frames: 20 in 9.5 seconds, and gives them the times of the average.
    """
    processor, path = VideoProcessor.from_folder(folder, PreprocessParameters()), tmp_path / "film"
    frames = film(20, 64, 96)
    even, uneven = [n / 2 for n in range(20)], [*(n / 30 for n in range(10)), *(n - 10.0 for n in range(11, 21))]

    def read(times, counted):
        write_video(path, frames, Fraction(30), monkeypatch, counted, times=times)
        odd: list[str] = []
        return processor.select_frames(Video(path), odd).timestamps[-1], odd

    assert read([n / 30 for n in range(20)], False) == (pytest.approx(16 / 30), [])
    assert read(even, False) == (pytest.approx(9.25), [])
    for counted in (True, False):
        last, odd = read(uneven, counted)
        assert odd == ["uneven"] and 9 < last < 10
    write_video(path, frames, Fraction(30), monkeypatch, False, times=even)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    odd = []
    assert processor.select_frames(Video(path), odd).timestamps[-1] < 7 and odd == ["short"]
    write_video(path, frames, Fraction(30), monkeypatch, is_raw=True)
    with pytest.raises(ImageError, match="is a raw stream, which has no frame rate; make it MP4"):
        processor.select_frames(Video(path))


def test_titles_in_any_encoding_are_read(tmp_path, folder, monkeypatch):
    frames = film(4, 64, 96)
    for name, title in (("utf-8", "电影"), ("gbk", "电影")):
        write_video(tmp_path / name, frames, Fraction(2), monkeypatch, title=title.encode(name))
    ours = VideoProcessor.from_folder(folder, PreprocessParameters())
    (a, grid), (b, other) = (ours.patches(Video(tmp_path / name)) for name in ("utf-8", "gbk"))
    assert grid == other == (2, 4, 6) and torch.equal(a, b)


def test_frames_of_the_right_size_are_not_resized(tmp_path, folder):
    frames = film(5, 64, 96)
    paths = save(frames, tmp_path / "v")
    processor = VideoProcessor.from_folder(folder, PreprocessParameters(video_min_pixels=6144, video_max_pixels=6144))
    for video in (Video(tmp_path / "v"), Video(paths)):
        patches, grid = processor.patches(video)
        assert grid == (3, 4, 6)
        assert (patches - expected(frames, range(5), 64, 96)).abs().max() < 1e-6


def test_sizes_equal_transformers(folder):
    takes_odd_counts_up = smart_resize(5, 64, 64, 2, 32, 1, 5 * 64 * 64 - 1) != (64, 64)  # transformers 5.2
    rng = random.Random(0)
    processor = VideoProcessor.from_folder(folder, PreprocessParameters(video_min_pixels=2000, video_max_pixels=50_000))
    for _ in range(3000):
        count, height, width = rng.randint(2, 70), int(10 ** rng.uniform(1.51, 3.6)), int(10 ** rng.uniform(1.51, 3.6))
        count -= count % 2 if takes_odd_counts_up else 0
        if max(height, width) <= 200 * min(height, width):
            theirs = smart_resize(count, height, width, 2, 32, 2000 * count, 50_000 * count)
            assert processor._resized(count, height, width) == theirs


def test_frames_of_a_folder_come_in_natural_order(tmp_path, folder):
    frames = film(12, 32, 32)
    save(frames, tmp_path / "v")
    (tmp_path / "v" / ".hidden.png").write_bytes(b"")
    (tmp_path / "v" / "notes.txt").write_text("x")
    processor = VideoProcessor.from_folder(folder, PreprocessParameters())
    patches, _ = processor.patches(Video(tmp_path / "v"))
    assert (patches - expected(frames, range(12), 32, 32)).abs().max() < 1e-6


def test_frames_without_a_rate_are_video_fps_apart(tmp_path, folder):
    paths = save(film(9, 32, 32), tmp_path / "v")
    processor = VideoProcessor.from_folder(folder, PreprocessParameters(video_fps=0.7))
    assert processor.select_frames(Video(paths)).indices == list(range(9))
    assert processor.select_frames(Video(paths)).timestamps == times(range(9), 0.7)
    processor = VideoProcessor.from_folder(folder, PreprocessParameters(video_fps=1.0, video_maxlen=6))
    assert processor.select_frames(Video(paths)).indices == np.linspace(0, 8, 6).round().astype(int).tolist()
    with_rate = processor.select_frames(Video(paths, 2.0))  # 4.5 seconds at one a second
    assert with_rate.indices == sampled(9, 2.0, PreprocessParameters(video_fps=1.0, video_maxlen=6))
    assert with_rate.timestamps == times(with_rate.indices, 2.0)


# -- tokens and positions --------------------------------------------------------------------------


KINDS = ("qwen3_5", "qwen3_5_moe")
WRAPPED = "<|vision_start|><|video_pad|><|vision_end|>"
OUTER_PAIR = Version(transformers.__version__) >= Version("5.10")


class Processor(Qwen3VLProcessor):
    """transformers' class for qwen3_5 and qwen3_5_moe, without its check for torchvision.

    Frames of the right size need nothing of that.
    """

    def check_argument_for_proper_class(self, *_):
        pass

    @classmethod
    def of(cls, folder):
        videos = Qwen3VLVideoProcessor.from_pretrained(folder)
        videos.resample = None  # a constant of torchvision's
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        template = (folder / "chat_template.jinja").read_text()
        return cls(peer_processor(folder), tokenizer, videos, chat_template=template)

    def inputs(self, text, images, films, fps):
        """films: all frames of each video, from which this samples; image_max_pixels is 8192."""
        sizes = {"size": {"shortest_edge": 1024, "longest_edge": 8192}, "input_data_format": "channels_last"}
        as_it_is = dict.fromkeys(["do_resize", "do_convert_rgb", "do_rescale", "do_normalize"], False)
        metadata = [VideoMetadata(total_num_frames=len(frames), fps=fps) for frames in films]
        options = {"images_kwargs": sizes, "videos_kwargs": {"video_metadata": metadata, **as_it_is}}
        return self(text=[text], images=images or None, videos=list(films), return_tensors="pt", **options)


def with_outer_pairs(text, grids):
    """The text with a vision start and end around each whole video of t timed pairs of frames."""
    out = ""
    for t, *_ in grids:
        found = re.search(rf"(<[0-9.]+ seconds><\|vision_start\|>(<\|video_pad\|>)+<\|vision_end\|>){{{t}}}", text)
        out += f"{text[: found.start()]}<|vision_start|>{found[0]}<|vision_end|>"
        text = text[found.end() :]
    return out + text


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("published"))
    shutil.copy(PUBLISHED / "video_preprocessor_config.json", folder)
    names = {getattr(PROCESSOR_MAPPING_NAMES[kind], "__name__", PROCESSOR_MAPPING_NAMES[kind]) for kind in KINDS}
    assert names == {"Qwen3VLProcessor"}
    return Processor.of(folder), preparation(
        folder, video_min_pixels=1024, video_max_pixels=2**20, image_min_pixels=1024, image_max_pixels=8192
    )


def test_tokens_and_positions_equal_transformers(tmp_path, processor):
    """Real frames through the whole processor, which samples them, times them and lays them out.

    Given the video's pad token alone, every release gives our ids. Of the start and end tokens that
    the template writes around it, releases up to 5.9 keep none, as the models were trained (see
    ChatTokenizer.encode); later ones keep one of each, and differ in nothing else.
    """
    theirs, p = processor
    hf, tokenizer, rng = theirs.tokenizer, p.tokenizer, random.Random(0)
    config = config_dict(moe=False) | {"image_token_id": tokenizer.image_id, "video_token_id": tokenizer.video_id}
    config |= {"vision_start_token_id": hf.convert_tokens_to_ids("<|vision_start|>")}
    with torch.device("meta"):
        peer = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**config)).model
    picture = film(1, 70, 40)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    for case in range(12):
        order = [*rng.choices(["<image>", "<video>", "x é", "12", "y "], k=rng.randint(1, 6)), "<video>"]
        films, videos, fps = [], [], rng.choice([1.0, 3.0, 24.0])
        for place in order:
            if place == "<video>":
                films.append(film(rng.choice([2, 3, 6, 31]), 32 * rng.randint(1, 3), 32 * rng.randint(1, 3), case))
                videos.append(Video(save(films[-1], tmp_path / f"{case}_{len(videos)}"), fps))
        images = (tmp_path / "a.png",) * order.count("<image>")
        content = with_visuals("".join(order), {"<image>": iter(images), "<video>": iter(videos)})
        record = Record("r", (Turn("user", content), Turn("assistant", "A")))
        ((_, sample),) = p.tokenise(record)
        content = [
            {"type": kind} if (kind := place[1:-1]) in ("image", "video") else {"type": "text", "text": place}
            for place in order
        ]
        text = theirs.apply_chat_template(
            [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}], tokenize=False
        )
        assert text.count(WRAPPED) == len(videos)
        bare = theirs.inputs(text.replace(WRAPPED, "<|video_pad|>"), [picture] * len(images), films, fps)
        assert sample.ids.tolist() == bare["input_ids"][0].tolist()
        of = {
            "image": bare["image_grid_thw"].tolist() if images else [],
            "video": bare["video_grid_thw"].tolist(),
        }
        grids = {kind: iter(of[kind]) for kind in of}
        assert sample.grids == [tuple(next(grids[place[1:-1]])) for place in order if place[1:-1] in of]
        wrapped = theirs.inputs(text, [picture] * len(images), films, fps)["input_ids"][0].tolist()
        whole = hf.decode(sample.ids.tolist())
        if OUTER_PAIR:
            whole = with_outer_pairs(whole, of["video"])
        assert hf.decode(wrapped) == whole and wrapped == hf(whole).input_ids
        for ids in (sample.ids, np.array(wrapped, dtype=np.int32)):  # positions follow from any layout
            row = torch.from_numpy(ids).long()[None]
            expected, _ = peer.get_rope_index(
                input_ids=row,
                mm_token_type_ids=(row == tokenizer.image_id).int() + 2 * (row == tokenizer.video_id).int(),
                image_grid_thw=bare["image_grid_thw"] if images else None,
                video_grid_thw=bare["video_grid_thw"],
                attention_mask=torch.ones_like(row),
            )
            spec = VisionSpec(tokenizer.image_id, tokenizer.video_id)
            assert torch.equal(torch.from_numpy(position_ids(ids, sample.grids, spec)), expected[:, 0])
        assert sample.loss_mask.sum() == len(hf("A<|im_end|>\n", add_special_tokens=False).input_ids)


def test_token_layout_of_one_video(tmp_path, processor):
    """Two pairs of frames, a token each: as the models were trained, and as transformers does."""
    theirs, p = processor
    frames = film(4, 32, 32)
    record = Record("r", (Turn("user", (Video(save(frames, tmp_path / "v"), 2.0),)), Turn("assistant", "A")))
    ours = p.tokenise(record)[0][1].ids.tolist()
    frame = "<|vision_start|><|video_pad|><|vision_end|>"
    assert theirs.tokenizer.decode(ours).startswith(
        f"<|im_start|>user\n<0.2 seconds>{frame}<1.2 seconds>{frame}<|im_end|>\n<|im_start|>assistant\n"
    )
    text = theirs.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    given = theirs.inputs(text, [], [frames], 2.0)["input_ids"][0].tolist()
    start, end = theirs.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    outer = 1 if OUTER_PAIR else 0
    assert given.count(start) == given.count(end) == ours.count(start) + outer == ours.count(end) + outer


# -- what cannot be used ---------------------------------------------------------------------------


def test_unusable_videos_are_image_errors(tmp_path, folder, monkeypatch):
    processor = VideoProcessor.from_folder(folder, PreprocessParameters())
    write_video(tmp_path / "one.mp4", film(1, 32, 32), Fraction(1), monkeypatch)
    write_video(tmp_path / "cut.mp4", film(6, 64, 64), Fraction(1), monkeypatch)
    write_video(tmp_path / "thin.mp4", film(2, 2, 402), Fraction(1), monkeypatch)
    data = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/thin.mp4\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    paths = save(film(3, 40, 40), tmp_path / "v")
    (tmp_path / "linked" / "0.png").symlink_to(paths[0])
    Image.new("RGB", (40, 32)).save(paths[2])
    for source, fps, message in [
        ("none.mp4", None, "^no such file$"),
        ("text.mp4", None, "^cannot be read: "),
        ("list.m3u8", None, "^cannot be read: "),
        ("cut.mp4", None, "^cannot be read: |^ends before the last of its frames$"),
        ("one.mp4", None, "^has 1 frame, fewer than 2$"),
        ("thin.mp4", None, "^is 6432 x 32 pixels, one side more than 200 times the other$"),
        ("thin.mp4", 2.0, "^is a file, which has its own frame rate"),
        ("empty", None, "^is a folder without frames"),
        ("linked", None, r"^0\.png is a link; name the frames in a list"),
        ("v", None, "^frame 3 is 40 x 32 pixels, others 40 x 40$"),
        (paths[:1], None, "^has 1 frame, fewer than 2$"),
        ((paths[0], tmp_path / "v" / "x.png"), None, r"^frame 2 of 2, x\.png: no such file$"),
        ((tmp_path / "text.mp4", paths[0]), None, r"^frame 1 of 2, text\.mp4: is not an image$"),
    ]:
        video = Video(source if isinstance(source, tuple) else tmp_path / source, fps)
        with pytest.raises(ImageError, match=message) as caught:
            processor.patches(video)
        assert "\n" not in str(caught.value)
    p = preparation(folder)
    content = (Video(tmp_path / "none.mp4"),)
    record = Record("a.json, record 4", (Turn("user", content), Turn("assistant", "A")))
    with pytest.raises(RecordError, match=r"^a\.json, record 4: video 1 of 1, .*/none\.mp4: no such file$") as caught:
        p.tokenise(record)
    assert caught.value.kind == "video missing" and caught.value.image == str(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("rotation", "shown"),
    [
        (0, ["red", "green", "blue", "black"]),
        (90, ["green", "black", "red", "blue"]),
        (-90, ["blue", "red", "black", "green"]),
        (180, ["black", "blue", "green", "red"]),
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_rotated_video_is_turned_upright(rotation, shown, counted, tmp_path, folder, monkeypatch):
    """As OpenCV and torchcodec from 0.11 on show such a file. shown: its corners, row by row."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :32, :48], frames[:, :32, 48:], frames[:, 32:, :48] = (colours[c] for c in ("red", "green", "blue"))
    write_video(tmp_path / "a.mp4", frames, Fraction(2), monkeypatch, counted, rotation=rotation)
    processor, video = VideoProcessor.from_folder(folder, PreprocessParameters()), Video(tmp_path / "a.mp4")
    height, width = (96, 64) if rotation in (90, -90) else (64, 96)
    assert processor.select_frames(video).grid == (2, height // 16, width // 16) == processor.patches(video)[1]
    for frame in decode(video, [0, 3]):
        corners = [frame[y, x] for y in (2, height - 3) for x in (2, width - 3)]
        assert [tuple(corner.tolist()) for corner in corners] == [colours[name] for name in shown]


def test_video_rotated_by_45_degrees_is_an_error(tmp_path, folder, monkeypatch):
    write_video(tmp_path / "a.mp4", film(4, 64, 64), Fraction(2), monkeypatch, rotation=45)
    with pytest.raises(ImageError, match=r"^is rotated by 45 degrees; only quarter turns are supported$"):
        VideoProcessor.from_folder(folder, PreprocessParameters()).select_frames(Video(tmp_path / "a.mp4"))


def test_missing_pyav_is_a_setting_error(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(
        SettingError, match=r"a\.mp4: a video file needs PyAV, which is missing; install it \(.*pip install av"
    ):
        VideoProcessor.from_folder(folder, PreprocessParameters()).select_frames(Video(tmp_path / "a.mp4"))


def test_visuals_survive_json(tmp_path):
    for video in (Video(tmp_path / "a.mp4"), Video((tmp_path / "1.png", tmp_path / "2.png"), 1.5)):
        assert visual_from_json(visual_to_json(video, [(0.25, 4)])) == video
    assert visual_from_json(visual_to_json(tmp_path / "a.png", 4)) == tmp_path / "a.png"
