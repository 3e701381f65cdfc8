import argparse
import collections
import errno
import hashlib
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.io import (
    CheckpointError,
    WriteError,
    atomic_directory,
    atomic_write,
    hash_file,
    hash_tensors,
    load_strictly,
    read_tensors,
    recover,
    stable_hash,
)

ROOT = Path(__file__).parents[2]
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


class Attack:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def assert_same(read, written):
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "legacy.pth"])
def test_reads_every_format_whatever_it_is_called(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=suffix == "pt")
    assert_same(read_tensors(path), WEIGHTS)
    assert_same(read_tensors(path.rename(tmp_path / "renamed.bin")), WEIGHTS)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict", "teacher"])
def test_unwraps(tmp_path, wrapper):
    content = {
        "epoch": 3,
        "step": torch.tensor(7),
        wrapper: collections.OrderedDict(WEIGHTS),
        "optimizer": {"state": {0: torch.ones(2)}},
    }
    torch.save(content, tmp_path / "x.ckpt")
    assert_same(read_tensors(tmp_path / "x.ckpt"), WEIGHTS)


def test_parameters_become_plain_tensors(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    tensor = read_tensors(tmp_path / "x.pt")["w"]
    assert type(tensor) is torch.Tensor and not tensor.requires_grad


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_classes_become_placeholders(tmp_path, legacy, monkeypatch):
    module = types.ModuleType("their_code")
    monkeypatch.setitem(__import__("sys").modules, "their_code", module)
    exec("class Config:\n def __init__(self): self.lr = 1\n", module.__dict__)
    module.Config.__module__ = "their_code"
    content = {"args": argparse.Namespace(lr=0.1), "config": module.Config(), "state_dict": WEIGHTS}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(__import__("sys").modules, "their_code")
    assert_same(read_tensors(tmp_path / "x.pt"), WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("call", [(os.system, "touch {}"), (eval, "open('{}', 'w')"), (exec, "open('{}', 'w')")])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, legacy, call):
    trace = tmp_path / "executed"
    content = {"state_dict": WEIGHTS, "x": Attack(call[0], call[1].format(trace))}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        read_tensors(tmp_path / "x.pt")
    assert not trace.exists()


def test_malicious_plain_pickles_of_every_protocol(tmp_path):
    trace = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / "x.pkl"
        path.write_bytes(pickle.dumps(Attack(os.system, f"touch {trace}"), protocol=protocol))
        with pytest.raises(CheckpointError):
            read_tensors(path)
    assert not trace.exists()


def test_unknown_functions_are_inert_too(tmp_path):
    """The list of dangerous names is for the message only: what it does not name is not executed either."""
    trace = tmp_path / "executed"
    torch.save({"state_dict": WEIGHTS, "x": Attack(os.makedirs, str(trace))}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    assert b"makedirs" in data
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "x.pt")
    torch.save({"state_dict": WEIGHTS, "x": Attack(pathlib_touch, str(trace))}, tmp_path / "y.pt")
    assert_same(read_tensors(tmp_path / "y.pt"), WEIGHTS)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore::FutureWarning")
def test_torchscript_archives_are_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "x.pt")


def pathlib_touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "legacy.pth"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_truncated_files(tmp_path, suffix, share):
    path = tmp_path / f"weights.{suffix}"
    weights = {"w": torch.randn(40, 40)}
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=suffix == "pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=path.name):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_text_is_not_a_checkpoint(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("content, message", [({"epoch": 1, "x": {"w": torch.ones(1)}}, "no tensors"), ([1], "list")])
def test_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path / "x.pt")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no weights file"):
        read_tensors(tmp_path / "absent.pt")


def test_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]


