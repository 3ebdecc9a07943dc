"""A synthetic upper abdomen as a function of position, so that any scanner can look at it.

Coordinates are millimetres in the patient's own frame as DICOM draws it: x to the left, y to the
back, z to the head (LPS), with the origin in the middle of the body. Tissue values are Hounsfield
units of a contrast-enhanced CT in the portal venous phase: air -1000, fat -100, muscle 55, liver
around 105, bone some hundreds. Nothing here comes from a person.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
#: Fills everything inside a distance's zero with a value, with a soft border.
Paint = Callable[[Array, float | Array], None]

#: Class names in the order of their label values.
CLASSES: Final = ("background", "liver", "tumour")

#: Longest and shortest wave of the deformation that makes every body its own, millimetres.
_BODY_WAVES: Final = (110.0, 260.0)
#: The same for the texture inside organs.
_TEXTURE_WAVES: Final = (14.0, 45.0)
_SPINE_PERIOD: Final = 33.0  # one vertebra and its disc, millimetres
_RIB_PERIOD: Final = 36.0


@dataclass(frozen=True)
class Waves:
    """A smooth random field: a sum of plane waves, values mostly within -1 to 1.

    Parameters
    ----------
    vectors : array, shape (waves, 3)
        Wave vectors in radians per millimetre.
    phases : array, shape (waves,)
        Phases in radians.
    """

    vectors: Array
    phases: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, lengths: tuple[float, float], count: int) -> Waves:
        """Draw ``count`` waves of random direction with wavelengths between ``lengths`` (mm)."""
        direction = rng.normal(size=(count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = rng.uniform(*lengths, size=(count, 1))
        return cls(
            vectors=(direction * 2 * np.pi / length).astype(np.float32),
            phases=rng.uniform(0, 2 * np.pi, size=count).astype(np.float32),
        )

    def at(self, x: Array, y: Array, z: Array) -> Array:
        """Return the field at points given by arrays that broadcast against each other."""
        total = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), np.float32)
        for (kx, ky, kz), phase in zip(self.vectors, self.phases, strict=True):
            total += np.sin(kx * x + ky * y + kz * z + phase)
        return _float32(total / (np.sqrt(len(self.phases)) * 1.2))


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid by centre and half axes, millimetres."""

    centre: tuple[float, float, float]
    axes: tuple[float, float, float]

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Return a distance to the surface in millimetres, negative inside (approximate)."""
        (cx, cy, cz), (ax, ay, az) = self.centre, self.axes
        r = np.sqrt(((x - cx) / ax) ** 2 + ((y - cy) / ay) ** 2 + ((z - cz) / az) ** 2)
        return _float32((r - 1) * min(self.axes))


@dataclass(frozen=True)
class Lesion:
    """A tumour in the liver: a ball whose surface ripples."""

    centre: tuple[float, float, float]
    radius: float
    #: Hounsfield units, darker than the liver around it.
    value: float


@dataclass(frozen=True)
class Tissue:
    """What a point is made of: Hounsfield units, and the label value (index in CLASSES)."""

    hounsfield: Array
    label: NDArray[np.uint8]


@dataclass(frozen=True)
class Anatomy:
    """One person's upper abdomen. Draw it with :func:`draw_anatomy`."""

    half_width: float
    half_depth: float
    fat: float
    dome: float
    liver_value: float
    liver: tuple[Ellipsoid, ...]
    organs: tuple[tuple[Ellipsoid, float], ...]
    bowel: tuple[tuple[Ellipsoid, float], ...]
    lesions: tuple[Lesion, ...]
    warp: tuple[Waves, Waves, Waves]
    surface: Waves
    texture: Waves
    warp_amplitude: float

    def grown(self, factor: float) -> Anatomy:
        """Return the same person at another visit, the lesions' radii times ``factor``."""
        lesions = tuple(replace(one, radius=one.radius * factor) for one in self.lesions)
        return replace(self, lesions=lesions)

    def at(self, x: Array, y: Array, z: Array, *, edge: float) -> Tissue:
        """Return the tissue at points of the patient's frame.

        Parameters
        ----------
        x, y, z : float32 arrays that broadcast against each other, millimetres (LPS)
        edge : float
            Half the width of a border between tissues in millimetres: the partial volume effect
            of the voxels that will be made of this.
        """
        x, y, z = self._warped(x, y, z)
        body = self._wall(x, y, 0.0) + 0 * z
        muscle = self._wall(x, y, self.fat) + 0 * z
        cavity = self._wall(x, y, self.fat + 16.0) + 0 * z
        diaphragm = self._diaphragm(x, y, z)
        liver = self._liver(x, y, z, cavity, diaphragm)
        texture = self.texture.at(x, y, z)

        hu = np.full(body.shape, -1000.0, np.float32)

        def paint(distance: Array, value: float | Array) -> None:
            # A logistic border: the share of the voxel that the tissue fills.
            share = 1 / (1 + np.exp(np.clip(distance / edge, -30, 30)))
            np.add(hu, share * (value - hu), out=hu)

        paint(body, -102 + 6 * texture)
        paint(muscle, 55 + 8 * texture)
        paint(np.maximum(np.abs(cavity - 6) - 5, self._ribs(x, y, z)), 380.0)
        paint(cavity, -95 + 10 * texture)
        inside = cavity + 3
        for shape, value in self.bowel:
            paint(np.maximum(shape.distance(x, y, z), inside), value + 6 * texture)
        for shape, value in self.organs:
            paint(np.maximum(shape.distance(x, y, z), inside), value + 9 * texture)
        paint(liver, self.liver_value + 9 * texture)
        lesion = np.full(body.shape, np.inf, np.float32)
        for one in self.lesions:
            ball = Ellipsoid(one.centre, (one.radius,) * 3).distance(x, y, z)
            ball = np.maximum(ball + 2.0 * texture, liver)
            paint(ball, one.value + 7 * texture)
            lesion = np.minimum(lesion, ball)
        paint(np.maximum(cavity, 4 - diaphragm), -840 + 25 * texture)
        self._paint_spine(paint, x, y, z, texture)

        label = np.zeros(body.shape, np.uint8)
        label[liver < 0] = CLASSES.index("liver")
        label[lesion < 0] = CLASSES.index("tumour")
        return Tissue(hu, label)

    def _warped(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        a = np.float32(self.warp_amplitude)
        fields = [one.at(x, y, z) for one in self.warp]
        return x + a * fields[0], y + a * fields[1], z + a * fields[2]

    def _wall(self, x: Array, y: Array, depth: float) -> Array:
        """Distance to a shell ``depth`` millimetres inside the skin; negative inside it."""
        ax, ay = self.half_width - depth, self.half_depth - depth
        # Exponent 2.4: between an ellipse and a box, as trunks are.
        r = (np.abs(x / ax) ** 2.4 + np.abs(y / ay) ** 2.4) ** (1 / 2.4)
        return _float32((r - 1) * min(ax, ay))

    def _diaphragm(self, x: Array, y: Array, z: Array) -> Array:
        """Height above the diaphragm's two domes in millimetres; negative in the abdomen."""
        right = self.dome - ((x + 62) ** 2 + (y + 5) ** 2) / 190
        left = self.dome - 14 - ((x - 66) ** 2 + (y + 5) ** 2) / 170
        return _float32(z - np.maximum(right, left))

    def _liver(self, x: Array, y: Array, z: Array, cavity: Array, diaphragm: Array) -> Array:
        lobes = [shape.distance(x, y, z) for shape in self.liver]
        union = lobes[0]
        for lobe in lobes[1:]:
            # Smooth union: lobes grow into each other instead of meeting at a crease.
            h = np.clip(0.5 + (union - lobe) / 36, 0, 1)
            union = _float32(union * (1 - h) + lobe * h - 18 * h * (1 - h))
        union = union + 5 * self.surface.at(x, y, z)
        return _float32(np.maximum(np.maximum(union, cavity + 4), diaphragm + 5))

    def _ribs(self, x: Array, y: Array, z: Array) -> Array:
        """Negative on the ribs, which run down towards the front; none in the belly's middle."""
        phase = (z - 0.45 * y) * (2 * np.pi / _RIB_PERIOD)
        front = np.maximum(0, -y - 0.55 * self.half_depth)
        return _float32(10 * (0.35 - np.cos(phase)) + front)

    def _paint_spine(self, paint: Paint, x: Array, y: Array, z: Array, texture: Array) -> None:
        back = 0.56 * self.half_depth
        body = np.hypot(x / 1.15, y - back) - 19
        canal = np.hypot(x, y - back - 27) - 8
        arch = np.hypot(x / 1.3, y - back - 27) - 15
        process = np.maximum(np.abs(x) - 5, np.abs(y - back - 46) - 12)
        disc = np.cos(z * (2 * np.pi / _SPINE_PERIOD)) * 10 - 6.5
        flat = np.zeros_like(texture)
        paint(arch + flat, 330.0)
        paint(np.maximum(process + flat, -disc - 8), 300.0)
        paint(body + flat, 230 + 45 * texture)
        paint(np.maximum(body + flat, -disc), 90 + 5 * texture)
        paint(canal + flat, 25.0)


def _float32(values: NDArray[Any]) -> Array:
    return np.asarray(values, np.float32)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw one person from ``rng``: build, organs, one to three liver lesions."""
    half_width = rng.uniform(128, 148)
    scale = half_width / 140

    def organ(
        centre: tuple[float, float, float], axes: tuple[float, float, float], jitter: float
    ) -> Ellipsoid:
        moved = rng.normal(scale=jitter, size=3)
        sized = rng.uniform(0.88, 1.14, size=3)
        return Ellipsoid(
            (
                float(centre[0] * scale + moved[0]),
                float(centre[1] * scale + moved[1]),
                float(centre[2] + moved[2]),
            ),
            (
                float(axes[0] * scale * sized[0]),
                float(axes[1] * scale * sized[1]),
                float(axes[2] * sized[2]),
            ),
        )

    liver_value = float(rng.normal(112, 6))
    liver = (
        organ((-66, -8, 2), (62, 68, 78), 4),
        organ((-8, -42, 34), (64, 34, 40), 5),
        organ((-74, 8, -34), (42, 46, 54), 5),
    )
    organs = (
        (organ((48, -34, 22), (42, 30, 44), 5), float(rng.uniform(15, 40))),  # stomach
        (organ((48, -56, 30), (26, 10, 22), 3), -880.0),  # the gas in it
        (organ((92, 24, 36), (24, 38, 44), 4), float(rng.normal(120, 5))),  # spleen
        (organ((-52, 42, -48), (24, 22, 46), 4), float(rng.normal(175, 8))),  # right kidney
        (organ((54, 40, -36), (24, 22, 46), 4), float(rng.normal(175, 8))),  # left kidney
        (organ((16, 32, 0), (11, 11, 600), 1.5), float(rng.normal(165, 8))),  # aorta
        (organ((-16, 28, 0), (12, 10, 600), 1.5), float(rng.normal(135, 8))),  # vena cava
    )
    bowel = tuple(
        (
            organ(
                (
                    float(rng.uniform(-70, 75)),
                    float(rng.uniform(-55, 10)),
                    float(rng.uniform(-115, -50)),
                ),
                (26, 20, 20),
                6,
            ),
            float(rng.choice([30.0, 45.0, 15.0, -600.0])),
        )
        for _ in range(15)
    )
    anatomy = Anatomy(
        half_width=float(half_width),
        half_depth=float(rng.uniform(96, 112) * scale),
        fat=float(rng.uniform(9, 20)),
        dome=float(rng.uniform(84, 96)),
        liver_value=liver_value,
        liver=liver,
        organs=organs,
        bowel=bowel,
        lesions=(),
        warp=(
            Waves.draw(rng, _BODY_WAVES, 5),
            Waves.draw(rng, _BODY_WAVES, 5),
            Waves.draw(rng, _BODY_WAVES, 5),
        ),
        surface=Waves.draw(rng, (45.0, 110.0), 6),
        texture=Waves.draw(rng, _TEXTURE_WAVES, 12),
        warp_amplitude=float(rng.uniform(4, 8)),
    )
    return replace(anatomy, lesions=_draw_lesions(anatomy, rng))


def _draw_lesions(anatomy: Anatomy, rng: np.random.Generator) -> tuple[Lesion, ...]:
    """Place lesions well inside the liver: at random points that are deep enough for them."""
    points = rng.uniform((-135, -85, -90), (60, 75, 90), size=(4000, 3)).astype(np.float32)
    x, y, z = (points[:, axis] for axis in range(3))
    cavity = anatomy._wall(x, y, anatomy.fat + 16.0)
    depth = -anatomy._liver(x, y, z, cavity, anatomy._diaphragm(x, y, z))
    order = np.argsort(-depth)
    count = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    lesions: list[Lesion] = []
    for index in range(count):
        radius = float(rng.uniform(26, 38) if index == 0 else rng.uniform(12, 20))
        deep = order[depth[order] > 0.55 * radius]
        # Where no point is deep enough the deepest one serves: a lesion there is always.
        candidates = deep if len(deep) else order[:1]
        chosen = points[int(rng.choice(candidates))]
        lesions.append(
            Lesion(
                centre=(float(chosen[0]), float(chosen[1]), float(chosen[2])),
                radius=radius,
                value=float(anatomy.liver_value - rng.uniform(58, 78)),
            )
        )
    return tuple(lesions)
