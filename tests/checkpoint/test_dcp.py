"""DCP checkpoints in one process: save, resume, choice of a checkpoint, and refusals."""

import json
import os
import pickle
import random
import shutil
import threading

import pytest
import torch
from checkpoint_cases import MemorySource, as_before, build, save_checkpoint
from peer import config_dict
from torch.distributed.checkpoint.api import CheckpointException

from qwen35.checkpoint import dcp_write
from qwen35.checkpoint.dcp import decode, encode, load_checkpoint, training_state
from qwen35.checkpoint.dcp_folder import best_notes, load_notes, newest_checkpoint, resolve_load, write_best
from qwen35.checkpoint.dcp_source import DCPSource
from qwen35.checkpoint.dcp_write import write_release
from qwen35.checkpoint.errors import CheckpointError
from qwen35.checkpoint.slices import TensorSlice, pieces


def small_model(width: int = 4) -> torch.nn.Module:
    """Four parameters: trained, frozen, trained later, and a scalar."""
    model = torch.nn.Module()
    model.trained = torch.nn.Parameter(torch.randn(3, width))
    model.frozen = torch.nn.Parameter(torch.randn(5), requires_grad=False)
    model.unused = torch.nn.Parameter(torch.randn(2, 2))
    model.gate = torch.nn.Parameter(torch.tensor(1.0))
    return model


def adam(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, use_all: bool = False) -> None:
    loss = (model.trained**2).sum() * model.gate + (model.unused.sum() if use_all else 0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_resume_is_bit_exact(tmp_path):
    """A parameter without a gradient has no optimizer state, and may get it after the resume."""
    model = small_model()
    optimizer = adam(model)
    for _ in range(2):
        step(model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer, extra={"tokens": 7})
    torch.manual_seed(99)
    resumed = small_model()
    other = adam(resumed)
    loaded = load_checkpoint(tmp_path, resumed, other)
    assert (loaded.step, loaded.extra, loaded.has_optimizer, loaded.rank_extra) == (2, {"tokens": 7}, True, None)
    assert resumed.unused not in other.state
    assert set(other.state) == {resumed.trained, resumed.gate}
    for m, o in ((model, optimizer), (resumed, other)):
        step(m, o)
        step(m, o, use_all=True)
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[model.unused][key], other.state[resumed.unused][key])


def test_state_names_model_and_optimizer_tensors():
    model = small_model()
    optimizer = adam(model)
    step(model, optimizer)
    states = [f"optimizer.{k}.{n}" for n in ("trained", "gate") for k in ("step", "exp_avg", "exp_avg_sq")]
    assert sorted(training_state(model, optimizer)) == sorted(
        ["model.trained", "model.frozen", "model.unused", "model.gate", *states]
    )


def test_frozen_parameter_loses_its_optimizer_state_on_resume(tmp_path):
    model = small_model()
    optimizer = adam(model)
    step(model, optimizer)
    save_checkpoint(tmp_path, 1, model, optimizer)
    model.gate.requires_grad_(False)
    other = adam(model)
    load_checkpoint(tmp_path, model, other)
    assert set(other.state) == {model.trained}


def test_extras_round_trip_exactly(tmp_path):
    extra = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "lr": 0.1 + 0.2,
        "none": None,
        "nested": [{"a": (1, True)}, torch.randn(2, 3).to(torch.bfloat16), torch.zeros(0)],
    }
    save_checkpoint(tmp_path, 1, small_model(), extra=extra, rank_extra=extra)
    loaded = load_checkpoint(tmp_path, small_model())
    for back in (loaded.extra, loaded.rank_extra):
        assert back["python"] == extra["python"]
        assert back["lr"] == extra["lr"]
        assert torch.equal(back["torch"], extra["torch"])
        assert back["nested"][0] == {"a": (1, True)}
        assert back["nested"][1].dtype == torch.bfloat16
        assert torch.equal(back["nested"][1], extra["nested"][1])
        assert back["nested"][2].shape == (0,)
    assert decode(json.loads(json.dumps(encode({"x": 1e-310})))) == {"x": 1e-310}


