"""Conventions of the Hugging Face Hub, without network: folders, the cache, uploads, cards, and versions of files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_predictor import Plain, coloured, logits_of, tiny_net

import pudnet
from pudnet import checkpoint
from pudnet.errors import CheckpointError, InputError

COMMIT = "0123456789012345678901234567890123456789"


def make_predictor() -> pudnet.Predictor:
    return pudnet.Predictor(tiny_net())


def make_net() -> pudnet.PudNet:
    net = tiny_net().eval()
    net.card = {"seed": 7, "steps": 100}
    return net


def make_ghn() -> pudnet.GHN:
    return pudnet.GHN(width=8, num_classes=4).eval()


def make_model() -> pudnet.PredictedModel:
    return make_predictor().predict(*coloured(8), classes=["rose", "tulip|lily", "<b>"])


MAKERS: dict[str, tuple[Callable[[], Any], str]] = {
    "Predictor": (make_predictor, "predictor.safetensors"),
    "PudNet": (make_net, "predictor.safetensors"),
    "GHN": (make_ghn, "predictor.safetensors"),
    "PredictedModel": (make_model, "model.safetensors"),
}
EVERY = pytest.mark.parametrize("name", list(MAKERS))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub sees no network, and says so at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def parameters(shared: Any) -> dict[str, torch.Tensor]:
    return dict((shared.net if isinstance(shared, pudnet.Predictor) else shared).state_dict())


def assert_same(found: Any, wanted: Any) -> None:
    ours, theirs = parameters(found), parameters(wanted)
    assert type(found) is type(wanted) and ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def cached(cache: Path, shared: Any) -> None:
    """What huggingface_hub leaves in its cache when it has downloaded owner/name."""
    repository = cache / "models--owner--name"
    shared.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for reference in ("main", "v1"):
        (repository / "refs" / reference).write_text(COMMIT)


@EVERY
def test_a_folder_holds_everything(name: str, tmp_path: Path) -> None:
    make, file = MAKERS[name]
    shared = make()
    assert shared.save_pretrained(tmp_path / "new" / "my-flowers") is None
    folder = tmp_path / "new" / "my-flowers"
    assert sorted(os.listdir(folder)) == sorted(["README.md", "config.json", file])
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == checkpoint.FORMAT_VERSION and config["version"] == pudnet.__version__
    for path in (folder, str(folder), folder / file):
        assert_same(getattr(pudnet, name).from_pretrained(path), shared)


@pytest.mark.parametrize("name", ["PudNet", "GHN", "PredictedModel"])
def test_the_device_is_the_wanted_one(name: str, tmp_path: Path) -> None:
    MAKERS[name][0]().save(tmp_path / MAKERS[name][1])
    moved = getattr(pudnet, name).from_pretrained(tmp_path, device="meta")
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}


@EVERY
def test_the_cache_is_enough_without_network(name: str, tmp_path: Path, offline: None) -> None:
    shared = MAKERS[name][0]()
    cached(tmp_path, shared)
    load = getattr(pudnet, name).from_pretrained
    for options in ({}, {"revision": "v1"}, {"revision": COMMIT}, {"local_files_only": True}):
        assert_same(load("owner/name", cache_dir=tmp_path, **options), shared)
    for missing in ("owner/other", "owner"):
        with pytest.raises(InputError, match=MAKERS[name][1] if "/" in missing else "owner/name"):
            load(missing, cache_dir=tmp_path)
    with pytest.raises(InputError, match="v9"):
        load("owner/name", cache_dir=tmp_path, revision="v9")


@EVERY
def test_uploads_go_through_the_mixin(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            card = (folder_path / "README.md").read_text()
            asked.append({"token": self.token, "files": sorted(os.listdir(folder_path)), "card": card, **options})
            return "https://there/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    shared = MAKERS[name][0]()
    assert shared.push_to_hub("owner/name", token="t", branch="v2", commit_message="again") == "https://there/commit"
    address = shared.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="owner/name", token="t")
    assert address == "https://there/commit"
    assert (asked[0]["revision"], asked[0]["commit_message"], asked[0]["repo_id"]) == ("v2", "again", "owner/name")
    for upload in asked:
        assert upload["files"] == sorted(["README.md", "config.json", MAKERS[name][1]]) and upload["token"] == "t"
        assert 'from_pretrained("owner/name")' in upload["card"]


def test_the_card_of_a_model_tells_what_it_is(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    model = make_model()
    model.save_pretrained(tmp_path / "flowers")
    card = ModelCard.load(tmp_path / "flowers" / "README.md")
    assert card.data.library_name == "pudnet" and card.data.pipeline_tag == "image-classification"
    assert card.text.startswith("\n# flowers") or card.text.startswith("# flowers")
    for words in ("rose, tulip\\|lily, &lt;b>", "leave-one-out", model.report["provenance"]["model_sha256"]):
        assert words in card.text
    assert f"{100 * model.report['expected_accuracy']:.1f} %" in card.text
    (tmp_path / "flowers" / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "flowers")
    assert (tmp_path / "flowers" / "README.md").read_text() == "my own words"


def test_the_card_of_a_hypernetwork_keeps_how_it_was_made(tmp_path: Path) -> None:
    make_net().save_pretrained(tmp_path / "net")
    card = (tmp_path / "net" / "README.md").read_text()
    assert "| steps | 100 |" in card and "| target | convnet3 |" in card
    loaded = pudnet.Predictor.from_pretrained(tmp_path / "net")
    assert loaded.net.card == {"seed": 7, "steps": 100}
    loaded.save_pretrained(tmp_path / "again")
    assert pudnet.PudNet.from_pretrained(tmp_path / "again").card == {"seed": 7, "steps": 100}


def test_a_model_of_the_callers_network_needs_it_again(tmp_path: Path) -> None:
    target = Plain()
    model = pudnet.Predictor(tiny_net(target)).predict(*coloured(8))
    model.save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match="target"):
        pudnet.PredictedModel.from_pretrained(tmp_path / "x")
    assert_same(pudnet.PredictedModel.from_pretrained(tmp_path / "x", target=target), model)


def test_places_that_cannot_be_written_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be written"):
        make_net().save_pretrained(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        make_net().save_pretrained(tmp_path / "x")


# ---- versions of files --------------------------------------------------------------------------------------------


def rewritten(path: Path, version: object, rename: Callable[[str], str] = str) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pudnet"])
        tensors = {rename(name): file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"pudnet": json.dumps({**header, "format": version})})


def format_1(name: str) -> str:
    return name.removeprefix("pudnet.") if name.startswith("pudnet.") else f"network.{name}"


def test_a_model_of_the_first_format_is_read(tmp_path: Path) -> None:
    model, images = make_model(), coloured(4)[0]
    path = tmp_path / "model.safetensors"
    model.save(path)
    rewritten(path, 1, format_1)
    loaded = pudnet.load(path)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images)) and loaded.report == model.report
    loaded.save(path)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["pudnet"])["format"] == checkpoint.FORMAT_VERSION
        assert "convs.0.weight" in file.keys() and "pudnet.head.weight" in file.keys()  # noqa: SIM118


@EVERY
@pytest.mark.parametrize("version", [0, checkpoint.FORMAT_VERSION + 1, "2", None, True, 1.5])
def test_unknown_versions_are_refused_in_one_sentence(name: str, version: object, tmp_path: Path) -> None:
    make, file = MAKERS[name]
    make().save_pretrained(tmp_path / "x")
    rewritten(tmp_path / "x" / file, version)
    with pytest.raises(CheckpointError, match=r"format must be from 1 to \d; got format .*written by pudnet .*install"):
        getattr(pudnet, name).from_pretrained(tmp_path / "x")


def test_every_format_has_a_way_to_the_present_one() -> None:
    assert sorted(checkpoint.MIGRATIONS) == list(range(1, checkpoint.FORMAT_VERSION))
