"""The page of a run: what stands on it, what a resume keeps, and what no data can do to it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from training_runs import train, with_plots

from qwen35.config.load import load_settings
from qwen35.data import MicroBatches
from qwen35.errors import UserError
from qwen35.training.history import MOST_VALIDATIONS, begin_history, first_samples, note_answers, read_facts
from qwen35.training.metrics import read_metrics
from qwen35.training.plots import curves, figure_of
from qwen35.training.report import comparison, main, page_of, read_run, write_report

TITLES = ["loss", "exact match", "gradient norm", "gradient norm by group", "learning rate", "tokens a second"]
TITLES += ["model FLOPs utilization", "seconds a step", "bytes of memory at the peak", "load-balancing loss"]
TITLES += ["tokens of the busiest expert, times the mean", "lengths of the samples"]


class Page(HTMLParser):
    """Counts the tags of a page, and the paths of each plot; `text` is all its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: dict[str, int] = {}
        self.paths: list[int] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag == "svg":
            self.paths.append(0)
        self.paths[-1:] = [self.paths[-1] + (tag in ("path", "use", "image"))] if self.paths else []
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(workplace) -> Path:
    """A run that saved and validated after steps 4 and 8, with a resume between."""
    save = workplace / "reported"
    options = ["training.save_interval=4", "training.val_interval=4", "training.val_generate=true"]
    options += [
        "training.peak_tflops=1",
        "training.log_interval=2",
        "data.val_dataset_param.basic_parameters.max_samples=9",
    ]
    options += [f"data.val_dataset_param.basic_parameters.dataset={workplace / 'records.json'}"]
    for steps in (4, 8):
        done = train(workplace, save, 2, f"training.train_iters={steps}", *options, how=with_plots)
        assert done.returncode == 0, done.stderr
    return save


def test_a_run_writes_its_page(run):
    """Every plot has its title and marks, and nothing on it is fetched from elsewhere."""
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.tags["svg"] == len(TITLES)
    assert all(title in page.text for title in TITLES)
    assert min(page.paths) > 5
    assert "script" not in page.tags
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    for part in ("step", "8 of 8", "mlp.gate", "Settings", "router_aux_loss_coef: 0.01", "kernels", "60 samples"):
        assert part in page.text, part


def test_the_page_shows_samples_and_answers(run, workplace):
    facts = read_facts(run)
    batches = MicroBatches(load_settings(run / "config.yaml"), 0, 1)
    for shown, sample in zip(facts["samples"], first_samples(batches), strict=True):
        assert shown["text"] == sample.text
        trained = re.findall("\x02(.*?)\x03", sample.text, re.DOTALL)
        assert [text.startswith("It is ") and text.rstrip().endswith("<|im_end|>") for text in trained] == [True]
    assert [answers["step"] for answers in facts["answers"]] == [4, 8]
    wanted = [record["conversations"][1]["value"] for record in json.loads((workplace / "records.json").read_text())]
    assert {answer["wanted"] for answer in facts["answers"][0]["answers"]} <= set(wanted)
    page = Page((run / "report.html").read_text())
    assert page.tags["mark"] == len(facts["samples"])
    assert page.tags["img"] == sum(len(sample["images"]) for sample in facts["samples"]) > 0


def test_pictures_are_the_pixels_that_the_model_gets(workplace):
    """Each image as PIL resizes it; the size is that of the grid."""
    batches = MicroBatches(load_settings(workplace / "recipe.yaml"), 0, 1)
    dataset = batches.dataset
    for index in (1, 2, 4):
        [picture] = dataset.pictures(index, dataset[index])
        _, rows, columns = dataset[index].grid_thw[0].tolist()
        with Image.open(workplace / f"{index}.png") as image:
            wanted = image.convert("RGB").resize((columns * 16, rows * 16), Image.Resampling.BICUBIC)
        assert np.array_equal(picture, np.asarray(wanted))
    assert dataset.pictures(0, dataset[0]) == []


def test_a_resume_keeps_the_starts_and_forgets_later_answers(run, workplace, tmp_path, monkeypatch):
    first, second = read_facts(run)["starts"]
    assert (first["step"], second["step"]) == (0, 4)
    settings = load_settings(run / "config.yaml", [f"training.save={tmp_path}"])
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    monkeypatch.setenv("QWEN35_RESTART", "2")
    monkeypatch.setenv("QWEN35_RESTART_REASON", "rank 1 was killed <b>")
    assert begin_history(settings, 5, 8, "two processes", MicroBatches(settings, 0, 1)) == []
    facts = read_facts(tmp_path)
    assert [answers["step"] for answers in facts["answers"]] == [4]
    assert [start["step"] for start in facts["starts"]] == [0, 4, 5]
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    assert "restart 2: rank 1 was killed <b>" in Page(page_of(tmp_path, read_run(tmp_path))).text
    begin_history(settings, 0, 8, "two processes", MicroBatches(settings, 0, 1))  # another run in the same folder
    assert len(read_facts(tmp_path)["starts"]) == 1


def test_answers_of_old_validations_go(tmp_path):
    answer = SimpleNamespace(record=SimpleNamespace(source="a"), wanted="1", given="<i>1", is_right=False)
    for step in range(MOST_VALIDATIONS + 3):
        note_answers(tmp_path, step, [answer], [])
    assert [entry["step"] for entry in read_facts(tmp_path)["answers"]] == list(range(3, MOST_VALIDATIONS + 3))


