"""Where weights are looked for, and what a user reads when there are none."""

from __future__ import annotations

import json
import socket
import time

import pytest

from models.encoders import weights
from models.encoders.weights import WeightsUnavailable, find_weights, tensor_file


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(weights.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "hub_reachable", lambda: False)
    return tmp_path / "cache"


def test_a_given_path_is_the_only_place(tmp_path):
    assert find_weights("net", "org/net", str(tmp_path), "encoder.vision.weights") == tmp_path
    with pytest.raises(WeightsUnavailable, match="nowhere does not exist"):
        find_weights("net", "org/net", str(tmp_path / "nowhere"), "encoder.vision.weights")


def test_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "weights_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "net.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_weights("net", None, "package://weights_in_a_package/net.safetensors", "x").name == "net.safetensors"
    with pytest.raises(WeightsUnavailable, match="package://absent_package"):
        find_weights("net", None, "package://absent_package/net", "x")


def test_message_says_where_it_looked_and_what_to_do(no_hub):
    with pytest.raises(WeightsUnavailable) as error:
        find_weights("facebook/dinov2-large", "facebook/dinov2-large", None, "encoder.vision.weights")
    message = str(error.value)
    for part in (str(no_hub), "hf download facebook/dinov2-large", "encoder.vision.weights=/path/to/dinov2-large"):
        assert part in message


def test_cache_counts_only_when_whole(no_hub):
    snapshot = no_hub / "models--org--net" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = no_hub / "models--org--net" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    with pytest.raises(WeightsUnavailable):
        find_weights("net", "org/net", None, "x")
    (snapshot / "model-2.safetensors").touch()
    assert find_weights("net", "org/net", None, "x") == snapshot


def test_probe_is_bounded_and_asked_once(monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts a connection and never answers
    monkeypatch.setattr(weights.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_PROBE_SECONDS", 0.2)
    weights.hub_reachable.cache_clear()
    calls = []
    wait = time.monotonic()
    assert not weights.hub_reachable()
    assert time.monotonic() - wait < 3
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *a, **k: calls.append(a))
    assert not weights.hub_reachable() and not calls
    weights.hub_reachable.cache_clear()
    silent.close()


def test_offline_is_never_probed(monkeypatch):
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights.threading, "Thread", None)
    weights.hub_reachable.cache_clear()
    assert not weights.hub_reachable()
    weights.hub_reachable.cache_clear()


def test_tensor_file(tmp_path):
    with pytest.raises(WeightsUnavailable, match="no file of weights"):
        tensor_file(tmp_path)
    (tmp_path / "a.pth").touch()
    assert tensor_file(tmp_path).name == "a.pth"
    (tmp_path / "b.pth").touch()
    with pytest.raises(WeightsUnavailable, match="several"):
        tensor_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert tensor_file(tmp_path).name == "model.safetensors"
