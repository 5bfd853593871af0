"""The page of a run in a headless Chromium, whose path is in CHROMIUM: `make test-browser`."""

import json
import os
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest
from training_runs import make_workplace, train, with_plots

# What the browser finds, written into the page that it prints. A plot's marks are what it draws
# with a size.
PROBE = """<script>
addEventListener('load', () => {
  const plots = [...document.querySelectorAll('svg')].map(plot => ({
    width: plot.getBoundingClientRect().width,
    marks: [...plot.querySelectorAll('path, use, image')].filter(mark => {
      const box = mark.getBoundingClientRect();
      return box.width + box.height > 0;
    }).length,
  }));
  const images = [...document.images].map(image => image.naturalWidth);
  const found = {plots, images, width: document.documentElement.scrollWidth, window: innerWidth};
  parent.document.body.dataset.found = JSON.stringify(found);
});
</script>"""


def look(page: Path, width: int, folder: Path) -> tuple[dict, str]:
    """-> what PROBE finds in a frame of this width, and the lines that the console shows.

    A window is never narrower than 500 pixels, and a phone's screen is.
    """
    probed = folder / "probed.html"
    inside = escape(page.read_text().replace("</body>", f"{PROBE}</body>"))
    probed.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body><iframe width={width} height=800 frameborder=0 srcdoc="{inside}"></iframe>'
    )
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    done = subprocess.run(
        [os.environ["CHROMIUM"], "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = done.stdout.split('data-found="')[1].split('"')[0]
    return json.loads(unescape(found)), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workplace = make_workplace(tmp_path_factory.mktemp("pages"))
    save = workplace / "run"
    val = f"data.val_dataset_param.basic_parameters.dataset={workplace / 'records.json'}"
    options = [
        "training.val_interval=3",
        "training.val_generate=true",
        "training.peak_tflops=1",
        "training.train_iters=6",
    ]
    done = train(workplace, save, 2, *options, val, how=with_plots)
    assert done.returncode == 0, done.stderr
    return save


@pytest.mark.parametrize("width", [1280, 390])  # a screen, a phone
def test_every_plot_has_marks_and_fits(run, tmp_path, width):
    found, console = look(run / "report.html", width, tmp_path)
    assert console == ""
    assert len(found["plots"]) == 12
    assert min(plot["marks"] for plot in found["plots"]) >= 5
    assert found["images"]
    assert min(found["images"]) > 0
    assert found["width"] <= found["window"] <= width
    assert max(plot["width"] for plot in found["plots"]) <= width
