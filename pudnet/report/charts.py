"""Charts as SVG that takes its colours from the page, light or dark, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from pudnet.descent import CurvePoint
from pudnet.errors import InputError, message
from pudnet.report.embedding_map import EmbeddingMap
from pudnet.report.measure import Bin

WIDTH, HEIGHT = 3.7, 2.7  # inches: readable at the width of a phone
SCALE = 8  # of kernels, pixels a weight
MARKERS = "s^Dv<>pPX"

# Colours that matplotlib writes, and what the page makes of them.
INK, ACCENT, SECOND, SOFT = "#010203", "#040506", "#070809", "#0a0b0c"
COLOURS = {INK: "currentColor", ACCENT: "var(--accent)", SECOND: "var(--second)", SOFT: "var(--soft)"}


def new_figure(height: float = HEIGHT) -> tuple[Any, Any]:
    """A figure with one pair of axes, in the page's colours.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no display
    except ImportError as error:
        hint = "Type: pip install 'pudnet[cli]'"
        raise InputError(message("pudnet report", "matplotlib", "installed", str(error), hint)) from error
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axis = figure.subplots()
    figure.patch.set_visible(False)
    axis.patch.set_visible(False)
    axis.tick_params(colors=INK, labelsize=8.5)
    for name in ("top", "right"):
        axis.spines[name].set_visible(False)
    for name in ("left", "bottom"):
        axis.spines[name].set_color(INK)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, size=9)
    return figure, axis


def svg(figure: Any, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element, well-formed XML.

    Args:
        name: tells its identifiers from those of other figures on the page.
        alt: what a reader who cannot see it is told.
    """
    from matplotlib import rc_context

    written = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pudnet"}):
        figure.savefig(written, format="svg", metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r"font(-family)?: ?([\d.]+px )?'[^;\"]*", lambda found: _font(found[2]), body)
    for colour, name in COLOURS.items():
        body = body.replace(colour, name)
    return f'<svg {box[0]} role="img" aria-label="{escape(alt)}">{body}'


def _font(size: str | None) -> str:
    """The page's own font, in the size matplotlib chose."""
    return "font-family: inherit" if size is None else f"font-size: {size.strip()}; font-family: inherit"


def _legend(axis: Any) -> None:
    """Under the whole figure, so that nothing covers the data."""
    legend = axis.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_bins(bins: Sequence[Bin]) -> str:
    """Share of correct answers against how probable the model found them."""
    figure, axis = new_figure()
    axis.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle="--")
    places = [100 * one.probability for one in bins], [100 * one.top1 for one in bins]
    axis.plot(*places, color=ACCENT, linewidth=1)
    most = max(one.n for one in bins)
    axis.scatter(*places, s=[10 + 80 * one.n / most for one in bins], color=ACCENT, clip_on=False)
    axis.set(xlim=(0, 102), ylim=(0, 102))
    axis.set_xlabel("the model's own probability, %")
    axis.set_ylabel("correct, %")
    points = "; ".join(f"{n} images at {100 * p:.0f} %: {100 * top1:.0f} % correct" for n, p, top1 in bins)
    return svg(figure, "bins", f"Correct answers by the model's own probability. {points}.")


def draw_map(found: EmbeddingMap) -> str:
    """The datasets as clouds of points; each has a marker of its own."""
    figure, axis = new_figure(3.5)
    for number, cloud in enumerate(found.clouds):
        marker, size, colour, fill = {
            "own": ("*", 10, ACCENT, ACCENT),
            "training": ("o", 5, SOFT, "none"),
            "reference": (MARKERS[number % len(MARKERS)], 5, SECOND, SECOND),
        }[cloud.kind]
        x, y = cloud.points.T.tolist()
        axis.plot(x, y, marker, color=colour, markerfacecolor=fill, markersize=size, alpha=0.85, label=cloud.name)
    _legend(axis)
    axis.margins(0.1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("first component")
    axis.set_ylabel("second component")
    names = ", ".join(cloud.name for cloud in found.clouds[1:])
    own = found.clouds[0].name
    return svg(figure, "map", f"Map of dataset embeddings: {own} among {names}. Nearest to it: {found.nearest}.")


def draw_curve(points: Sequence[CurvePoint], seconds: float, top1: float, chance: float) -> str:
    """Training from scratch, accuracy against seconds, and the predicted model as one point."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axis = new_figure(3.0)
    seen = [p.seconds for p in points], [100 * p.top1 for p in points]
    axis.plot(*seen, color=SECOND, linewidth=1.5, label="trained from scratch")
    axis.plot(seconds, 100 * top1, "*", color=ACCENT, markersize=11, label="predicted", linestyle="none")
    axis.axhline(100 * top1, color=ACCENT, linewidth=0.7, linestyle="--")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(100 * chance * 0.9, 104)
    axis.set_xlabel("seconds")
    axis.set_ylabel("accuracy, %")
    _legend(axis)
    last = points[-1]
    first = f"{100 * points[0].top1:.1f} % after {points[0].seconds:.1f} s"
    alt = (
        f"Accuracy against seconds. Predicted: {100 * top1:.1f} % after {seconds:.2f} s. "
        f"Trained from scratch: {first}, {100 * last.top1:.1f} % after {last.seconds:.1f} s."
    )
    return svg(figure, "curve", alt)


# ---- pictures ---------------------------------------------------------------------------------------------------


def png(pixels: Tensor) -> str:
    """uint8 ``[H, W, 3]`` or, with opacity, ``[H, W, 4]`` as a data URI.

    Raises:
        InputError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        hint = "Type: pip install 'pudnet[cli]'"
        raise InputError(message("pudnet report", "Pillow", "installed", str(error), hint)) from error
    written = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def kernel_picture(weight: Tensor) -> tuple[str, int]:
    """Kernels ``[O, I, kH, kW]`` side by side: a data URI, and how many are in a row.

    Three input channels are red, green and blue, of any other number the mean is grey. Every kernel has its own scale:
    zero is mid-grey, its largest value in size black or white.
    """
    weight = weight.detach().float().cpu()
    colours = weight if weight.shape[1] == 3 else weight.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    largest = colours.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    grey = (127.5 * (1 + colours / largest)).round().to(torch.uint8)
    tiles = grey.repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3)  # [O, 3, kH * SCALE, kW * SCALE]
    opaque = torch.full_like(tiles[:, :1], 255)
    gap = SCALE // 2
    padded = torch.nn.functional.pad(torch.cat([tiles, opaque], 1), (0, gap, 0, gap))  # transparent gaps
    across = min(len(padded), 8 if len(padded) <= 64 else 16)
    missing = -len(padded) % across
    padded = torch.cat([padded, padded.new_zeros(missing, *padded.shape[1:])])
    _, channels, height, width = padded.shape
    rows = padded.view(-1, across, channels, height, width).permute(0, 3, 1, 4, 2)  # [rows, h, across, w, 4]
    return png(rows.reshape(-1, across * width, channels).contiguous()), across


def confusion_picture(confusion: Tensor, colour: tuple[int, int, int]) -> str:
    """Shares of each true class ``[K, K]`` as the opacity of ``colour``, one pixel a pair: a data URI."""
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    opacity = (255 * shares.sqrt()).round().to(torch.uint8)
    plane = torch.tensor(colour, dtype=torch.uint8).expand(*opacity.shape, 3)
    return png(torch.cat([plane, opacity[..., None]], 2).contiguous())