def test_unsupported_extra_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"iter_0000001 cannot be written: extra\.rng\[1\]: object cannot"):
        save_checkpoint(tmp_path, 1, small_model(), extra={"rng": [1, object()]})
    assert not list(tmp_path.iterdir())


def test_values_are_cast_to_the_parameters_dtype(tmp_path):
    model = small_model().to(torch.bfloat16)
    save_checkpoint(tmp_path, 1, model)
    wide = small_model()
    load_checkpoint(tmp_path, wide)
    assert wide.trained.dtype == torch.float32
    assert torch.equal(wide.trained, model.trained.float())


# -- which checkpoint is chosen --------------------------------------------------------------------


def test_the_newest_is_not_taken_for_the_best(tmp_path):
    """As transformers' load_best_model_at_end would have it; here the best is asked for by name."""
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, small_model(), None)
    newest = resolve_load(tmp_path)
    assert best_notes(tmp_path, newest) == []
    for step, told in ((2, True), (3, False), (7, False)):  # the last was moved away
        write_best(tmp_path, step)
        line = f"{tmp_path}/iter_0000002 has the best validation: name it to use it instead of iter_0000003, the newest"
        assert best_notes(tmp_path, newest) == [line] * told
    write_best(tmp_path, 2)
    assert best_notes(newest, newest) == best_notes(tmp_path / "other", newest) == []


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    model = small_model()
    for number in (1, 20, 3):
        save_checkpoint(tmp_path, number, model, adam(model))
    iters = {n: tmp_path / f"iter_{n:07}" for n in (1, 3, 20)}
    assert newest_checkpoint(tmp_path) == iters[20]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert resolve_load(tmp_path) == iters[20]  # whatever the file says, whose update may have failed
    assert load_notes(tmp_path, iters[20]) == [
        f"{tmp_path}/latest_checkpointed_iteration.txt names iter_0000003, but iter_0000020 is newer and complete, and is used"
    ]
    assert load_notes(iters[3], iters[3]) == []  # an older checkpoint may be named explicitly
    shutil.copytree(iters[20], tmp_path / "iter_0000030.tmp")
    assert newest_checkpoint(tmp_path) == iters[20]
    (iters[20] / "complete.json").unlink()
    assert newest_checkpoint(tmp_path) == iters[3]
    assert load_notes(tmp_path, iters[3]) == [
        f"{iters[20]} is incomplete and was skipped ({iters[20]}/complete.json: no such file)"
    ]
    with pytest.raises(CheckpointError, match="iter_0000020: not a complete checkpoint"):
        resolve_load(iters[20])
    data = next(iters[3].glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 1)
    assert newest_checkpoint(tmp_path) == resolve_load(tmp_path) == resolve_load(iters[1]) == iters[1]
    (iters[1] / "complete.json").write_text("{")
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint in it"):
        resolve_load(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_load(tmp_path / "none")


@pytest.mark.parametrize("moment", ["append_tensor", "write_latest", "manifest_content"])
def test_interrupted_save_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, moment):
    """Whichever call is interrupted, the newest complete checkpoint is the old or the new one."""
    model = small_model()
    save_checkpoint(tmp_path, 1, model)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dcp_write if moment == "append_tensor" else dcp_write.dcp_folder, moment, interrupt)
        patched.setattr(dcp_write.shutil, "rmtree", lambda *a, **k: None)  # like kill -9, which cleans nothing up
        threads = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, model)
        assert threading.active_count() == threads  # although the traceback still holds what read ahead
    assert newest_checkpoint(tmp_path).name == ("iter_0000002" if moment == "write_latest" else "iter_0000001")
    save_checkpoint(tmp_path, 2, model)  # leftovers are no obstacle
    assert newest_checkpoint(tmp_path).name == "iter_0000002"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000001",
        "iter_0000002",
        "latest_checkpointed_iteration.txt",
    ]


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path, 1, model)
    model.trained.data.fill_(7)
    save_checkpoint(tmp_path, 1, model)
    other = small_model()
    load_checkpoint(tmp_path, other)
    assert other.trained.eq(7).all()
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="not written by this program"):
        save_checkpoint(tmp_path, 2, model)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"iter_0000001 cannot be written: No space left on device"):
        save_checkpoint(tmp_path, 1, small_model())
    assert not list(tmp_path.iterdir())


