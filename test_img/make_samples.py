"""Paints the bundled sample pairs: infrared + visible, MRI + CT and MRI + PET.

    python test_img/make_samples.py

Everything is procedural and seeded, so the samples carry no licence of others, and any checkout can remake them.
A scene is described once, in metres: each object has a colour for the visible image (linear RGB) and a temperature for
the infrared one, from 0 (black) to 1 (white). A head is one map of tissues with one level for each modality.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

SUPERSAMPLE = 2  # everything is painted this much larger and reduced with INTER_AREA
# Letters of 5 rows of 3 cells, one octal digit a row: those of cv2.putText differ between OpenCV 4 and 5.
FONT = dict(zip("ACEFIXT7 ", "25755 74447 74647 74644 72227 55255 72222 71222 00000".split(), strict=True))
Vec = Sequence[float]  # a colour (r, g, b) or a place (x, y, z)
Pair = tuple[np.ndarray, np.ndarray]


def pink(rng: np.random.Generator, shape: Sequence[int], power: float) -> np.ndarray:
    """Periodic noise, spectrum 1 / f^power, mean 0, standard deviation 1."""
    radius = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    radius[0, 0] = np.inf  # drops the mean
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * radius**-power, s=shape)
    return (field / field.std()).astype(np.float32)


def smoothstep(low: float | np.ndarray, high: float, value: np.ndarray) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def bar_depth(x: np.ndarray, y: np.ndarray, a: Vec, b: Vec, radius_a: float, radius_b: float) -> np.ndarray:
    """How deep (x, y) lies inside a tapered bar from a to b; > 0 within."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = max(np.hypot(dx, dy), 1e-6)
    t = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / length**2, 0, 1)
    radius = radius_a + t * (radius_b - radius_a)
    return radius - np.hypot(x - a[0] - t * dx, y - a[1] - t * dy)


