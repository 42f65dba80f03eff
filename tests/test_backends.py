"""Who decides which backend runs, and what is said when it cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import pudnet
from pudnet import backends
from pudnet.errors import BackendUnavailableError, InputError
from pudnet.info import info

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PUDNET_BACKEND", raising=False)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """A made-up op whose answer is the name of the backend that ran; native refuses numbers above 10."""
    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setitem(backends._PROBES, "native", lambda device_type, index: [])
    backends._backend_reasons.cache_clear()
    backends.register_op("probe", lambda x: "reference")

    def why_not(x: int) -> list[str]:
        return ["x is above 10"] if x > 10 else []

    backends.register("probe", "native", lambda x: "native", devices=("cpu", "cuda"), why_not=why_not)
    backends.register("probe", "triton", lambda x: "triton", devices=("cuda",))
    yield lambda x=1, backend=None: backends.call("probe", CPU, backend, x)
    backends._backend_reasons.cache_clear()


def test_automatic_takes_the_first_that_can(probe: Callable[..., object]) -> None:
    assert probe(1) == "native"
    assert probe(11) == "reference"


def test_order_of_authority(probe: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUDNET_BACKEND", "reference")
    assert probe() == "reference"
    with pudnet.use_backend("native"):
        assert probe() == "native"
        assert probe(backend="reference") == "reference"
        with pudnet.use_backend("reference"):
            assert probe() == "reference"
        assert probe() == "native"
    assert probe() == "reference"
    with pudnet.use_backend("automatic"):
        assert probe() == "native"
    assert probe(backend="automatic") == "native"


def test_one_op_can_be_asked_for(probe: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    with pudnet.use_backend("reference", "class_stats"):
        assert probe() == "native"
    with pudnet.use_backend("native"), pudnet.use_backend("reference", "probe"):
        assert probe() == "reference"
    monkeypatch.setenv("PUDNET_BACKEND", "class_stats=native, probe=reference")
    assert probe() == "reference"
    with pytest.raises(InputError, match="op must be one of"), pudnet.use_backend("native", "no_such_op"):
        pass


def test_a_named_backend_never_gives_way(probe: Callable[..., object]) -> None:
    with pytest.raises(BackendUnavailableError) as caught, pudnet.use_backend("native"):
        probe(11)
    text = str(caught.value)
    assert "'native' was asked for" in text
    assert "native: x is above 10" in text
    assert "reference: can run it" in text
    assert "triton: triton probe runs on cuda tensors; these are on cpu" in text
    assert "compiled: " in text


def test_unknown_names(probe: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="backend must be one of"):
        probe(backend="cuda")
    with pytest.raises(InputError, match="use_backend: backend"), pudnet.use_backend("fast"):
        pass
    monkeypatch.setenv("PUDNET_BACKEND", "fast")
    with pytest.raises(InputError, match=r"PUDNET_BACKEND: backend must be one of .* got 'fast'"):
        probe()


def test_a_probe_that_raises_is_a_reason(probe: Callable[..., object]) -> None:
    assert probe("not a number") == "reference"
    with pytest.raises(BackendUnavailableError, match="its probe failed: TypeError"):
        probe("not a number", backend="native")


def test_use_backend_stays_in_its_thread(probe: Callable[..., object]) -> None:
    seen = []
    with pudnet.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(probe()))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_a_choice_is_logged_once(probe: Callable[..., object], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pudnet"):
        probe()
        probe()
        probe(11)
    assert [record.getMessage() for record in caplog.records] == [
        "probe runs on the native backend for cpu tensors",
        "probe runs on the reference backend for cpu tensors",
    ]


def test_explain_gives_every_op_and_backend() -> None:
    table = backends.explain("cpu")
    assert {"image_stats", "class_stats"} <= set(table)
    for row in table.values():
        assert tuple(row) == backends.BACKENDS
        assert row["reference"] == []
    assert table["class_stats"]["triton"] == ["class_stats has no triton implementation"]
    assert backends.explain("meta")["class_stats"]["native"] == [
        "native class_stats runs on cpu and cuda tensors; these are on meta"
    ]


def test_info_is_complete_and_plain() -> None:
    import json

    described = json.loads(json.dumps(info()))
    assert described["versions"]["pudnet"] == pudnet.__version__
    assert described["backends"]["cpu"]["class_stats"]["reference"] == []
    assert described["extension"]["available"] or described["extension"]["reason"]