def test_text_of_the_data_stays_text(run, tmp_path):
    """Neither a record nor an answer nor a name of a file can write HTML."""
    evil = "<script>alert(1)</script>"
    facts = read_facts(run)
    facts["samples"][0] |= {"title": evil, "text": f"{evil}\x02{evil}\x03"}
    facts["answers"][0]["answers"][0] |= {"source": evil, "wanted": evil, "given": evil}
    facts |= {"data": evil, "files": [[evil, 1]], "runs_on": evil}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    page = Page(page_of(tmp_path, read_run(tmp_path)))
    assert "script" not in page.tags
    assert page.text.count(evil) == 9


def test_gradient_norms_by_group_add_up(run):
    for line in read_metrics(run / "metrics.jsonl"):
        assert sum(norm**2 for norm in line["grad_norms"].values()) == pytest.approx(line["grad_norm"] ** 2)


def test_runs_are_compared(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("lr: 0.01", "lr: 0.02"))
    assert main([str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    page = Page((tmp_path / "both.html").read_text())
    assert f"{other} loss" in page.text
    assert "training.lr: 0.01 -> 0.02" in page.text
    assert page.text.count(" -> ") == 1
    assert comparison([run, other]) == (tmp_path / "both.html").read_text()  # the same page each time


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json"):
        read_facts(tmp_path)


def test_a_folder_without_metrics_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=str(tmp_path)):
        read_run(tmp_path)


def test_a_comparison_lies_beside_the_runs(run, tmp_path, capsys):
    """Where the project's folder stays as it is; and what both leave unset does not differ."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("metrics.jsonl", "config.yaml"):
            shutil.copy(run / file, tmp_path / name)
    factors = (tmp_path / "b/config.yaml").read_text().replace("lr_by_module: {}", "lr_by_module: {model.visual: 0.5}")
    (tmp_path / "b/config.yaml").write_text(factors)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'comparison.html'}\n"
    page = Page((tmp_path / "comparison.html").read_text())
    assert page.text.count(" -> ") == 1 and "training.lr_by_module.model.visual: None -> 0.5" in page.text


def test_a_page_that_cannot_be_drawn_ends_no_run(run, tmp_path, caplog):
    """Whatever is wrong: a line of its own says so, and the run goes on."""
    shutil.copy(run / "metrics.jsonl", tmp_path)
    for facts in (b"{", b'{"lengths": {}}', b'{"samples": [{"title": 1}]}', b'{"steps": "x"}'):
        caplog.clear()
        (tmp_path / "run.json").write_bytes(facts)
        with caplog.at_level("ERROR", logger="qwen35"):
            write_report(tmp_path)
        [line] = caplog.messages
        assert line.startswith(f"{tmp_path}: report.html or loss.png is not drawn: ") and "\n" not in line


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    odd = ["x", None, [1], {"a": "b"}, float("nan"), 10**400, True]
    lines = [
        {"step": n, "loss": value, "lr": 1.0, "grad_norms": value, "expert_load": value} for n, value in enumerate(odd)
    ]
    lines += [
        {"step": 8, "loss": 2.0, "expert_load": [1.0, 2.0]},
        {"step": 10**400, "loss": 1.0},
        {"step": 9, "loss": 1.5},
    ]
    lines += [{"step": 10, "loss": 1.0, "expert_load": [1.0]}, {"step": 11, "loss": 1.0, "expert_load": [1.0, "x"]}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "[]\n{")
    page = Page(page_of(tmp_path, read_run(tmp_path)))
    assert "11 of 11" in page.text
    assert page.tags["svg"] == 3  # loss, lr, expert load


def test_numbers_of_any_size_fit_beside_a_plot(tmp_path):
    small = {"loss": 2.00001, "lr": 1e-9, "tokens_per_second": 1.2e-4, "grad_norm": 3e-12, "aux_loss": 123456.789}
    large = {"loss": -1e6, "lr": 2e-5, "tokens_per_second": 1234567.0, "memory": 6.4e10, "grad_norm": 1e9, "mfu": 0.4}
    seen = set()
    for values in (small, large):
        lines = ({"step": n, **{key: value * (1 + n / 300) for key, value in values.items()}} for n in range(1, 200))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for title, draw in curves([("a run", read_run(tmp_path))]):
            figure = figure_of(title, draw)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            box = figure.get_tightbbox(canvas.get_renderer())  # of all that is drawn, in inches
            assert min(box.x0, box.y0, 5.6 - box.x1, 3.2 - box.y1) > 0, title
            seen.add(title)
    assert len(seen) == 7


def test_a_dense_model_has_no_heat_map(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert Page(page_of(tmp_path, read_run(tmp_path))).tags["svg"] == 1


def test_a_long_run_is_drawn_as_means(tmp_path):
    line = {"loss": 1.0, "tokens_per_second": 1.0, "expert_load": [1.0, 2.0]}
    lines = (json.dumps({"step": step, **line}) + "\n" for step in range(1, 5000))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert len(page_of(tmp_path, read_run(tmp_path))) < 150_000


def test_a_missing_tracker_is_named_before_anything_else(workplace):
    done = train(workplace, workplace / "tracked", 1, "training.report_to=[mlflow]")
    assert done.returncode == 1
    assert "training.report_to: mlflow" in done.stderr
    assert not (workplace / "tracked" / "run.json").exists()
