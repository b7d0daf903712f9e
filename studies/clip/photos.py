"""Photographs with names that no model here is trained on: animals and things of Debian's gcompris-qt-data.

Most are CC-BY-SA or in the public domain, the package's copyright file says which; none is in this repository. Their
names are those of their files, corrected by `CALLED`; what no word names for sure is left out.
"""

from __future__ import annotations

import io
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from prepare import unpack

ACTIVITIES = ("categorization", "erase", "explore_farm_animals", "explore_world_animals")
FOLDERS = ("tools", "renewable", "fishes", "others", "resource", "animals")
"""Of categorization's, those whose files are called by what they show."""
CALLED = {
    "tweezer": "tweezers",
    "plier": "pliers",
    "cutting tool": "pliers",
    "side cutter": "pliers",
    "screw driver": "screwdriver",
    "nail cutter": "nail clipper",
    "spray": "spray bottle",
    "solar": "solar panel",
    "bulb": "light bulb",
    "erasers": "eraser",
    "blackslate": "blackboard",
    "spoons": "spoon",
    "pan": "frying pan",
    "weighing machine": "scale",
    "chamaeleon": "chameleon",
    "camels": "camel",
    "swans": "swan",
    "meerkats": "meerkat",
    "spoonbills": "spoonbill",
    "dragon": "komodo dragon",
    "long nosed monkey": "proboscis monkey",
    "flying fox": "bat",
}
NOT_SURE = ("geothermal", "buffetset", "knife", "numbers", "alphabets", "calf")
"""Shows something else as well, or is no name of a thing."""
MOST = 4
"""Photographs of one name."""


def named_photos(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Names and photographs, RGB, at most four of a name; the package goes into the folder."""
    counts: Counter[str] = Counter()
    resources = unpack("gcompris-qt-data", folder) / "gcompris-qt" / "rcc"
    for activity in ACTIVITIES:
        for path, content in sorted(files((resources / f"{activity}.rcc").read_bytes())):
            parts = Path(path).parts
            if not path.endswith(".webp") or parts[-2] not in FOLDERS:
                continue
            image = Image.open(io.BytesIO(content))
            name = words(Path(path).stem)
            if image.mode == "RGB" and name not in NOT_SURE and counts[name] < MOST:
                counts[name] += 1
                yield name, image


def words(stem: str) -> str:
    """The name that a file's is: `measuringTape4` is a measuring tape."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\d]+", " ", stem).strip().lower()
    return CALLED.get(plain, plain)


def files(resources: bytes) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of a Qt resource file, as far as they are not compressed.

    Its tree has an entry for every folder and file, big endian: where its name stands, flags (1 and 4: compressed, 2: a
    folder), then a folder's number of entries and the first of them, or a file's territory, language and place.
    """
    version, tree, data, names = struct.unpack_from(">4I", resources, 4)
    size = 14 if version < 2 else 22

    def walk(entry: int, path: str) -> Iterator[tuple[str, bytes]]:
        at = tree + entry * size
        (flags,) = struct.unpack_from(">H", resources, at + 4)
        if flags & 2:
            count, first = struct.unpack_from(">II", resources, at + 6)
            for child in range(first, first + count):
                yield from walk(child, f"{path}{name(struct.unpack_from('>I', resources, tree + child * size)[0])}/")
        elif not flags & 5:
            (content_at,) = struct.unpack_from(">I", resources, at + 10)
            (length,) = struct.unpack_from(">I", resources, data + content_at)
            start = data + content_at + 4
            yield path.rstrip("/"), resources[start : start + length]

    def name(at: int) -> str:
        (length,) = struct.unpack_from(">H", resources, names + at)
        return resources[names + at + 6 : names + at + 6 + 2 * length].decode("utf-16-be")

    yield from walk(0, "")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        print(Counter(name for name, _ in named_photos(Path(place))))