def test_atomic_directory_replaces_or_leaves(tmp_path):
    path = tmp_path / "checkpoint"
    for text in ("one", "two"):
        with atomic_directory(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(text)
    with pytest.raises(RuntimeError), atomic_directory(path) as temporary:
        (temporary / "file").write_text("three")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert os.listdir(path) == ["sub"] and (path / "sub" / "file").read_text() == "two"


@pytest.mark.parametrize("writer", [atomic_write, atomic_directory])
def test_a_full_disk_is_explained(tmp_path, writer):
    with pytest.raises(WriteError, match=f"cannot write {tmp_path / 'x'} .*No space left"), writer(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), writer(tmp_path / "x"):
        open(tmp_path / "absent")
    assert os.listdir(tmp_path) == []


def test_recover_leaves_other_files_alone(tmp_path):
    for name in (".hidden", ".x.tmp", "x.01234567-1-01234567.tmp"):
        (tmp_path / name).touch()
    before = sorted(os.listdir(tmp_path))
    recover(tmp_path)
    recover(tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_writer_removes_what_dead_writers_of_its_directory_left(tmp_path):
    child = os.fork()
    if child == 0:
        with atomic_directory(tmp_path / "set") as temporary:
            (temporary / "file").write_text("half")
            os._exit(1)
    os.waitpid(child, 0)
    (leftover,) = os.listdir(tmp_path)
    mine = leftover.replace(f"-{child}-", f"-{os.getpid()}-")
    for kept in (mine, leftover.replace(".set.", ".other.")):
        (tmp_path / kept).mkdir()
    with atomic_directory(tmp_path / "set"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted(["set", mine, leftover.replace(".set.", ".other.")])


def test_hash_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_stable_hash_ignores_key_order_only():
    assert stable_hash({"a": 1, "b": [1, 2]}) == stable_hash({"b": [1, 2], "a": 1})
    assert len({stable_hash(x) for x in ({"a": 1}, {"a": 2}, {"a": [1]}, {"b": 1})}) == 4
    with pytest.raises(TypeError):
        stable_hash({"a": object()})


def test_hash_tensors_sees_name_dtype_shape_and_value():
    base = {"a": torch.arange(4.0), "b": torch.tensor(1.0, dtype=torch.bfloat16), "c": torch.empty(0)}
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))
    assert hash_tensors({"a": torch.arange(8.0)[::2]}) == hash_tensors({"a": torch.arange(8.0)[::2].clone()})
    others = [
        base | {"a": torch.arange(4.0).reshape(2, 2)},
        base | {"a": torch.arange(4.0) + 1e-7},
        base | {"a": torch.arange(4.0).double()},
        {"x": base["a"], "b": base["b"], "c": base["c"]},
    ]
    assert len({hash_tensors(x) for x in [base, *others]}) == 5


# ------------------------------------------------------------------------------------------------------ strict loading


def test_every_difference_is_reported_and_nothing_is_loaded():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    weights = {name: torch.full_like(value, 7.0) for name, value in module.state_dict().items()}
    del weights["0.bias"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_strictly(module, weights | {"2.weight": torch.ones(1), "1.bias": torch.ones(4)}, source="a.pth")
    for words in ("a.pth", "Sequential", "missing: 0.bias", "unexpected: 2.weight", "1.bias (4,) instead of (3,)"):
        assert words in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_is_optional_keeps_its_values():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    bias = module[0].bias.clone()
    weights = {name: value + 1 for name, value in module.state_dict().items() if "bias" not in name and "batches" not in name}
    assert load_strictly(module, weights, ("0.bias", "1.")) == ["0.bias", "1.bias", "1.num_batches_tracked"]
    assert torch.equal(module[0].bias, bias) and torch.equal(module[1].weight, weights["1.weight"])


def test_one_process_at_a_time_is_inside(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom models.io import exclusive\n"
        "with exclusive(sys.argv[1]):\n    log = Path(sys.argv[2])\n    log.open('a').write('in ')\n"
        "    time.sleep(0.3)\n    log.open('a').write('out ')\n"
    )
    log = tmp_path / "log"
    line = [sys.executable, "-c", program, str(tmp_path / "set"), str(log)]
    processes = [subprocess.Popen(line, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert log.read_text().split() == ["in", "out"] * 3
    assert not [entry for entry in tmp_path.iterdir() if not entry.name.startswith(".") and entry != log]
