"""Families of figures on a ground: glyphs, shapes, strokes, objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pudnet.data.families.drawing import (
    COLUMNS,
    ROWS,
    SIDE,
    Kind,
    affine,
    band,
    colours,
    ellipse,
    ground,
    noise,
    normal,
    paint,
    radians,
    uniform,
    warp,
)
from pudnet.errors import InputError, message

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = 40  # pixels of a picture that is warped
HINT = "Type: pip install 'pudnet[cli]'"


def _pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InputError(message("families.draw", "Pillow", "installed", str(error), HINT)) from error


def _figure_kind(name: str, templates: Tensor, inverted: bool, clutter: Tensor, turn: float) -> Kind:
    """A class of pictures ``[m, 40, 40]``, one of them in each image, with bits of ``clutter`` ``[c, 40, 40]``."""

    def images(n: int, rng: np.random.Generator) -> Tensor:
        chosen = templates[torch.from_numpy(rng.integers(len(templates), size=n))]
        mask = warp(chosen, *affine(rng, n, turn=turn, scale=(0.6, 1.0), shear=0.15, shift=0.2))
        bright, dark = colours(rng, n)
        back = ground(rng, n, dark, 0.06)
        for _ in range(2):
            bits = clutter[torch.from_numpy(rng.integers(len(clutter), size=n))]
            small = warp(bits, *affine(rng, n, turn=math.pi, scale=(0.1, 0.3), shift=1.0))
            back = paint(small, uniform(rng, 0.1, 0.8, n, 1, 1, 3), back)
        painted = paint(mask, bright, back)
        return 1 - painted if inverted else painted

    return Kind(name, images)


# ---- glyphs -----------------------------------------------------------------------------------------------------

# Characters that another one looks like under an affine map are left out.
LATIN = "ABCDEFGHIJKLMNPQRSTUVWXYZabdefghijkmnpqrtuy"
DIGITS = "0123456789"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω"
CYRILLIC = "БДЖЗИЙЛУЦЧШЩЪЫЬЭЮЯабвдё"
ARMENIAN = "".join(map(chr, [*range(0x531, 0x557), *range(0x561, 0x587)]))
GEORGIAN = "".join(map(chr, range(0x10D0, 0x10F6)))
HEBREW = "".join(map(chr, range(0x5D0, 0x5EB)))
SYMBOLS = "←↑→↓↔↕∀∂∃∅∇∈∏∑√∞∠∧∩∫≈≠≡≤⊂⊕⊗⊥⌂▲◆○☺☼♀♂♠♣♥♦♪♫"
CHARACTERS = "".join(dict.fromkeys(LATIN + DIGITS + GREEK + CYRILLIC + ARMENIAN + GEORGIAN + HEBREW + SYMBOLS))
UNICODE_FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")  # each in up to four styles
LATIN_FONTS = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")  # other characters have codes of their own there


@lru_cache(maxsize=1)
def _fonts() -> dict[Path, frozenset[int]]:
    """The fonts that matplotlib brings, and the characters of each."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise InputError(message("families.draw", "matplotlib", "installed", str(error), HINT)) from error
    fonts = {}
    for path in sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")):
        family = path.stem.split("-")[0].removesuffix("Italic").removesuffix("Ita").removesuffix("Bol")
        if family in UNICODE_FONTS:
            fonts[path] = frozenset(FT2Font(str(path)).get_charmap())
        elif family in LATIN_FONTS:
            fonts[path] = frozenset(map(ord, LATIN + DIGITS))
    return fonts


@lru_cache(maxsize=512)
def _renderings(character: str) -> Tensor:
    """The character in every font that has it, larger side 3/4 of the picture: ``[fonts, 40, 40]``."""
    from PIL import Image, ImageDraw, ImageFont

    drawn = []
    for path, known in _fonts().items():
        if ord(character) not in known:
            continue
        font = ImageFont.truetype(str(path), TEMPLATE)
        left, top, right, bottom = font.getbbox(character)
        picture = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
        ImageDraw.Draw(picture).text((-left, -top), character, fill=255, font=font)
        drawn.append(_centred(picture))
    return torch.stack(drawn)


