"""Any bytes in place of an image: an RGB image, or a `DataError` of one line; nothing else, and no program is run."""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from fuzz.drawing import fuzz
from turbovlm.cli.images import image_files, read_images
from turbovlm.errors import DataError
from turbovlm.loading.images import IMAGE_SUFFIXES, decode

Image = pytest.importorskip("PIL.Image")

MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK", "LAB"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
}
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")
KINDS = [(name, mode) for name, modes in MODES.items() for mode in modes]
SIDE = 12


@pytest.fixture(autouse=True, scope="module")
def small_limit():
    """A limit of pixels at which no test waits for memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
        yield


def drawn(mode: str, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 2**16, (SIDE, SIDE))
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    channels = {"LAB": "LAB", "CMYK": "CMYK", "RGBA": "RGBA"}.get(mode, "RGB")
    pixels = np.repeat((values >> 8)[..., None], len(channels), axis=2).astype(np.uint8)
    return Image.frombytes(channels, (SIDE, SIDE), pixels.tobytes()).convert(mode)


@functools.cache
def encoded(name: str, mode: str, frames: int = 1, exif: bytes = b"") -> bytes:
    out = io.BytesIO()
    more = {"save_all": True, "append_images": [drawn(mode, i) for i in range(1, frames)]} if frames > 1 else {}
    drawn(mode, 0).save(out, name, **more, **({"exif": exif} if exif else {}))
    return out.getvalue()


def read(content: bytes) -> Image.Image | str:
    """The image, or what is said of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for said in ("Corrupt EXIF", "Truncated File", "Metadata Warning", "Image size", "Invalid APNG", "Possibly"):
            warnings.filterwarnings("ignore", message=f".*{said}.*")
        try:
            image = decode(io.BytesIO(content))
        except DataError as error:
            said = str(error)
            assert "\n" not in said and 10 < len(said) < 500 and said.startswith(("does not decode (", "has numbers"))
            return said
    assert image.mode == "RGB" and min(image.size) >= 1
    image.tobytes()
    return image


@pytest.mark.parametrize(("name", "mode"), KINDS)
def test_every_mode_shows_what_it_holds(name, mode):
    found = read(encoded(name, mode))
    if mode in ("I", "F"):
        assert "32 bits" in found and mode in found
        return
    values = np.asarray(drawn("RGB", 0)).astype(int)[..., 0]
    wanted = {"1": np.asarray(drawn("1", 0)) * 255, "CMYK": (255 - values) ** 2 / 255}.get(mode, values)
    off = np.abs(np.asarray(found).astype(int).mean(axis=2) - wanted).mean()
    assert found.size == (SIDE, SIDE) and off < (20 if name in ("JPEG", "WEBP") or mode in ("P", "LAB") else 2)


@pytest.mark.parametrize("name", ANIMATED)
def test_the_first_frame_of_several(name):
    found, first = (np.asarray(read(encoded(name, "RGB", frames))).astype(int) for frames in (3, 1))
    assert np.abs(found - first).mean() < 20


@fuzz(
    core=60,
    nightly=4000,
    kind=st.sampled_from(KINDS),
    frames=st.sampled_from([1, 1, 3]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    front=st.booleans(),
)
def test_truncated_and_changed_files(kind, frames, cut, changes, front):
    """Cut anywhere, bytes changed anywhere or in the header."""
    content = bytearray(encoded(*kind, frames if kind[0] in ANIMATED else 1))
    for place, value in changes:
        content[int(place * (min(64, len(content)) if front else len(content)))] = value
    read(bytes(content[: len(content) if changes else round(cut * len(content))]))


@fuzz(core=20, nightly=1000, content=st.binary(max_size=300), magic=st.sampled_from([b"", *(None,) * 3]), i=st.data())
def test_any_bytes(content, magic, i):
    """With the first bytes of any format, of those too that Pillow would run a program for."""
    begins = [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe1",
        b"GIF89a",
        b"RIFF\x40\0\0\0WEBPVP8L",
        b"II*\0",
        b"MM\0*",
        b"BM",
        b"P6\n",
    ]
    begins += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xd7\xcd\xc6\x9a", b"8BPS", b"\x00\x00\x01\x00"]
    read((i.draw(st.sampled_from(begins)) if magic is None else magic) + content)


@fuzz(
    core=20,
    nightly=600,
    exif=st.binary(max_size=60),
    order=st.sampled_from([b"II*\0", b"MM\0*", b""]),
    tag=st.integers(0, 65535),
)
def test_any_exif(exif, order, tag):
    """Nonsense where the orientation is looked for."""
    entry = struct.pack("<HHHI", 1, tag if len(exif) % 2 else 0x0112, len(exif) % 14, 1)
    for name in ("JPEG", "PNG", "WEBP"):
        read(encoded.__wrapped__(name, "RGB", 1, b"Exif\0\0" + order + struct.pack("<I", 8) + entry + exif))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [0, 20_000, 60_000, 2**31 - 1, 2**32 - 1])
def test_headers_of_no_size_and_of_enormous_ones(side):
    """Said before any memory is taken."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    assert "does not decode" in read(png)
    assert "does not decode" in read(b"P6\n%d %d\n255\n" % (side, side))
    assert "does not decode" in read(
        b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, side % 2**31, side % 2**31, 1, 24)
    )


def test_postscript_is_not_run(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program is run"))
    out = io.BytesIO()
    drawn("RGB", 0).save(out, "EPS")
    assert "cannot identify" in read(out.getvalue())


def test_files_by_wrong_names(tmp_path):
    """A file is what is in it; all that are none are named at once."""
    for number, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        (tmp_path / f"{number}{suffix}").write_bytes(encoded("PNG", "RGB"))
    found = read_images(image_files(tmp_path, 100))
    assert len({image.tobytes() for image in found}) == 1
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "loop.gif").symlink_to(tmp_path / "loop.gif")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"2 of 11 images cannot be read.*empty\.png: does not decode.*text\.jpg"):
        read_images(image_files(tmp_path, 100))
