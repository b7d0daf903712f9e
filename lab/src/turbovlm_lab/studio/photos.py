"""The images that are built in, and how the page offers them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from html import escape

from turbovlm_lab.demo.photos import load_photos, load_surfaces
from turbovlm_lab.studio.patches import data_uri
from turbovlm_lab.studio.subjects import IMAGE, Photo, Subject

WHOLE = 7
"""Photographs of `load_photos` that are no crops of another."""
THUMBNAIL = 72


@functools.cache
def demo_photos() -> tuple[Photo, ...]:
    """Seven photographs and five surfaces in which nothing stands out, centre squares of 448 pixels at most."""
    from turbovlm_lab.zoo.saliency import centre_square

    found = []
    for photo in [*load_photos()[:WHOLE], *load_surfaces()]:
        image = centre_square(photo.image)
        image.thumbnail((448, 448))
        found.append(Photo(photo.name, photo.name, image, photo.credit))
    return tuple(found)


def pictures(photos: Sequence[Photo], picked: str) -> str:
    """Radio buttons with thumbnails, as HTML; of recordings, those of their spectrograms."""
    buttons = "".join(_button(photo, picked) for photo in photos)
    label = "Recording" if any(photo.wave is not None for photo in photos) else "Image"
    return f"<div class='picker' role='radiogroup' aria-label='{label}'>{buttons}</div>"


def _button(photo: Photo, picked: str) -> str:
    checked = " checked" if photo.key == picked else ""
    title = escape(f"{photo.title}. {photo.credit}" if photo.credit else photo.title, quote=True)
    return (
        f"<label title='{title}'><input type='radio' name='picked' value='{escape(photo.key, quote=True)}'{checked}>"
        f"<img src='{_thumbnail(photo)}' alt='{escape(photo.title, quote=True)}' width='52' height='52'></label>"
    )


_THUMBNAILS: dict[int, str] = {}


def _thumbnail(photo: Photo) -> str:
    if id(photo) not in _THUMBNAILS:
        small = photo.image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        _THUMBNAILS[id(photo)] = data_uri(small)
    return _THUMBNAILS[id(photo)]


def photos_of(subject: Subject) -> list[Photo]:
    """The built-in images of a subject; none where it takes words alone."""
    if subject.photos is not None:
        return list(subject.photos())
    return list(demo_photos()) if subject.takes == IMAGE else []