def _centred(picture: Image) -> Tensor:
    from PIL import Image

    scale = 0.75 * TEMPLATE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("L", (TEMPLATE, TEMPLATE))
    canvas.paste(picture.resize((width, height)), ((TEMPLATE - width) // 2, (TEMPLATE - height) // 2))
    return torch.from_numpy(np.array(canvas, dtype=np.float32) / 255)


def glyphs(count: int, rng: np.random.Generator) -> list[Kind]:
    """Characters of several scripts in up to 21 fonts."""
    _pillow()
    if count > len(CHARACTERS):
        raise InputError(message("families.draw", "classes", f"at most {len(CHARACTERS)} of glyphs", count))
    chosen = [CHARACTERS[place] for place in rng.permutation(len(CHARACTERS))[:count]]
    inverted = bool(rng.random() < 0.5)
    clutter = torch.cat([_renderings(character) for character in "-/.("])
    return [_figure_kind(f"U+{ord(one):04X}", _renderings(one), inverted, clutter, radians(15)) for one in chosen]


# ---- shapes -----------------------------------------------------------------------------------------------------

Outline = list[tuple[float, float]]  # of a polygon, about the origin


def _radial(radius: Callable[[float], float], corners: int, start: float = -math.pi / 2) -> Outline:
    turns = [start + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius(turn - start) * math.cos(turn), radius(turn - start) * math.sin(turn)) for turn in turns]


def _regular(corners: int) -> Outline:
    return _radial(lambda _: 1.0, corners)


def _star(points: int, inner: float) -> Outline:
    return [
        (x * size, y * size)
        for number, (x, y) in enumerate(_regular(2 * points))
        for size in (inner if number % 2 else 1.0,)
    ]


def _flower(petals: int) -> Outline:
    return _radial(lambda turn: 0.7 + 0.3 * math.cos(petals * turn), 96)


def _stretched(outline: Outline, height: float) -> Outline:
    return [(x, y * height) for x, y in outline]


def _cross(arm: float) -> Outline:
    return [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1),
            (-arm, -1), (-arm, -arm), (-1, -arm), (-1, arm), (-arm, arm), (-arm, 1)]  # fmt: skip


FIXED: dict[str, Outline] = {
    **{f"polygon-{corners}": _regular(corners) for corners in (3, 4, 5, 6, 8)},
    **{f"star-{points}": _star(points, 0.45) for points in (3, 4, 5, 6, 8, 12)},
    **{f"flower-{petals}": _flower(petals) for petals in (2, 3, 4, 5, 7)},
    "disc": _regular(64),
    "ellipse": _stretched(_regular(64), 0.55),
    "rhombus": _stretched(_regular(4), 0.5),
    "bar": _stretched([(1, 1), (1, -1), (-1, -1), (-1, 1)], 0.25),
    "rectangle": _stretched([(1, 1), (1, -1), (-1, -1), (-1, 1)], 0.55),
    "trapezium": [(1, 0.7), (0.5, -0.7), (-0.5, -0.7), (-1, 0.7)],
    "parallelogram": [(0.6, 0.6), (1, -0.6), (-0.6, -0.6), (-1, 0.6)],
    "cross": _cross(0.35),
    "thin cross": _cross(0.15),
    "arrow": [(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)],
    "L": [(-0.7, -1), (-0.2, -1), (-0.2, 0.5), (0.7, 0.5), (0.7, 1), (-0.7, 1)],
    "T": [(-0.9, -0.9), (0.9, -0.9), (0.9, -0.4), (0.25, -0.4), (0.25, 0.9), (-0.25, 0.9), (-0.25, -0.4), (-0.9, -0.4)],
    "U": [(-0.8, -0.9), (-0.35, -0.9), (-0.35, 0.4), (0.35, 0.4), (0.35, -0.9), (0.8, -0.9), (0.8, 0.9), (-0.8, 0.9)],
    "Z": [(-0.8, -0.9), (0.8, -0.9), (0.8, -0.5), (-0.1, 0.5), (0.8, 0.5), (0.8, 0.9), (-0.8, 0.9), (-0.8, 0.5),
          (0.1, -0.5), (-0.8, -0.5)],
    "half disc": [(math.cos(turn), math.sin(turn) - 0.4) for turn in np.linspace(0, math.pi, 32)],
    "sector": [(0, 0), *((math.cos(turn), math.sin(turn)) for turn in np.linspace(0.6, 2 * math.pi - 0.6, 48))],
    "crescent": [*((math.cos(turn), math.sin(turn)) for turn in np.linspace(-1.3, 1.3, 32)),
                 *((0.55 * math.cos(turn) + 0.1, math.sin(turn)) for turn in np.linspace(1.25, -1.25, 32))],
    "heart": [(math.sin(turn) ** 3, -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn)) / 16)
              for turn in np.linspace(0, 2 * math.pi, 64)],
}  # fmt: skip
FINER = 4  # a shape is drawn so many times larger


