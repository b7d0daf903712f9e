"""Packs of drawings: emoji of one vendor as small images, with their labels.

The pack that ships, `data/twemoji.zip`, is Twemoji (Twitter, Inc. and other contributors, CC-BY-4.0), rasterised at 96
pixels; labels and tags are emojibase's (MIT). `studies/scenes/prepare.py` makes it, and the packs of other vendors that
models are trained on.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbovlm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PACK = Path(__file__).parent / "data" / "twemoji.zip"
_SAME_NAME = """dog, cat, horse, cow, pig, elephant, camel, goat, rabbit, fox, lion, monkey, penguin, owl, duck, eagle,
    chicken, frog, turtle, crocodile, snake, whale, dolphin, fish, octopus, crab, snail, butterfly, spider, scorpion,
    rose, sunflower, tulip, cactus, palm tree, mushroom, maple leaf, watermelon, lemon, banana, pineapple, pear, peach,
    tomato, eggplant, carrot, strawberry, bread, croissant, hamburger, pizza, hot dog, taco, egg, doughnut, cookie,
    candy, lollipop, wine glass, house, castle, tent, bus, ambulance, fire engine, police car, taxi, tractor,
    motorcycle, bicycle, anchor, sailboat, ship, airplane, helicopter, rocket, watch, umbrella, sun, star,
    snowflake, rainbow, balloon, trophy, soccer ball, basketball, baseball, volleyball, necktie, dress, handbag,
    backpack, crown, ring, lipstick, bell, guitar, trumpet, violin, drum, telephone, laptop, camera, television,
    candle, light bulb, envelope, package, scroll, pencil, paintbrush, key, hammer, wrench, bomb, shield, pill,
    microscope, bed, bathtub, hospital, volcano, skull, ghost"""
SCENE_NAMES = {
    **{name: name for name in " ".join(_SAME_NAME.split()).split(", ")},
    "bee": "honeybee",
    "ladybug": "lady beetle",
    "apple": "red apple",
    "corn": "ear of corn",
    "cheese": "cheese wedge",
    "cake": "birthday cake",
    "beer": "beer mug",
    "ice cream": "soft ice cream",
    "pumpkin": "jack-o-lantern",
    "car": "automobile",
    "truck": "delivery truck",
    "train": "locomotive",
    "moon": "crescent moon",
    "heart": "red heart",
    "gift": "wrapped gift",
    "football": "american football",
    "tennis ball": "tennis",
    "shirt": "t-shirt",
    "hat": "top hat",
    "boot": "woman’s boot",
    "gem": "gem stone",
    "phone": "mobile phone",
    "book": "closed book",
    "clock": "alarm clock",
    "hourglass": "hourglass done",
    "lock": "locked",
}
"""What scenes call an emoji, and its label."""


@dataclass(frozen=True)
class Sprite:
    """One drawing.

    Attributes:
        code: its code points in hexadecimal, the same for all vendors.
        label: what Unicode calls it.
        name: what scenes call it; None for those that scenes do not use.
        tags: other words for it.
        group, subgroup: Unicode's, such as `animals-nature` and `animal-bird`.
        image: RGBA, 96×96.
    """

    code: str
    label: str
    name: str | None
    tags: tuple[str, ...]
    group: str
    subgroup: str
    image: Image


def load_sprites(pack: Path | str = PACK) -> tuple[Sprite, ...]:
    """All drawings of a pack, in Unicode's order.

    Raises:
        DataError: there is no such pack, or it is not one.
    """
    from PIL import Image

    try:
        with zipfile.ZipFile(pack) as archive:
            return tuple(
                Sprite(
                    **{**entry, "tags": tuple(entry["tags"])},
                    image=Image.open(io.BytesIO(archive.read(f"{entry['code']}.webp"))).convert("RGBA"),
                )
                for entry in json.loads(archive.read("about.json"))
            )
    except FileNotFoundError:
        raise DataError(f"{pack}: there is no such pack; studies/scenes/prepare.py makes them") from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{pack}: is no pack of drawings ({error})") from error
