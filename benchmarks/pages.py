"""Pages and screens that are drawn: a text, a spreadsheet, a settings screen, a terminal; each from a seed."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Callable

WORDS = """
the of and to in is that for it as was with on by at from this have or one had not but what all were when we there can
an your which their if do will each about how up out them then she many some so these would other into has more two like
him see time could no make than first been its who now people my made over did down only way find use may water long
little very after word called just where most know
"""


def text_page(width: int, height: int, seed: int) -> Image.Image:
    """A page of paragraphs, dark grey on white, with margins."""
    drawer, draw, image = random.Random(seed), *_canvas(width, height, "white")
    size, margin = 15, width // 10
    body, title = ImageFont.load_default(size=size), ImageFont.load_default(size=24)
    draw.text((margin, margin // 2), _line(drawer, draw, title, width - 2 * margin), "black", title)
    top = margin // 2 + 50
    while top < height - margin:
        for line in range(drawer.randint(3, 8)):
            last = line > 1 and drawer.random() < 0.2
            room = (width - 2 * margin) * (drawer.uniform(0.2, 0.8) if last else 1)
            draw.text((margin, top), _line(drawer, draw, body, room), "#202020", body)
            top += size + 7
            if last or top >= height - margin:
                break
        top += size
    return image


def spreadsheet(width: int, height: int, seed: int) -> Image.Image:
    """Numbers in a grid, with a header, lines between cells, and two thirds of the cells empty."""
    drawer, draw, image = random.Random(seed), *_canvas(width, height, "white")
    font, row, column = ImageFont.load_default(size=13), 24, 90
    draw.rectangle((0, 0, width, row), fill="#e8eaed")
    for x in range(0, width, column):
        draw.line((x, 0, x, height), fill="#d0d0d0")
        for y in range(0, height, row):
            draw.line((0, y, width, y), fill="#d0d0d0")
            if y == 0 or drawer.random() < 1 / 3:
                draw.text((x + 6, y + 5), f"{drawer.uniform(0, 9999):.2f}", "black", font)
    return image


def settings_screen(width: int, height: int, seed: int) -> Image.Image:
    """A side bar, a heading, rows with a label and a switch, and buttons."""
    drawer, draw, image = random.Random(seed), *_canvas(width, height, "#f3f3f3")
    font, bold = ImageFont.load_default(size=16), ImageFont.load_default(size=26)
    bar = width // 4
    draw.rectangle((0, 0, bar, height), fill="#dfe6ee")
    for i, y in enumerate(range(40, height - 60, 42)):
        if i == seed % 5:
            draw.rounded_rectangle((8, y - 8, bar - 8, y + 26), 6, fill="#c3d4e8")
        draw.text((24, y), _line(drawer, draw, font, bar - 60), "#203040", font)
    draw.text((bar + 30, 30), _line(drawer, draw, bold, 260), "black", bold)
    for y in range(90, height - 90, 64):
        draw.rounded_rectangle((bar + 30, y, width - 30, y + 50), 8, fill="white")
        draw.text((bar + 46, y + 15), _line(drawer, draw, font, (width - bar) // 2), "black", font)
        on = drawer.random() < 0.5
        draw.rounded_rectangle((width - 90, y + 14, width - 50, y + 36), 11, fill="#2f6fde" if on else "#b0b0b0")
        draw.ellipse((width - (70 if on else 88), y + 16, width - (52 if on else 70), y + 34), fill="white")
    for x, label in ((width - 230, "Cancel"), (width - 120, "Apply")):
        draw.rounded_rectangle(
            (x, height - 60, x + 90, height - 24), 6, fill="#2f6fde" if label == "Apply" else "white"
        )
        draw.text((x + 20, height - 52), label, "white" if label == "Apply" else "black", font)
    return image


def terminal(width: int, height: int, seed: int) -> Image.Image:
    """Lines of a listing, light on dark, of which the last quarter of the window is empty."""
    drawer, draw, image = random.Random(seed), *_canvas(width, height, "#1e1e1e")
    font = ImageFont.load_default(size=14)
    for y in range(8, height * 3 // 4, 20):
        draw.text((8, y), f"{drawer.randint(0, 99999):>6}  ", "#6ac46a", font)
        draw.text((80, y), _line(drawer, draw, font, width * drawer.uniform(0.15, 0.6)), "#d4d4d4", font)
    return image


PAGES: dict[str, Callable[[int, int, int], Image.Image]] = {
    "text": text_page,
    "spreadsheet": spreadsheet,
    "settings screen": settings_screen,
    "terminal": terminal,
}


def as_jpeg(image: Image.Image, quality: int = 85) -> Image.Image:
    """The same, written and read as a JPEG."""
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return Image.open(written).convert("RGB")


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """One of the lab's photographs, resized."""
    from turbovlm_lab.demo.photos import load_photos

    return load_photos()[seed % 7].image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _canvas(width: int, height: int, colour: str) -> tuple[ImageDraw.ImageDraw, Image.Image]:
    image = Image.new("RGB", (width, height), colour)
    return ImageDraw.Draw(image), image


def _line(drawer: random.Random, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As many words as there is room for, one at least."""
    line = drawer.choice(WORDS.split()).capitalize()
    while draw.textlength(longer := f"{line} {drawer.choice(WORDS.split())}", font=font) <= room:
        line = longer
    return line