def _random_outline(rng: np.random.Generator) -> Outline:
    corners = int(rng.integers(5, 10))
    turns = 2 * math.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners
    return [
        (r * math.cos(turn), r * math.sin(turn)) for r, turn in zip(rng.uniform(0.3, 1, corners), turns, strict=True)
    ]


def _shape(outline: Outline, style: str) -> Tensor:
    """One picture ``[1, 40, 40]``: ``filled``, ``outline`` or ``double`` (a filled one inside an outline)."""
    from PIL import Image, ImageDraw

    side = TEMPLATE * FINER
    largest = max(math.hypot(x, y) for x, y in outline)

    def points(size: float) -> Outline:
        return [((0.5 + size * x / largest) * side, (0.5 + size * y / largest) * side) for x, y in outline]

    picture = Image.new("L", (side, side))
    pen = ImageDraw.Draw(picture)
    if style == "filled":
        pen.polygon(points(0.42), fill=255)
    else:
        around = points(0.4)
        pen.line([*around, around[0], around[1]], fill=255, width=3 * FINER, joint="curve")
        if style == "double":
            pen.polygon(points(0.2), fill=255)
    return torch.from_numpy(np.array(picture.reduce(FINER), dtype=np.float32) / 255)[None]


def shapes(count: int, rng: np.random.Generator) -> list[Kind]:
    """Geometric shapes, filled or not; after the named ones, random polygons."""
    _pillow()
    inverted = bool(rng.random() < 0.5)
    named = [(name, outline, style) for name, outline in FIXED.items() for style in ("filled", "outline", "double")]
    chosen = [named[place] for place in rng.permutation(len(named))[:count]]
    for number in range(count - len(chosen)):
        style = ("filled", "outline", "double")[rng.integers(3)]
        chosen.append((f"random {number}", _random_outline(rng), style))
    clutter = torch.cat([_shape(FIXED[name], "filled") for name in ("bar", "disc", "polygon-3")])
    return [
        _figure_kind(f"{name} {style}", _shape(outline, style), inverted, clutter, radians(35))
        for name, outline, style in chosen
    ]


# ---- strokes ----------------------------------------------------------------------------------------------------

DOTS = 40  # points of a stroke


def _bezier(points: int) -> Tensor:
    """Weights ``[DOTS, points]`` of the control points along a Bezier curve."""
    along = torch.linspace(0, 1, DOTS)[:, None]
    order = points - 1
    choose = torch.tensor([math.comb(order, number) for number in range(points)], dtype=torch.float32)
    number = torch.arange(points)
    return choose * along**number * (1 - along) ** (order - number)


def _near(dots: Tensor, radius: Tensor) -> Tensor:
    """Masks ``[n, 32, 32]`` of what lies within ``radius`` ``[n]`` of any of the points ``[n, m, 2]``."""
    x, y = COLUMNS.flatten(), ROWS.flatten()
    pixels = torch.stack([-2 * x, -2 * y, torch.ones_like(x)], dim=1)  # [1024, 3]
    lifted = torch.cat([dots, dots.square().sum(dim=2, keepdim=True)], dim=2)  # [n, m, 3]
    squared = (pixels @ lifted.transpose(1, 2)).amin(dim=2) + x.square() + y.square()
    distance = squared.clamp(min=0).sqrt().view(-1, SIDE, SIDE)
    return torch.sigmoid((radius[:, None, None] - distance) * 40)