def test_killed_loader_worker_is_not_reported_as_a_write_error(tmp_path, monkeypatch):
    """Such as the loss of a DataLoader worker, which torch raises anywhere: a restart may help."""

    def lost(*args, **kwargs):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", lost)
    with pytest.raises(CheckpointException, match=r"worker .* is killed"):
        save_checkpoint(tmp_path, 1, small_model())
    assert not list(tmp_path.iterdir())


# -- mismatches ------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_one_error(tmp_path):
    model = small_model(width=6)
    model.extra = torch.nn.Parameter(torch.zeros(1))
    del model.frozen
    save_checkpoint(tmp_path, 1, model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, small_model())
    for words in (
        "iter_0000001 does not fit the model",
        "1 tensor missing: frozen",
        "1 tensor not of this model: extra",
        "1 tensor misshapen: trained is [3, 6] instead of [3, 4]",
    ):
        assert words in str(caught.value)


def test_mtp_is_left_out_for_a_model_without_it(tmp_path):
    full = build(config_dict(), mtp=True)
    optimizer = torch.optim.AdamW(full.parameters())
    sum(p.sum() for p in full.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, 1, full, optimizer)
    plain = build(config_dict(), mtp=False, seed=1)
    load_checkpoint(tmp_path, plain, torch.optim.AdamW(plain.parameters()))
    wanted = dict(full.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in plain.named_parameters())
    save_checkpoint(tmp_path, 2, plain)
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        load_checkpoint(tmp_path, full)


def test_converted_weights_leave_the_optimizer_alone(tmp_path):
    model = small_model()
    write_release(MemorySource({n: p.bfloat16() for n, p in model.named_parameters()}), tmp_path)
    optimizer = adam(model)
    step(model, optimizer)
    loaded = load_checkpoint(tmp_path, model, optimizer)
    assert (loaded.path, loaded.step, loaded.has_optimizer) == (tmp_path / "release", None, False)
    assert len(optimizer.state) == 2


def test_a_pickle_of_unknown_origin_is_refused(tmp_path):
    """.metadata is a pickle; nothing that it names is called."""
    save_checkpoint(tmp_path, 1, small_model())
    metadata = tmp_path / "iter_0000001" / ".metadata"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/evil",)

    module = b"torch.distributed.checkpoint.metadata"
    sly = [  # names that the module has imported: protocol 4, module, name, STACK_GLOBAL
        b"\x80\x04\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(name)]) + name + b"\x93."
        for name in (b"os", b"os.system", b"__builtins__", b"MetadataIndex.__init__")
    ]
    for content in (pickle.dumps(Evil()), *sly, b"", b"nonsense", pickle.dumps({"a": 1})):
        metadata.write_bytes(content)
        as_before(metadata.parent)
        with pytest.raises(CheckpointError, match=r"\.metadata is broken or not DCP's") as caught:
            DCPSource(tmp_path / "iter_0000001")
        assert "has no place in it" in str(caught.value) or len(content) < 30
    assert not (tmp_path / "evil").exists()


def test_tensor_written_in_pieces_is_read_in_any_region(tmp_path, monkeypatch):
    """A tensor written in many pieces is read in any region."""
    monkeypatch.setattr(dcp_write, "pieces", lambda region, size: pieces(region, size, 64))

    whole = torch.randn(9, 5, 7)
    seen = []
    write_release(MemorySource({"x": whole, "scalar": torch.tensor(2)}), tmp_path, seen.append)
    assert sum(seen) == whole.nbytes + 8
    source = DCPSource(resolve_load(tmp_path))
    for region in (
        TensorSlice((0, 0, 0), (9, 5, 7)),
        TensorSlice((3, 1, 2), (5, 3, 4)),
        TensorSlice((8, 4, 6), (1, 1, 1)),
    ):
        assert torch.equal(source.read("x", region), whole[region.slices()])
    assert source.read("scalar", TensorSlice((), ())).item() == 2
