"""What the project computes and offers equals what golden.py recorded in golden.json."""

import json

import pytest
from golden import FILE, RUNS, exported, inventory, run

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_give_the_recorded_figures(name, tmp_path):
    """In fp32, within what machines and torch releases differ; one machine gives the same bits."""
    found, wanted = run(tmp_path, *RUNS[name]), GOLDEN["runs"][name]
    assert found["metrics"].keys() == wanted["metrics"].keys()
    for key, values in wanted["metrics"].items():
        assert found["metrics"][key] == pytest.approx(values, rel=2e-5, abs=1e-9), key
    assert found["weights"].keys() == wanted["weights"].keys()
    for key, (magnitude, spread) in wanted["weights"].items():
        assert found["weights"][key] == pytest.approx([magnitude, spread], abs=2e-5 * magnitude), key


def test_an_export_has_the_recorded_bytes(tmp_path):
    assert exported(tmp_path) == GOLDEN["exported"]


def test_what_a_user_can_write_is_as_recorded():
    """Settings and defaults, options of commands, variables of env.sh, targets and scripts."""
    found = inventory()
    for kind, wanted in GOLDEN["inventory"].items():
        assert found[kind] == wanted, kind