def _stroke_kind(name: str, controls: Sequence[Tensor], inverted: bool) -> Kind:
    def images(n: int, rng: np.random.Generator) -> Tensor:
        curves = [_bezier(len(one)) @ (one + 0.09 * normal(rng, n, len(one), 2)) for one in controls]
        matrix, shift = affine(rng, n, turn=radians(20), scale=(0.5, 1.0), shear=0.25, shift=0.25)
        dots = torch.cat(curves, dim=1) @ matrix.transpose(1, 2) + shift[:, None]
        mask = _near(dots, uniform(rng, 0.05, 0.12, n))
        bright, dark = colours(rng, n, contrast=0.5)
        painted = paint(mask, bright, ground(rng, n, dark, 0.04))
        return 1 - painted if inverted else painted

    return Kind(name, images)


def strokes(count: int, rng: np.random.Generator) -> list[Kind]:
    """Invented characters of two to four curved strokes, every image a drawing of its own."""
    inverted = bool(rng.random() < 0.5)
    kinds = []
    for number in range(count):
        controls = []
        for _ in range(rng.integers(2, 5)):
            points = int(rng.integers(2, 6))
            start, steps = uniform(rng, -0.8, 0.8, 2), 0.9 * normal(rng, points - 1, 2)
            controls.append(torch.cat([start[None], start + steps.cumsum(dim=0)]).clamp(-0.95, 0.95))
        kinds.append(_stroke_kind(f"character {number}", controls, inverted))
    return kinds


# ---- objects ----------------------------------------------------------------------------------------------------


def _object_kind(name: str, rng: np.random.Generator) -> Kind:
    parts = int(rng.integers(3, 6))
    centres, radii = uniform(rng, -0.45, 0.45, parts, 2), uniform(rng, 0.14, 0.45, parts, 2)
    angles, hues = uniform(rng, 0, math.pi, parts), uniform(rng, 0.1, 0.9, parts, 3)
    stripes = uniform(rng, 0, 0.3, parts) * uniform(rng, -1, 1, parts).relu().ceil()
    cycles, slants = uniform(rng, 3, 9, parts), uniform(rng, 0, math.pi, parts)

    def images(n: int, rng: np.random.Generator) -> Tensor:
        matrix, shift = affine(rng, n, turn=radians(20), scale=(0.7, 1.1), shift=0.25)
        mirrored = torch.from_numpy(rng.integers(0, 2, n) * 2 - 1).float()
        turned = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
        size = torch.linalg.det(matrix).sqrt()[:, None]
        tone = noise(rng, n, band(0.0, 3.0))[..., None] * uniform(rng, 0.05, 0.2, n, 1, 1, 1)
        picture = uniform(rng, 0.1, 0.9, n, 1, 1, 3) + tone * normal(rng, n, 1, 1, 3)
        for part in range(parts):
            flip = torch.stack([mirrored, torch.ones(n)], dim=1)
            place = centres[part] * flip + 0.05 * normal(rng, n, 2)
            centre = (matrix @ place[:, :, None])[:, :, 0] + shift
            angle = angles[part] * mirrored + turned + 0.15 * normal(rng, n)
            mask = ellipse(centre, radii[part] * size * uniform(rng, 0.85, 1.15, n, 2), angle, 0.08)
            slant = (slants[part] * mirrored + turned)[:, None, None]
            wave = torch.sin(math.pi * cycles[part] * (COLUMNS * slant.cos() + ROWS * slant.sin()))
            colour = hues[part] + 0.12 * normal(rng, n, 1, 1, 3)
            picture = paint(mask, colour + stripes[part] * wave[..., None], picture)
        return picture * uniform(rng, 0.7, 1.2, n, 1, 1, 1)

    return Kind(name, images)


def objects(count: int, rng: np.random.Generator) -> list[Kind]:
    """Bodies of three to five coloured, perhaps striped parts, on a cluttered ground: the nearest to photographs."""
    return [_object_kind(f"object {number}", rng) for number in range(count)]
