"""``pudnet report``: what is on the page is right, and the page is one that a person can open anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pudnet
from pudnet.checkpoint import PRETRAINED
from pudnet.cli import app
from pudnet.data.source import open_images
from pudnet.errors import InputError
from pudnet.report import embedding_map as maps
from pudnet.report import write_report
from pudnet.report.charts import kernel_picture
from pudnet.report.measure import measure
from pudnet.report.page import TEMPLATE

SIDE = 16
CLASSES = 9  # their confusion matrix is wider than a phone
STRANGE = 'a <b>&"quoted"</b> $x_1$'


def images(labels: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Every class has its own grey, with enough noise that some are confused."""
    noise = np.random.default_rng(seed).integers(0, 120, (len(labels), SIDE, SIDE, 3))
    return (noise + 20 * labels[:, None, None, None] % 130).astype(np.uint8)


def write_npz(path: Path, classes: int, **names: Any) -> Path:
    y_train, y_test = np.repeat(np.arange(classes), 8), np.repeat(np.arange(classes), 5)
    parts = {"x_train": images(y_train, 0), "y_train": y_train, "x_test": images(y_test, 1), "y_test": y_test}
    np.savez(path, **parts, **names)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained hypernetwork."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    pudnet.PudNet("convnet3", image_size=SIDE, width=8, generator_width=2).save(path)
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> pudnet.Predictor:
    return pudnet.Predictor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = np.array(["grey", "light", STRANGE, *(f"class {number}" for number in range(3, CLASSES))])
    return write_npz(tmp_path_factory.mktemp("data") / "nine & more.npz", CLASSES, class_names=names)


@pytest.fixture(scope="module")
def model(predictor: pudnet.Predictor, data: Path) -> pudnet.PredictedModel:
    return predictor.predict(data)


@pytest.fixture(scope="module")
def page(model: pudnet.PredictedModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, model, data, scratch_seconds=0.3)
    return path


def parse(page: Path) -> ET.Element:
    """The page as XML: it is well-formed."""
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.partition("\n")[2])


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def section(page: ET.Element, name: str) -> ET.Element:
    found = page.find(f".//section[@aria-labelledby='{name}']")
    assert found is not None, name
    return found


# ---- the page ---------------------------------------------------------------------------------------------------


def test_page_needs_nothing_from_anywhere(page: Path) -> None:
    tree = parse(page)
    for element in tree.iter():
        assert element.tag not in ("script", "link", "iframe", "object")
        for name, value in element.attrib.items():
            if name in ("src", "href"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:80]
            assert not re.search(r"url\((?!#)|@import", value)
    style = tree.find(".//style")
    assert style is not None and not re.search(r"url\(|@import|//", style.text or "")
    assert "http" not in page.read_text()


def test_page_can_be_read_without_seeing_it(page: Path) -> None:
    tree = parse(page)
    assert tree.attrib["lang"] == "en"
    assert all(element.attrib["alt"] for element in tree.iter("img"))
    assert all(element.attrib["aria-label"] for element in tree.iter("svg"))
    ids = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    used = {value[1:] for element in tree.iter() for name, value in element.attrib.items() if name == "href"}
    used |= set(re.findall(r"url\(#([^)]+)\)", page.read_text()))
    used |= {element.attrib["aria-labelledby"] for element in tree.iter("section")}
    assert used <= set(ids)
    assert next(element.tag for element in tree.iter() if element.tag in ("h1", "h2")) == "h1"


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """At least 4.5, what WCAG asks of text, on both backgrounds."""
    block = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
    for text in ("ink", "soft", "accent", "second", "wrong", "right"):
        for background in ("paper", "card"):
            first, second = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
            assert (first + 0.05) / (second + 0.05) >= 4.5, (text, background)


def test_numbers_are_those_of_the_model(page: Path, model: pudnet.PredictedModel, data: Path) -> None:
    tree, expected = parse(page), model.evaluate(data)
    facts = [words(fact) for fact in tree.iter("dd")]
    assert facts[0].startswith(f"{100 * expected['top1']:.1f} %")
    assert facts[1] == f"{100 * model.report['expected_accuracy']:.1f} %"
    rows = {words(row[0]): words(row[2]) for row in section(tree, "classes").iter("tr") if len(row) == 4}
    for name, one in expected["per_class"].items():
        assert rows[" ".join(name.split())] == f"{100 * one['top1']:.1f} %"
    assert f"{expected['nll']:.3f}" in words(section(tree, "trust"))
    counts = [[words(cell).replace("·", "0") for cell in row[1:]] for row in section(tree, "confusion").iter("tr")]
    assert sum(int(count) for row in counts[1 : 1 + CLASSES] for count in row) == expected["n"] == 5 * CLASSES
    assert len(list(section(tree, "samples").iter("img"))) == 24
    assert STRANGE in words(tree) and "nine & more.npz" in words(tree)
    times = [words(row[1]) for row in section(tree, "time").iter("tr")][1:]
    assert sum(map(float, times)) == pytest.approx(model.report["seconds"]["total"], rel=0.1, abs=0.01)
    assert "was stopped in epoch" in words(section(tree, "scratch"))


