"""Kinds of data sets that the generator makes: how the objects look, and how large the images are."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Profile:
    """What is special about a data set.

    Attributes:
        about: In a few words, for the help of the command.
        shapes: Detection class -> the class whose size, parts and LiDAR intensity it has. Its colour stays.
        image_scale: Images have the size of nuScenes divided by this. They are drawn at half of that size at
            most, and larger ones are enlarged.
        jpeg_quality: 0 to 100.
        full_chroma: Whether colours are stored for every pixel, instead of for four together.
    """

    about: str
    shapes: dict[str, str] = field(default_factory=dict)
    image_scale: int = 1
    jpeg_quality: int = 50
    full_chroma: bool = False

    def shape_of(self, name: str) -> str:
        """The class whose shape a detection class has."""
        return self.shapes.get(name, name)


PROFILES = {
    'default': Profile('every class has a shape of its own, images of 1600 x 900 pixels'),
    'look-alikes': Profile(
        'three pairs of classes have one shape and differ by colour alone, images of 400 x 225 pixels',
        shapes={'motorcycle': 'bicycle', 'construction_vehicle': 'truck', 'trailer': 'bus'},
        image_scale=4,
        # A distant object is a few pixels wide: its colour must get through.
        jpeg_quality=90,
        full_chroma=True,
    ),
}
"""By the name that ``q3d toy-data --profile`` takes."""