def reduce(image: np.ndarray) -> np.ndarray:
    size = (image.shape[1] // SUPERSAMPLE, image.shape[0] // SUPERSAMPLE)
    return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


# --- scenes ---------------------------------------------------------------------------------------------

DARK, WHITE, NAVY, RED = (0.02, 0.02, 0.02), (0.6, 0.6, 0.56), (0.07, 0.09, 0.17), (0.5, 0.08, 0.05)


class Scene:
    """Canvas for both modalities, seen by a level camera that looks along z from `eye_m` above the ground.

    Objects are painted far to near, in metres: x to the right, y up from the ground, z away.
    """

    def __init__(self, seed: int, size: tuple[int, int], horizon: float, eye_m: float, light: float, haze: Vec) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.focal, self.cx, self.horizon = 0.95 * self.shape[1], self.shape[1] / 2, horizon * self.shape[0]
        self.eye_m, self.haze, self.haze_m = eye_m, np.float32(haze), 300
        self.v, self.u = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32)
        self.light = np.full((*self.shape, 3), light, np.float32)
        self.colour, self.glow = np.zeros((2, *self.shape, 3), np.float32)
        self.temp = np.zeros(self.shape, np.float32)

    def project(self, points: Sequence[Vec]) -> np.ndarray:
        x, y, z = np.asarray(points, float).T
        return np.stack([self.cx + self.focal * x / z, self.horizon + self.focal * (self.eye_m - y) / z], 1)

    def paint(self, alpha: np.ndarray, z: float | np.ndarray, colour=None, temp=None, glow: Vec = (0, 0, 0)) -> None:
        """Blends in one object at a distance, with its share of haze; what is None stays as it was."""
        alpha = np.float32(alpha)
        if colour is not None:
            clear = np.exp(-np.float32(z)[..., None] / self.haze_m)
            self.colour += alpha[..., None] * (np.float32(colour) * clear - self.colour)
            self.glow += alpha[..., None] * (self.haze * (1 - clear) + np.float32(glow) - self.glow)
        if temp is not None:
            self.temp += alpha * (np.float32(temp) - self.temp)

    def polygon(self, points: Sequence[Vec], colour=None, temp=None, glow: Vec = (0, 0, 0), soft=0.0) -> None:
        coverage = np.zeros(self.shape, np.uint8)
        cv2.fillPoly(coverage, [np.rint(self.project(points) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        if soft:
            coverage = cv2.GaussianBlur(coverage, (0, 0), soft)
        if colour is not None:
            colour = np.float32(colour) * self.rng.normal(1, 0.08, (*self.shape, 1))
        self.paint(coverage / 255, np.mean([point[2] for point in points]), colour, temp, glow)

    def front(self, x0: float, x1: float, y0: float, y1: float, z: float, *look, **how) -> None:
        """Upright rectangle that faces the camera."""
        self.polygon([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], *look, **how)

    def patch(self, x0: float, x1: float, z0: float, z1: float, *look, **how) -> None:
        """Rectangle on the ground; without a temperature it is paint, as warm as the road."""
        self.polygon([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], *look, **how)

    def bar(
        self, a: Vec, b: Vec, radius_a: float, radius_b: float, colour=None, temp=None, glow: Vec = (0, 0, 0)
    ) -> None:
        """Tapered round bar: limb, pole, trunk."""
        (pa, pb), scale = self.project([a, b]), self.focal / a[2]
        depth = bar_depth(self.u, self.v, pa, pb, max(radius_a * scale, 0.6), max(radius_b * scale, 0.6))
        round_ = np.clip(depth / (max(radius_a, radius_b) * scale), 0, 1) ** 0.5
        shaded = None if colour is None else np.float32(colour) * (0.5 + 0.5 * round_[..., None])
        self.paint(np.clip(depth + 0.5, 0, 1), a[2], shaded, temp and temp * (0.86 + 0.14 * round_), glow)

    def sky(self, top: Vec, bottom: Vec, temp: float) -> None:
        up = np.clip(1 - self.v / self.horizon, 0, 1) ** 0.7
        cloud = 0.7 * smoothstep(-0.3, 1.6, pink(self.rng, self.shape, 1.6))
        clear = up[..., None] * np.float32(top) + (1 - up[..., None]) * np.float32(bottom)
        self.glow[:] = clear + cloud[..., None] * (np.max(bottom) - clear)
        self.temp[:] = temp + 0.1 * (1 - up) ** 3 + 0.1 * cloud

    def ground(self, colour: Vec, temp: float, rough: float, grain_m: float = 0.025) -> None:
        """The ground plane; its grain is fixed to the world, so that it shrinks with distance, and fades there."""
        z = np.minimum(self.focal * self.eye_m / np.maximum(self.v - self.horizon, 1e-3), 1e4)
        world = [np.float32(np.mod(c / grain_m, 512)) for c in (z * (self.u - self.cx) / self.focal, z)]
        noise = cv2.remap(pink(self.rng, (512, 512), 0.7), *world, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
        noise /= 1 + 0.1 * z**2 / (grain_m * self.focal * self.eye_m)
        look = np.clip(1 + rough * noise, 0.15, 2.2)[..., None] * np.float32(colour)
        self.paint(self.v > self.horizon, z, look, temp + 0.03 * noise)

    def crown(
        self, x: float, y: float, z: float, rx: float, ry: float, colour: Vec, temp: float, *, cone=False
    ) -> None:
        """The leaves of a tree or, as a cone, of a conifer, with a ragged edge."""
        (cx, cy), leaves = self.project([(x, y, z)])[0], pink(self.rng, self.shape, 0.7)
        px, py = (self.u - cx) * z / (rx * self.focal), (self.v - cy) * z / (ry * self.focal)  # -1 ... 1 across it
        field = (py + 1) / 2 * (0.65 + 0.35 * ((py + 1) * 4 % 1)) - np.abs(px) if cone else 0.9 - np.hypot(px, py)
        field = np.where(np.abs(py) < 1.2, field, -1)
        tone = np.clip((0.75 - 0.3 * py - 0.2 * px) * (1 + 0.3 * leaves), 0.12, 1.6)
        alpha = smoothstep(0.0, 0.12, field + 0.13 * leaves)
        self.paint(alpha, z, tone[..., None] * np.float32(colour), temp + 0.035 * leaves)

    def wall(self, a: Vec, b: Vec, low: float, high: float, colour: Vec, temp: float, windows=(0, 0), lit=0.0) -> None:
        """A wall between two places (x, z); a share of its windows is lit, and as many are warm behind a curtain."""

        def part(s0: float, s1: float, y0: float, y1: float, *look) -> None:
            x, z = (np.interp([s0, s1], [0, 1], [a[i], b[i]]) for i in (0, 1))
            self.polygon([(x[0], y0, z[0]), (x[1], y0, z[1]), (x[1], y1, z[1]), (x[0], y1, z[0])], *look)

        part(0, 1, low, high, colour, temp)
        columns, storeys = windows
        for row in np.arange(low, high, 0.4) if columns else ():  # courses of stone
            part(0, 1, row, row + 0.08, 1.3 * np.float32(colour))
        for i, y in np.ndindex(columns, storeys):
            fate, s, y = self.rng.random(), (i + 0.5) / columns, low + 1.2 + 3.1 * y
            glow = np.float32((1.0, 0.62, 0.26)) * (self.rng.uniform(0.4, 1.1) if fate < lit else 0)
            warm = self.rng.uniform(0.5, 0.68) if fate < 2 * lit else 0.14  # cold glass mirrors the sky
            part(s - 0.28 / columns, s + 0.28 / columns, y, y + 1.5, (0.07, 0.09, 0.12), warm, glow)

    def sign(self, x: float, y: float, z: float, text: str, ink: Vec, board: Vec, temp: float, glow=0.0) -> None:
        """Lettering of one temperature with its board, a metre high: only the visible image can read it."""
        cell = 0.16
        self.front(x, x + (4 * len(text) + 1) * cell, y, y + 7 * cell, z, board, temp)
        for i, row, column in np.ndindex(len(text), 5, 3):
            if int(FONT[text[i]][row]) >> (2 - column) & 1:
                left, top = x + (4 * i + 1 + column) * cell, y + (6 - row) * cell
                self.front(left, left + cell, top - cell, top, z, ink, glow=glow * np.float32(ink))

    def lamp(self, x: float, y: float, z: float, colour: Vec, power: float, reach_m: float) -> None:
        """Light around a place, as seen in the image."""
        (u, v), radius = self.project([(x, y, z)])[0], reach_m * self.focal / z
        near = np.exp(-((self.u - u) ** 2 + 2 * (self.v - v) ** 2) / radius**2)
        self.light += power * near[..., None] * np.float32(colour)

    def person(self, x: float, z: float, coat: Vec, stride: float, side=1, lit=1.0) -> None:
        """Somebody walking; bare skin is warmest. `lit` dims somebody who stands out of the light."""
        self.polygon([(x - 0.4, 0, z - 0.2), (x + 0.4, 0, z - 0.2), (x + 0.4, 0, z + 0.2)], DARK, soft=4)
        skin, jeans, coat = (lit * np.float32(colour) for colour in ((0.52, 0.32, 0.23), NAVY, coat))
        parts = [(0, 0.95, 0, 1.38, 0.16, 0.18, coat, 0.72), (0, 1.42, 0, 1.52, 0.06, 0.055, skin, 0.88)]
        for way in (-1, 1):
            hip, foot, hand = 0.07 * way, (0.08 + 0.9 * stride) * way, (0.24 + 0.4 * stride) * way
            parts.insert(0, (hip, 0.9, foot, 0.08, 0.105, 0.055, jeans, 0.65))
            parts.append((0.2 * way, 1.37, hand, 0.86, 0.062, 0.045, coat, 0.66))
        for ax, ay, bx, by, ra, rb, colour, temp in (*parts, (0, 1.6, 0, 1.66, 0.085, 0.09, skin, 0.9)):
            self.bar((x + side * ax, ay, z), (x + side * bx, by, z), ra, rb, colour, temp)

    def smoke(self, x: float, z: float, width: float, height: float) -> None:
        """A drifting plume: thick in the visible image, almost nothing in the infrared one."""
        (left, bottom), (right, top) = self.project([(x - width / 2, 0, z), (x + width / 2, height, z)])
        px, rise = (self.u - left) / (right - left) - 0.5, (bottom - self.v) / (bottom - top)
        billow, wander = pink(self.rng, self.shape, 1.5), 0.06 * pink(self.rng, self.shape, 2.0)
        body = 1 - ((px + wander - 0.16 * rise) / np.maximum(0.28 + 0.24 * rise, 0.05)) ** 2 - np.maximum(rise - 0.7, 0)
        alpha = 0.97 * smoothstep(-0.1, 0.5, body + 0.28 * billow) * smoothstep(-0.12, 0.05, rise)
        self.paint(alpha, z, (0.9 + 0.1 * billow + 0.1 * rise)[..., None] * np.float32((0.62, 0.63, 0.66)))
        self.paint(0.1 * alpha, z, temp=0.3)

    def render(self, exposure: float, noise: float) -> Pair:
        """The pair: infrared (H, W) and visible (H, W, 3) in BGR, 8 bits."""
        heat = reduce(cv2.GaussianBlur(self.temp, (0, 0), 0.7 * SUPERSAMPLE))
        heat += self.rng.normal(0, 0.0035, (1, heat.shape[1])) + self.rng.normal(0, 0.005, heat.shape)
        image = self.colour * self.light + self.glow
        bright = np.clip(image - 0.9, 0, 6)
        for sigma, weight in ((4, 0.12), (14, 0.12), (45, 0.15)):  # lamps glow
            image += weight * cv2.GaussianBlur(bright, (0, 0), sigma)
        seen = reduce((1 - np.exp(-exposure * image)) ** (1 / 2.2))
        return to_bytes(heat), to_bytes(seen + self.rng.normal(0, noise, seen.shape))[..., ::-1]


def street_night() -> Pair:
    """A dim street: sign, lamps and stone in the visible image, walkers in the dark in the infrared one."""
    s = Scene(11, (288, 384), 0.44, 1.75, 0.012, (0.012, 0.012, 0.02))
    s.sky((0.004, 0.006, 0.016), (0.035, 0.03, 0.035), 0.03)
    s.ground((0.19, 0.19, 0.20), 0.22, 0.16)
    for side in (-1, 1):
        s.patch(side * 3.7, side * 7, 2.2, 70, (0.27, 0.25, 0.23), 0.26)
    for z in np.arange(4.0, 60, 4.5):
        s.patch(-0.07, 0.07, z, z + 2.2, WHITE)
    for x in np.arange(-3.3, 3.3, 0.95):
        s.patch(x, x + 0.5, 13.5, 16.0, WHITE)
    s.wall((-9, 70), (9, 70), 0, 13.5, (0.2, 0.17, 0.15), 0.24, (6, 4), 0.3)
    houses = ((-1, 38, 62, 10), (1, 34, 62, 11), (-1, 20, 38, 12), (1, 16, 34, 9.5), (-1, 5, 20, 9.5), (1, 5, 16, 11))
    for side, near, far, high in houses:
        tint, temp = s.rng.uniform(0.7, 1.15) * np.array((0.32, 0.17, 0.12)), s.rng.uniform(0.20, 0.27)
        s.wall((side * 6.6, near), (side * 6.6, far), 0, high, tint, temp, (int((far - near) / 2.6), 3), 0.28)
    for x, z in ((4.3, 50), (-4.3, 41), (4.3, 32), (-4.3, 22), (4.3, 16.5)):
        s.bar((x, 0, z), (x, 6.1, z), 0.09, 0.05, (0.09, 0.10, 0.10), 0.27)
        s.bar((x, 6.1, z), (x, 6.2, z), 0.2, 0.2, WHITE, 0.8, glow=(8, 6, 3.4))
        s.lamp(x, 2.0, z, (1.0, 0.74, 0.42), 0.25, 7)
    s.sign(-6.3, 3.0, 13, "CAFE", (1.0, 0.25, 0.16), (0.03, 0.03, 0.04), 0.25, glow=1.6)
    s.lamp(-5, 2.5, 13, (1.0, 0.25, 0.16), 0.3, 3)
    s.person(1.3, 26, DARK, 0.25, side=-1)
    s.person(-5.0, 19, DARK, 0.10)
    s.person(-4.6, 9.5, DARK, 0.28, lit=0.4)
    s.person(4.7, 10.5, DARK, 0.16, side=-1, lit=0.4)
    return s.render(1.8, 0.012)


def forest_smoke() -> Pair:
    """A field before a conifer wood: a plume hides a fire and two people."""
    s = Scene(37, (241, 319), 0.40, 2.2, 1.0, (0.62, 0.70, 0.78))
    s.sky((0.40, 0.52, 0.70), (0.74, 0.78, 0.80), 0.08)
    for z in (80, 65, 50):
        for x in np.arange(-0.6, 0.65, 0.1) * z + s.rng.normal(0, 1.5, 13):
            high, green = s.rng.uniform(10, 15), s.rng.uniform(0.7, 1.2) * np.array((0.055, 0.10, 0.045))
            s.crown(x, high / 2, z, 0.25 * high, high / 2, green, 0.26, cone=True)
    s.ground((0.17, 0.21, 0.065), 0.34, 0.28, 0.04)
    s.front(-60, 60, 0, 1.4, 45, (0.06, 0.085, 0.03), 0.28, soft=3)
    s.polygon([(-3.4, 0, 2.5), (-1.6, 0, 2.5), (2.2, 0, 36), (1.4, 0, 36)], (0.26, 0.21, 0.14), 0.41, soft=5)
    s.person(-5.0, 23, RED, 0.15)
    for x, high in ((-4.0, 0.5), (-3.4, 0.45), (-3.6, 0.8)):
        s.bar((x, 0.05, 21), (x, high, 21), 0.2, 0.04, (0.9, 0.4, 0.1), 1.0, glow=(1.5, 0.5, 0.08))
    s.person(-2.6, 20, NAVY, 0.24, side=-1)
    s.smoke(-3.4, 19, 9.6, 9.0)
    s.bar((6.6, 0, 14.5), (6.7, 3.8, 14.5), 0.22, 0.12, (0.10, 0.075, 0.055), 0.36)
    s.crown(6.6, 4.2, 14.5, 2.2, 2.3, (0.12, 0.20, 0.05), 0.30)
    s.person(3.1, 12.5, RED, 0.2, side=-1)
    return s.render(1.35, 0.007)


def underpass() -> Pair:
    """A bridge by day, the smallest sample: two people stand in its dark, only the visible image reads the sign."""
    s = Scene(53, (161, 200), 0.5, 1.7, 1.0, (0.7, 0.76, 0.84))
    s.sky((0.22, 0.42, 0.78), (0.66, 0.78, 0.9), 0.06)
    s.ground((0.24, 0.23, 0.21), 0.44, 0.13)
    for x, z, r in ((-9, 62, 5), (1, 60, 4), (9, 64, 6)):
        s.crown(x, 0.8 * r, z, 1.3 * r, r, (0.10, 0.19, 0.05), 0.28)
    s.patch(-6, 6, 15.5, 28, DARK, soft=3)
    for side in (-1, 1):
        s.wall((5 * side, 28), (5 * side, 16), 0, 4.4, (0.022, 0.022, 0.024), 0.29)
        s.wall((5 * side, 16), (19 * side, 16), 0, 4.4, (0.12, 0.17, 0.05), 0.33)
    s.polygon([(-5, 4.4, 16), (5, 4.4, 16), (5, 4.4, 28), (-5, 4.4, 28)], DARK, 0.28)
    s.front(-20, 20, 4.4, 6.1, 16, (0.36, 0.34, 0.31), 0.50)
    s.sign(-2.8, 4.6, 16, "EXIT 7", (0.9, 0.9, 0.88), (0.02, 0.22, 0.10), 0.50)
    for x in np.arange(-20, 20, 1.0):
        s.bar((x, 6.1, 16), (x, 7.0, 16), 0.03, 0.03, (0.2, 0.22, 0.25), 0.4)
    s.person(4.2, 20.5, WHITE, 0.24, side=-1, lit=0.02)
    s.person(-4.1, 17.5, WHITE, 0.12, lit=0.02)
    for z in (4.0, 7.5, 11.5):
        s.patch(-0.08, 0.08, z, z + 1.8, WHITE)
    s.person(-1.3, 9.5, (0.6, 0.45, 0.06), 0.22)
    return s.render(1.3, 0.006)


# --- heads ----------------------------------------------------------------------------------------------

TISSUES = {  # level in T1 MRI, T2 MRI, CT and PET uptake
    "air": (0.0, 0.0, 0.0, 0.0),
    "skin": (0.34, 0.30, 0.20, 0.06),
    "fat": (0.80, 0.52, 0.09, 0.03),
    "bone": (0.06, 0.05, 1.0, 0.03),
    "marrow": (0.30, 0.20, 0.76, 0.05),
    "fluid": (0.10, 0.95, 0.16, 0.05),
    "grey": (0.43, 0.56, 0.345, 1.0),
    "white": (0.64, 0.34, 0.295, 0.34),
    "lesion": (0.32, 0.86, 0.30, 0.15),
    "calcium": (0.30, 0.22, 0.95, 0.2),
    "active": (0.64, 0.34, 0.295, 1.5),
}
LABEL = {name: i for i, name in enumerate(TISSUES)}
MODALITY = {"T1": 0, "T2": 1, "CT": 2, "PET": 3}
INNER_PARTS = (  # tissue, bar from a to b in both hemispheres, radius at a and at b
    ("grey", (0.185, -0.27), (0.175, -0.10), 0.045, 0.03),  # caudate nucleus
    ("grey", (0.30, -0.17), (0.27, 0.06), 0.05, 0.035),  # putamen
    ("grey", (0.085, 0.03), (0.13, 0.12), 0.07, 0.065),  # thalamus
    ("fluid", (0.025, -0.10), (0.055, -0.20), 0.018, 0.024),  # lateral ventricles, front
    ("fluid", (0.055, -0.20), (0.135, -0.31), 0.024, 0.034),
    ("fluid", (0.12, 0.17), (0.205, 0.25), 0.022, 0.036),  # and back
    ("fluid", (0.205, 0.25), (0.225, 0.39), 0.036, 0.028),
    ("fluid", (0.0, -0.02), (0.0, 0.13), 0.010, 0.008),  # third ventricle
    ("fluid", (0.66, 0.02), (0.42, -0.04), 0.016, 0.006),  # Sylvian fissure
    ("calcium", (0.20, 0.27), (0.21, 0.30), 0.016, 0.014),  # choroid plexus
    ("calcium", (0.0, 0.185), (0.0, 0.19), 0.016, 0.016),  # pineal gland
)


class Head:
    """An axial slice of a head as a map of tissues; `view` shows it as one modality sees it.

    Coordinates run from the centre, x to the right and y down; the head reaches from y = -0.92 to 0.92.
    """

    def __init__(self, seed: int, size: tuple[int, int], tilt_deg: float, *, ventricles: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.unit = 0.5 * min(self.shape[0], 1.2 * self.shape[1])  # pixels per unit length
        v, u = np.mgrid[: self.shape[0], : self.shape[1]] / self.unit
        u, v = u - u.mean(), v - v.mean()
        cos, sin = np.cos(np.radians(tilt_deg)), np.sin(np.radians(tilt_deg))
        x, y = cos * u + sin * v, cos * v - sin * u
        self.angle = np.arctan2(y, x)
        rho = (np.abs(x / 0.74) ** 2.2 + np.abs(y / 0.92) ** 2.2) ** (1 / 2.2) * (1 + 0.010 * self.wave(2))
        self.x, self.y = (c + 0.016 * pink(self.rng, self.shape, 2.0) for c in (x, y))  # nobody is symmetric
        thick = 0.012 * np.cos(2 * self.angle) ** 2 + 0.008 * self.wave(3)
        self.label = np.zeros(self.shape, np.uint8)
        self.mark(rho < 1.0, "skin")
        self.mark(rho < 0.982, "fat")
        self.mark(rho < 0.950 + 0.004 * self.wave(4), "bone")
        self.mark((rho < 0.934) & (rho > 0.905 - thick + 0.010 * self.wave(24)), "marrow")
        self.mark(rho < 0.880 - thick, "fluid")
        self.paint_cortex(rho / 0.862, rho < 0.864 - thick + 0.004 * self.wave(12), ventricles)

    def mark(self, where: np.ndarray, tissue: str) -> None:
        self.label[where] = LABEL[tissue]

    def wave(self, cycles: int) -> np.ndarray:
        """Random wave round the head, amplitude about 1."""
        phases = self.rng.uniform(0, 2 * np.pi, 2)
        return (np.cos(cycles * self.angle + phases[0]) + np.cos((cycles + 1) * self.angle + phases[1])) / 1.4

    def paint_cortex(self, q: np.ndarray, brain: np.ndarray, ventricles: bool) -> None:
        """Furrows run inwards from the surface, grey matter lines them, white matter fills the rest."""
        bend = pink(self.rng, self.shape, 1.8)
        noise = self.rng.standard_normal((256, 1024))  # rows run inwards, columns round the head
        noise = cv2.GaussianBlur(noise, (0, 0), 9, sigmaY=24) - cv2.GaussianBlur(noise, (0, 0), 32, sigmaY=40)
        column, row = (self.angle / (2 * np.pi) + 0.5 + 0.010 * bend) * 1024 % 1024, q * 160 + 8 * bend
        wave = cv2.remap(noise, np.float32(column), np.float32(row), cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
        to_zero = np.abs(wave) / (np.hypot(*np.gradient(wave)) + 1e-6)  # pixels to where the wave is 0
        deepest = (0.66 if ventricles else 0.52) + 0.10 * self.wave(7) + 0.05 * self.wave(15)
        fluid = (to_zero < 0.006 * self.unit * (0.6 + smoothstep(deepest, 1.0, q))) & (q > deepest)
        midline = np.abs(self.x + 0.004 * np.sin(14 * self.y)) < 0.008
        fluid |= midline & (np.abs(self.y + 0.02) > (0.36 if ventricles else 0))
        to_fluid = cv2.distanceTransform((brain & ~fluid).astype(np.uint8), cv2.DIST_L2, 5)
        ribbon = 0.042 * self.unit * (1 + 0.18 * pink(self.rng, self.shape, 1.2))
        self.mark(brain, "white")
        self.mark(brain & (to_fluid < ribbon), "grey")
        self.mark(brain & fluid, "fluid")
        for tissue, a, b, radius_a, radius_b in INNER_PARTS if ventricles else ():
            self.mark(brain & (bar_depth(np.abs(self.x), self.y, a, b, radius_a, radius_b) > 0), tissue)

    def focus(self, x: float, y: float, radius: float, tissue: str) -> None:
        ragged = radius * (1 + 0.25 * pink(self.rng, self.shape, 1.6))
        inside = np.hypot(self.x - x, self.y - y) < ragged
        self.mark(inside & np.isin(self.label, [LABEL["white"], LABEL["grey"]]), tissue)

    def view(self, modality: str) -> np.ndarray:
        """The slice in one modality, float (H, W); MRI and CT are exactly 0 outside the head."""
        levels = np.array(list(TISSUES.values()), np.float32)[:, MODALITY[modality]]
        image = levels[self.label]
        if modality == "PET":
            image *= 1 + 0.13 * pink(self.rng, self.shape, 1.3)
            return reduce(cv2.GaussianBlur(image, (0, 0), 0.018 * self.shape[0]))
        blur, texture = (1.8, 0.012) if modality == "CT" else (1.4, 0.05)
        if modality != "CT":
            image *= 1 + 0.08 * self.x - 0.10 * self.y + 0.10 * np.hypot(self.x, self.y)  # coil sensitivity
        image *= 1 + texture * pink(self.rng, self.shape, 0.8)
        image = reduce(cv2.GaussianBlur(image, (0, 0), blur))
        image += self.rng.normal(0, 0.012, image.shape)
        return image * (reduce(self.label > 0) > 0.5)


def false_colour(uptake: np.ndarray) -> np.ndarray:
    """Black, blue, green, yellow, red for uptake 0 ... 1, as BGR bytes."""
    stops = [0, 0.10, 0.28, 0.45, 0.60, 0.75, 0.90, 1.0]
    blue = np.interp(uptake, stops, [0, 0.45, 0.95, 0.65, 0.10, 0.0, 0.0, 0.0])
    green = np.interp(uptake, stops, [0, 0, 0.25, 0.75, 0.95, 0.80, 0.25, 0.0])
    red = np.interp(uptake, stops, [0, 0, 0.05, 0.10, 0.75, 1.0, 1.0, 0.75])
    return to_bytes(np.dstack([blue, green, red]))


def ventricles_t2() -> Pair:
    """T2 MRI and CT: calcium in the CT only, a white-matter lesion in the MRI only."""
    head = Head(101, (256, 256), 3, ventricles=True)
    head.focus(-0.32, 0.30, 0.06, "lesion")
    return to_bytes(head.view("T2")), to_bytes(head.view("CT"))


def convexity_t1() -> Pair:
    """T1 MRI and CT above the ventricles, of an odd size, with a lesion in the MRI only."""
    head = Head(113, (237, 211), -5, ventricles=False)
    head.focus(0.15, 0.03, 0.10, "lesion")
    return to_bytes(head.view("T1")), to_bytes(head.view("CT"))


def uptake_t1() -> Pair:
    """T1 MRI and PET: uptake follows the grey matter, and one focus is seen by the PET only."""
    head = Head(127, (256, 256), -2, ventricles=True)
    head.focus(0.32, 0.26, 0.07, "active")
    return to_bytes(head.view("T1")), false_colour(np.clip(head.view("PET") - 0.06, 0, 1))


# --- files ----------------------------------------------------------------------------------------------

SETS: dict[str, tuple[tuple[str, str], tuple[Callable[[], Pair], ...]]] = {
    "Sample_IVF": (("ir", "vi"), (street_night, forest_smoke, underpass)),
    "Sample_MRI_CT": (("MRI", "CT"), (ventricles_t2, convexity_t1)),
    "Sample_MRI_PET": (("MRI", "PET"), (uptake_t1,)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    out = parser.parse_args(argv).out
    for name, (modalities, painters) in SETS.items():
        for painter in painters:
            for modality, image in zip(modalities, painter(), strict=True):
                path = out / name / modality / f"{painter.__name__}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), image, [cv2.IMWRITE_PNG_COMPRESSION, 9]):
                    raise SystemExit(f"error: cannot write {path}")
                print(path)


if __name__ == "__main__":
    main()