@pytest.fixture(scope="module")
def long_page(predictor: pudnet.Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many classes with long names."""
    folder = tmp_path_factory.mktemp("many")
    names = np.array([f"{number}_{'a_name_without_a_space' * 3}" for number in range(22)])
    source = write_npz(folder / "many.npz", 22, class_names=names)
    write_report(folder / "page.html", predictor.predict(source), source, title="Many <classes>")
    return folder / "page.html"


def test_many_classes(long_page: Path) -> None:
    """A picture of the confusion matrix instead of a table, and most classes folded away."""
    tree = parse(long_page)
    assert words(next(tree.iter("h1"))) == "Many <classes>"
    assert len(list(section(tree, "confusion").iter("img"))) == 1
    tables = list(section(tree, "classes").iter("table"))
    assert [len(list(table.iter("tr"))) - 1 for table in tables] == [10, 22]
    assert len(list(section(tree, "samples").iter("img"))) == 24
    assert tree.find(".//section[@aria-labelledby='scratch']") is None


def test_training_images_are_called_so(predictor: pudnet.Predictor, data: Path, tmp_path: Path) -> None:
    with np.load(data) as file:
        np.savez(tmp_path / "no_test.npz", x_train=file["x_train"], y_train=file["y_train"])
    source = tmp_path / "no_test.npz"
    write_report(tmp_path / "page.html", predictor.predict(source), source)
    text = words(parse(tmp_path / "page.html"))
    assert "there is no test part" in text and "are probably the same" in text


def test_a_map_only_with_the_same_checkpoint(
    model: pudnet.PredictedModel, checkpoint: Path, data: Path, page: Path, tmp_path: Path
) -> None:
    assert "nearest to it" in words(section(parse(page), "map"))
    saved = checkpoint.read_bytes()
    try:
        pudnet.PudNet("convnet3", image_size=SIDE, width=8, generator_width=2, seed=1).save(checkpoint)
        write_report(tmp_path / "changed.html", model, data)
        checkpoint.unlink()
        write_report(tmp_path / "gone.html", model, data)
    finally:
        checkpoint.write_bytes(saved)
    assert "it has changed since" in words(section(parse(tmp_path / "changed.html"), "map"))
    assert "There is no map" in words(section(parse(tmp_path / "gone.html"), "map"))


# ---- its parts --------------------------------------------------------------------------------------------------


class Answers(torch.nn.Module):
    """A model that answers as the first pixel of an image says: class in red, probability in green (per cent)."""

    classes, batchnorm = ("a", "b", "c"), "calibrated"

    def classify(self, pixels: torch.Tensor) -> Any:
        first = pixels[:, 0, 0].float()
        rest = (1 - first[:, 1:2] / 100) / 2
        found = rest.expand(-1, 3).scatter(1, first[:, :1].long(), first[:, 1:2] / 100)
        return pudnet.predicted.Classification([], found)


def test_measure_by_hand() -> None:
    answers = [(0, 90), (0, 92), (1, 60), (1, 99), (2, 55), (0, 51)]
    truth = torch.tensor([0, 0, 0, 2, 2, 1])
    pixels = torch.zeros(6, 4, 4, 3, dtype=torch.uint8)
    pixels[:, 0, 0, :2] = torch.tensor(answers, dtype=torch.uint8)
    found = measure(Answers(), open_images(pixels, truth, size=4, classes=("a", "b", "c")))  # type: ignore[arg-type]
    assert found.confusion.tolist() == [[2, 1, 0], [1, 0, 0], [0, 1, 1]]
    assert (found.n, found.top1) == (6, 0.5) and found.error == pytest.approx((0.25 / 6) ** 0.5)
    assert [(row.name, row.n, row.top1) for row in found.per_class] == [("a", 3, 2 / 3), ("b", 1, 0), ("c", 2, 0.5)]
    assert [(sample.truth, sample.answer) for sample in found.mistakes] == [("c", "b"), ("a", "b"), ("b", "a")]
    assert sorted((row.truth, row.answer, row.n) for row in found.confusions(5)) == [
        ("a", "b", 1), ("b", "a", 1), ("c", "b", 1)
    ]  # fmt: skip
    assert [one.n for one in found.bins] == [2, 1, 3]  # 50-60, 60-70, 90-100 %
    assert found.bins[2].probability == pytest.approx((0.9 + 0.92 + 0.99) / 3)
    assert found.bins[2].top1 == pytest.approx(2 / 3)
    own = torch.tensor([0.9, 0.92, 0.2, 0.005, 0.55, 0.245])
    assert found.nll == pytest.approx(float(-own.log().mean()), rel=1e-4)


def test_a_dataset_is_nearest_to_its_like(predictor: pudnet.Predictor) -> None:
    generator = torch.Generator().manual_seed(5)
    for name in ("outlines", "noise", "handwritten digits"):
        sample = maps.REFERENCES[name](100, generator)
        assert sample is not None
        found = maps.embedding_map(predictor.net, "mine", sample)
        assert found.nearest == name
        assert [cloud.name for cloud in found.clouds] == ["mine", *maps.REFERENCES]
        assert [cloud.kind for cloud in found.clouds].count("own") == 1
        assert {cloud.points.shape for cloud in found.clouds} == {(maps.PARTS, 2)} and 0 < found.explained <= 1


def test_embeddings_beside_a_checkpoint_belong_to_it(predictor: pudnet.Predictor, tmp_path: Path) -> None:
    bundled = PRETRAINED / "convnet3.safetensors"
    digest = hashlib.sha256(bundled.read_bytes()).hexdigest()
    ((name, rows),) = maps.load_embeddings(bundled, digest).items()
    assert rows.shape == (16, 2 * 128) and name.startswith("Tiny-ImageNet")
    assert maps.load_embeddings(bundled, "of another checkpoint") == {}
    assert maps.load_embeddings(tmp_path / "none.safetensors", digest) == {}
    points = torch.zeros(3, 2 * 8)
    found = maps.embedding_map(predictor.net, "mine", torch.zeros(9, 8, 8, 3, dtype=torch.uint8), {"known": points})
    assert [(cloud.name, cloud.kind) for cloud in found.clouds[:2]] == [("mine", "own"), ("known", "training")]
    assert len(found.clouds[1].points) == 3 and "hollow circles" in found.origin


def test_kernels_are_drawn_in_rows_on_nothing() -> None:
    import base64
    import io

    from PIL import Image

    weight = torch.zeros(10, 3, 2, 2)
    weight[:, 0, 0, 0], weight[:, 1, 0, 0] = 1, -1  # red light, green dark
    uri, across = kernel_picture(weight)
    assert across == 8
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (8 * 20, 2 * 20)
    assert picture.getpixel((0, 0)) == (255, 0, 128, 255) and picture.getpixel((10, 10)) == (128, 128, 128, 255)
    assert picture.getpixel((17, 3)) == (0, 0, 0, 0) == picture.getpixel((100, 30))  # between them, and beyond the last


# ---- the commands -----------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_commands(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    saved, first, second = (tmp_path / name for name in ("m.safetensors", "first.html", "second.html"))
    done = run("predict", data, "-o", saved, "--checkpoint", checkpoint, "--report", first)
    assert done.exit_code == 0, done.stderr
    done = run("report", saved, data, "-o", second, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"] == str(second) and found["n"] == 5 * CLASSES and "scratch_top1" not in found
    # The same model on the same images: the same page.
    assert first.read_text() == second.read_text()
    shown = run("report", "--help").stdout
    assert "pudnet report" in shown.partition("Example:")[2] and "--scratch" in shown


def test_bad_input(model: pudnet.PredictedModel, data: Path, tmp_path: Path) -> None:
    saved = tmp_path / "m.safetensors"
    model.save(saved)
    for arguments, word in (
        ((tmp_path / "none", data), "none"),
        ((saved, tmp_path / "none.npz"), "none.npz"),
        ((saved, data, "-o", tmp_path / "no" / "page.html"), "page.html"),
    ):
        done = run("report", *arguments)
        assert done.exit_code == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1
    with pytest.raises(InputError, match="scratch_seconds"):
        write_report(tmp_path / "page.html", model, data, scratch_seconds=-1)
    assert not (tmp_path / "page.html").exists()


# ---- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.skip(f"none of {', '.join(names)} is on the PATH")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(
    ("name", "width", "scheme"), [("page", 320, "light"), ("page", 1200, "dark"), ("long_page", 320, "dark")]
)
def test_page_in_chromium(
    browser: Any, request: pytest.FixtureRequest, name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    page: Path = request.getfixturevalue(name)
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme, offline=True)
    shown, noise = context.new_page(), []
    shown.on("console", lambda entry: noise.append(entry.text))
    shown.on("pageerror", lambda error: noise.append(str(error)))
    shown.on("request", lambda request: request.url.startswith("data:") or noise.append(request.url))
    shown.goto(page.as_uri())
    assert noise == [page.as_uri()]
    assert shown.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out to the right
    background = [
        int(part) for part in re.findall(r"\d+", shown.evaluate("getComputedStyle(document.body).backgroundColor"))
    ]
    assert (max(background) < 60) == (scheme == "dark")
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert shown.evaluate(broken) == 0
    assert shown.evaluate("Math.min(...[...document.querySelectorAll('svg')].map(x => x.clientHeight))") > 100
    small = "Math.min(...[...document.querySelectorAll('svg text')].map(x => x.getBoundingClientRect().height))"
    assert shown.evaluate(small) > 7  # text in charts, in pixels
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()
