"""Drawings for scenes and for image-text pairs, and photographs to put them on.

    python studies/scenes/prepare.py           # writes studies/scenes/data: a pack per vendor, and photos.zip
    python studies/scenes/prepare.py --ship    # also the pack that ships: turbovlm_lab/zoo/data/twemoji.zip
    python studies/scenes/prepare.py --named   # only what scenes show, an eighth of the drawings: minutes

Needs npm, apt-get (for `apt-get download`, without root), dpkg-deb, resvg-py and the `demo` extra. What is fetched:

  npm @iconify-json/noto (Apache-2.0), twemoji (CC-BY-4.0), fluent-emoji and fluent-emoji-flat (MIT), openmoji
  (CC-BY-SA-4.0), emojione (CC-BY-4.0): the drawings; emojibase-data (MIT): labels, tags, groups
  npm @iconify-json/noto-v1, fxemoji (Apache-2.0), emojione-v1 (CC-BY-SA-4.0), streamline-emojis (CC-BY-4.0): older and
  smaller sets, of which those drawings are taken that are called as Unicode calls them
  Debian mate-backgrounds (GPL-2+, see its copyright file): photographs of nature, to train on

Twemoji's drawings and the photographs of scikit-image and scikit-learn are for evaluation alone.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from turbovlm_lab.zoo.sprites import PACK, SCENE_NAMES

DATA = Path(__file__).parent / "data"
VENDORS = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent": "fluent-emoji-flat",
    "fluent-3d": "fluent-emoji",
    "openmoji": "openmoji",
    "emojione": "emojione",
}
PARTIAL = ("noto-v1", "fxemoji", "emojione-v1", "streamline-emojis")
"""Vendors who do not draw everything, or give no code points."""
SIDE, PHOTO_SIDE = 96, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", action="store_true", help="also write the pack that ships")
    parser.add_argument("--named", action="store_true", help="draw only what scenes show")
    args = parser.parse_args()
    if args.ship and args.named:
        parser.error("--ship --named: the pack that ships has every drawing")
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {vendor: fetch_icons(package, folder) for vendor, package in VENDORS.items()}
        table = concepts(sets, fetch_labels(folder))
        if args.named:
            table = [entry for entry in table if entry["label"] in SCENE_NAMES.values()]
        for vendor, icons in sets.items():
            write_pack(DATA / f"{vendor}.zip", vendor, icons, table)
        for vendor in PARTIAL:
            icons = fetch_icons(vendor, folder)
            write_pack(DATA / f"{vendor}.zip", vendor, icons, called_alike(icons["icons"], vendor, table))
        if not (DATA / "photos.zip").exists():
            write_photos(DATA / "photos.zip", folder)
    if args.ship:
        PACK.parent.mkdir(exist_ok=True)
        PACK.write_bytes((DATA / "twemoji.zip").read_bytes())
    print(f"{len(table)} emoji of {len(VENDORS)} vendors, some of them of {len(PARTIAL)} more: {DATA}")


def fetch_npm(package: str, folder: Path) -> tarfile.TarFile:
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    return tarfile.open(folder / packed.stdout.split()[-1])


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    return json.load(archive.extractfile(f"package/{name}"))  # type: ignore[arg-type]


def fetch_icons(package: str, folder: Path) -> dict[str, Any]:
    """Drawings by name, and names by code point where the package says them."""
    with fetch_npm(f"@iconify-json/{package}", folder) as archive:
        codes = read_json(archive, "chars.json") if "package/chars.json" in archive.getnames() else {}
        return {"icons": read_json(archive, "icons.json"), "codes": codes}


def fetch_labels(folder: Path) -> dict[str, Any]:
    with fetch_npm("emojibase-data", folder) as archive:
        return {"emoji": read_json(archive, "en/data.json"), "groups": read_json(archive, "en/messages.json")}


def concepts(sets: dict[str, dict[str, Any]], labels: dict[str, Any]) -> list[dict[str, Any]]:
    """What all vendors draw, no flags: code, label, tags, group and subgroup, and each vendor's name of it."""
    groups = {entry["order"]: entry["key"] for entry in labels["groups"]["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in labels["groups"]["subgroups"]}
    codes = {vendor: {plain(code): name for code, name in icons["codes"].items()} for vendor, icons in sets.items()}
    found = []
    for emoji in labels["emoji"]:
        code = plain(emoji["hexcode"])
        every = {named[code] for named in codes.values() if code in named}
        names = {vendor: named_in(icons["icons"], codes[vendor].get(code), every) for vendor, icons in sets.items()}
        if all(names.values()) and groups.get(emoji.get("group")) not in (None, "flags", "component"):
            about = {"label": emoji["label"], "tags": emoji.get("tags", [])}
            where = {"group": groups[emoji["group"]], "subgroup": subgroups[emoji["subgroup"]]}
            found.append({"code": code, **about, **where, "names": names})
    return found


def called_alike(icons: dict[str, Any], vendor: str, table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the table that a set calls by the same letters."""
    names = {letters(name): name for name in sorted({**icons["icons"], **icons.get("aliases", {})})}
    return [
        {**entry, "names": {vendor: names[letters(entry["label"])]}}
        for entry in table
        if letters(entry["label"]) in names
    ]


def letters(text: str) -> str:
    return re.sub("[^a-z]", "", text.lower())


def named_in(icons: dict[str, Any], own: str | None, every: set[str]) -> str | None:
    """A vendor's name of an emoji: by its code, or, where it gives no codes, one that others give it."""
    known = icons["icons"].keys() | icons.get("aliases", {}).keys()
    return own or next((name for name in sorted(every) if name in known), None)


def plain(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def write_pack(file: Path, vendor: str, icons: dict[str, Any], table: list[dict[str, Any]]) -> None:
    scene_names = {label: name for name, label in SCENE_NAMES.items()}
    about = [{**entry, "name": scene_names.get(entry["label"])} for entry in table]
    with zipfile.ZipFile(file, "w") as archive:
        for entry in tqdm(about, desc=vendor, unit=" emoji"):
            image = draw(icons["icons"], entry.pop("names")[vendor])
            packed = io.BytesIO()
            image.save(packed, "webp", quality=85, method=6)
            archive.writestr(f"{entry['code']}.webp", packed.getvalue())
        archive.writestr("about.json", json.dumps(about, ensure_ascii=False, indent=0), zipfile.ZIP_DEFLATED)


def draw(icons: dict[str, Any], name: str) -> Image.Image:
    """RGBA, 96×96."""
    import resvg_py

    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    return image.convert("RGBA").resize((SIDE, SIDE))


def write_photos(file: Path, folder: Path) -> None:
    """Nature photographs of Debian's mate-backgrounds, shorter side 512."""
    nature = unpack("mate-backgrounds", folder) / "backgrounds" / "mate" / "nature"
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(nature.glob("*.jpg")):
            photo = Image.open(path).convert("RGB")
            share = PHOTO_SIDE / min(photo.size)
            packed = io.BytesIO()
            photo.resize((round(photo.width * share), round(photo.height * share))).save(packed, "jpeg", quality=92)
            archive.writestr(path.name, packed.getvalue())


def unpack(package: str, folder: Path) -> Path:
    """A Debian package's /usr/share, under a folder."""
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    (file,) = folder.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", file.name, package], cwd=folder, check=True)
    return folder / package / "usr" / "share"


if __name__ == "__main__":
    main()
