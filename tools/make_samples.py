"""Paint the bundled sample pairs: infrared + visible, MRI + CT and MRI + PET.

Everything is procedural and seeded, so the samples carry no third-party licence and any checkout can
remake them. A scene is described once, in metres: each object has a colour for the visible image and a
temperature for the infrared one. A head is one map of tissues with one level per modality. Colours are
linear RGB, temperatures run from 0 (black) to 1 (white).

    python -m tools.make_samples --out test_img
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

SUPERSAMPLE = 2  # everything is painted this much larger and reduced with INTER_AREA
WALL_PX_PER_M = 40
ALL = (slice(None), slice(None))
FONT = {  # 3 x 5 cells, row by row: the letters of cv2.putText differ between OpenCV 4 and 5
    **{"A": "010101111101101", "C": "111100100100111", "E": "111100110100111", "F": "111100110100100"},
    **{"H": "101101111101101", "I": "111010010010111", "K": "101101110101101", "L": "100100100100111"},
    **{"N": "110101101101101", "O": "111101101101111", "P": "111101111100100", "R": "110101110101101"},
    **{"T": "111010010010010", "X": "101101010101101", "7": "111001010010010", " ": "000000000000000"},
}
Box = tuple[slice, slice]
Vec = Sequence[float]  # a colour (r, g, b) or a place (x, y, z)
Points = Sequence[Vec]
Pair = tuple[np.ndarray, np.ndarray]


# --- primitives -----------------------------------------------------------------------------------------


def pink(rng: np.random.Generator, shape: Sequence[int], power: float, stretch: float = 1.0) -> np.ndarray:
    """Periodic noise, spectrum 1 / f^power, mean 0, standard deviation 1; stretch > 1 lengthens it in x."""
    radius = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None] * stretch)
    radius[0, 0] = np.inf  # drops the mean
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * radius**-power, s=shape)
    return (field / field.std()).astype(np.float32)


def tinted(tone: np.ndarray, colour: Vec) -> np.ndarray:
    """(H, W) brightness times one colour: (H, W, 3)."""
    return tone[..., None] * np.asarray(colour, np.float32)


def smoothstep(low: float | np.ndarray, high: float, value: np.ndarray) -> np.ndarray:
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def capsule(x: np.ndarray, y: np.ndarray, a: Vec, b: Vec, radius_a: float, radius_b: float) -> Pair:
    """Tapered bar from a to b: depth inside its outline (> 0 within), and the offset across it in [-1, 1]."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = max(np.hypot(dx, dy), 1e-6)
    t = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / length**2, 0, 1)
    radius = radius_a + t * (radius_b - radius_a)
    across = ((x - a[0]) * dy - (y - a[1]) * dx) / length / radius
    return radius - np.hypot(x - a[0] - t * dx, y - a[1] - t * dy), np.clip(across, -1, 1)


def rounded(points: Points) -> np.ndarray:
    """Chaikin corner cutting, twice: a polygon without sharp corners."""
    p = np.asarray(points, float)
    for _ in range(2):
        following = np.roll(p, -1, axis=0)
        p = np.stack([0.8 * p + 0.2 * following, 0.2 * p + 0.8 * following], 1).reshape(-1, p.shape[1])
    return p


def circle(centre: Vec, axis_a: Vec, axis_b: Vec) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)[:, None]
    return np.array(centre) + np.cos(turn) * np.array(axis_a) + np.sin(turn) * np.array(axis_b)


def front(x0: float, x1: float, y0: float, y1: float, z: float) -> Points:
    """Upright rectangle that faces the camera."""
    return [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]


def reduce(image: np.ndarray) -> np.ndarray:
    size = (image.shape[1] // SUPERSAMPLE, image.shape[0] // SUPERSAMPLE)
    return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


# --- walls and signs ------------------------------------------------------------------------------------


@dataclass
class Wall:
    """A flat texture for both modalities: albedo and glow (h, w, 3), temperature (h, w)."""

    albedo: np.ndarray
    temp: np.ndarray
    glow: np.ndarray


def make_wall(rng: np.random.Generator, size_m: Vec, tint: Vec, temp: float, kind: str) -> Wall:
    """A wall of "brick", "metal" (corrugated), "plaster" or "hedge", uneven in both modalities."""
    w, h = (round(side * WALL_PX_PER_M) for side in size_m)
    y, x = np.mgrid[:h, :w] / WALL_PX_PER_M
    tone = 1 + 0.06 * pink(rng, (h, w), 1.2) + (0.3 if kind == "hedge" else 0.04) * pink(rng, (h, w), 0.4)
    if kind == "metal":
        tone *= 1 + 0.16 * np.sin(x * 2 * np.pi / 0.35)
    if kind == "brick":
        row = (y / 0.16).astype(int)
        shifted = x + 0.21 * (row % 2)
        tone *= rng.normal(1, 0.13, (h, w))[row, (shifted / 0.42).astype(int)]
        tone = np.where((y % 0.16 < 0.03) | (shifted % 0.42 < 0.03), 1.35, tone)  # mortar
    heat = temp + 0.015 * pink(rng, (h, w), 1.2) + 0.05 * (tone - 1)
    tone *= 0.82 + 0.18 * smoothstep(0, 1.2, size_m[1] - y)  # splashed and dirty near the ground
    return Wall(tinted(np.clip(tone, 0.2, 2), tint), heat.astype(np.float32), np.zeros((h, w, 3), np.float32))


def add_windows(rng: np.random.Generator, wall: Wall, grid: Sequence[int], lit: float, warm: float) -> None:
    """Windows in columns and storeys: a share `lit` shines, a share `warm` only the infrared can see."""
    (columns, storeys), (height, width) = grid, wall.temp.shape
    w, h = round(1.2 * WALL_PX_PER_M), round(1.5 * WALL_PX_PER_M)
    ramp = np.linspace(1, 0.35, h)[:, None]
    for storey in range(storeys):
        top = height - round((1.2 + 3.1 * storey) * WALL_PX_PER_M) - h
        for left in np.linspace(0, width, 2 * columns + 1)[1::2].astype(int) - w // 2:
            fate = rng.random()
            frame = (slice(top - 4, top + h + 4), slice(left - 4, left + w + 4))
            glass = (slice(top, top + h), slice(left, left + w))
            wall.albedo[frame] = 0.5
            wall.albedo[glass] = tinted(ramp, (0.10, 0.13, 0.17))
            wall.temp[glass] = 0.14  # glass mirrors the cold sky
            if fate < lit:
                curtain = 0.55 + 0.45 * np.cos(np.linspace(-4, 4, w) + 9 * rng.random()) ** 2
                wall.glow[glass] = tinted(rng.uniform(0.4, 1.1) * ramp * curtain, (1.0, 0.62, 0.26))
            if fate < lit + warm:
                wall.temp[glass] = rng.uniform(0.5, 0.68) * (0.85 + 0.15 * ramp)
            bar = (glass[0], slice(left + w // 2 - 1, left + w // 2 + 1))
            wall.albedo[bar], wall.glow[bar] = 0.35, 0


def make_sign(text: str, ink: Vec, board: Vec, temp: float, glow: float) -> Wall:
    """Lettering of one temperature with its board: only the visible image can read it."""
    cells = [np.pad(np.array(list(FONT[c]), np.float32).reshape(5, 3), ((1, 1), (0, 1))) for c in text]
    ink_share = cv2.resize(np.pad(np.hstack(cells), ((0, 0), (1, 0))), None, fx=12, fy=12)
    ink_share = smoothstep(0.35, 0.65, ink_share)
    albedo = tinted(ink_share, ink) + tinted(1 - ink_share, board)
    return Wall(albedo, np.full(ink_share.shape, temp, np.float32), tinted(glow * ink_share, ink))


# --- the scene ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Light:
    """Light and air of a scene; `shadow` is how far (x, z) a shadow reaches per metre of height."""

    ambient: Vec
    sun: Vec = (0.0, 0.0, 0.0)
    shadow: tuple[float, float] | None = None
    haze: Vec = (0.7, 0.75, 0.8)
    haze_m: float = 400.0
    exposure: float = 1.6
    noise: float = 0.006


class Scene:
    """Canvas for both modalities, seen by a level camera at height `eye_m` that looks along z.

    Objects are painted far to near, in metres: x to the right, y up from the ground, z away.
    """

    def __init__(self, seed: int, size: tuple[int, int], light: Light, horizon: float, eye_m: float) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE)
        self.light, self.eye_m = light, eye_m
        self.focal, self.cx, self.horizon = 0.95 * self.shape[1], self.shape[1] / 2, horizon * self.shape[0]
        self.lamps: list[tuple[Vec, Vec, float]] = []  # place, colour, power
        self.v, self.u = np.mgrid[: self.shape[0], : self.shape[1]].astype(np.float32)
        below = np.maximum(self.v - self.horizon, 1e-3)
        self.depth = np.where(self.v > self.horizon, self.focal * eye_m / below, 1e6).astype(np.float32)
        self.ground = (self.v > self.horizon).astype(np.float32)  # 1 where bare ground is seen
        self.shade = np.ones(self.shape, np.float32)  # 0 in full shadow
        self.temp = np.zeros(self.shape, np.float32)
        self.albedo, self.glow = np.zeros((2, *self.shape, 3), np.float32)

    # Geometry

    def project(self, points: Points) -> np.ndarray:
        x, y, z = np.asarray(points, float).T
        return np.stack([self.cx + self.focal * x / z, self.horizon + self.focal * (self.eye_m - y) / z], 1)

    def window(self, corners: np.ndarray, margin: float) -> Box:
        low = np.clip(np.floor(corners.min(0) - margin), 0, self.shape[::-1]).astype(int)
        high = np.clip(np.ceil(corners.max(0) + margin), 0, self.shape[::-1]).astype(int)
        return slice(low[1], high[1]), slice(low[0], high[0])

    def mask(self, points: Points, soft: float = 0.0) -> tuple[Box, np.ndarray]:
        """Coverage in [0, 1] of a polygon in its window, its edge blurred by `soft` pixels."""
        corners = self.project(points)
        box = self.window(corners, 3 * soft + 1)
        coverage = np.zeros(self.shade[box].shape, np.uint8)
        if coverage.size:
            fixed = np.rint((corners - [box[1].start, box[0].start]) * 16).astype(np.int32)
            cv2.fillPoly(coverage, [fixed], 255, cv2.LINE_AA, 4)
            if soft:
                coverage = cv2.GaussianBlur(coverage, (0, 0), soft)
        return box, coverage.astype(np.float32) / 255

    def plane_depth(self, points: Points, box: Box) -> np.ndarray | float | None:
        x, y, z = np.asarray(points, float).T
        if not y.any():
            return None  # painted on the ground, which keeps its depth
        if np.ptp(x) == 0 and x[0] != 0:  # a wall along the street
            offset = np.maximum((self.u[box] - self.cx) * np.sign(x[0]), 1)
            return np.clip(self.focal * abs(x[0]) / offset, z.min(), z.max())
        return z.mean()

    # Paint

    def paint(self, box: Box, alpha: np.ndarray, colour=None, temp=None, depth=None, glow=0.0) -> None:
        """Blend one object in. What is None stays: road paint has no temperature, smoke no depth."""
        if colour is not None:
            self.albedo[box] += alpha[..., None] * (np.asarray(colour, np.float32) - self.albedo[box])
            self.glow[box] += alpha[..., None] * (np.asarray(glow, np.float32) - self.glow[box])
        if temp is not None:
            self.temp[box] += alpha * (temp - self.temp[box])
        if depth is not None:
            self.depth[box] = np.where(alpha > 0.5, depth, self.depth[box])
            self.ground[box] *= 1 - alpha
            self.shade[box] += alpha * (1 - self.shade[box])

    def darken(self, points: Points, soft: float, strength: float) -> None:
        """Shadow on the bare ground; overlapping shadows do not add up."""
        box, alpha = self.mask(points, soft)
        self.shade[box] = np.minimum(self.shade[box], 1 - strength * alpha * self.ground[box])

    def cast(self, points: Points) -> None:
        """The shadow that the sun makes of a polygon."""
        if self.light.shadow is not None:
            sx, sz = self.light.shadow
            self.darken([(x + sx * max(y, 0), 0, z + sz * max(y, 0)) for x, y, z in points], 2.0, 0.65)

    def polygon(self, points, colour, temp=None, *, glow=0.0, fade=1.0, soft=0.0, opacity=1.0) -> None:
        """Polygon; `fade` is the brightness of its lower edge as a share of that of its upper one."""
        box, alpha = self.mask(points, soft)
        depth = self.plane_depth(points, box)
        if depth is not None:
            self.cast(points)
        tone = np.linspace(1, fade, len(alpha))[:, None] * self.rng.normal(1, 0.04, alpha.shape)
        self.paint(box, alpha * opacity, tinted(tone, colour), temp, depth, glow)

    def patch(self, x0: float, x1: float, z0: float, z1: float, colour: Vec, temp=None, **how) -> None:
        """Rectangle on the ground, by default worn road paint, which is as warm as the road."""
        how = {"opacity": 0.85} | how
        self.polygon([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], colour, temp, **how)

    def facade(self, left: Vec, right: Vec, low: float, high: float, wall: Wall) -> None:
        """A wall texture in perspective, upright between two places (x, z) on the ground plan."""
        (x0, z0), (x1, z1) = left, right
        points = [(x0, low, z0), (x1, low, z1), (x1, high, z1), (x0, high, z0)]
        box, alpha = self.mask(points)
        h, w = wall.temp.shape
        target = np.float32(self.project(points) - [box[1].start, box[0].start])
        matrix = cv2.getPerspectiveTransform(np.float32([[0, h], [w, h], [w, 0], [0, 0]]), target)
        albedo, temp, glow = (
            cv2.warpPerspective(layer, matrix, alpha.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
            for layer in (wall.albedo, wall.temp, wall.glow)
        )
        self.cast(points)
        self.paint(box, alpha, albedo, temp, self.plane_depth(points, box), glow)

    def wall(self, left: Vec, right: Vec, low, high, kind: str, tint: Vec, temp: float, windows=None) -> None:
        size_m = (np.hypot(right[0] - left[0], right[1] - left[1]), high - low)
        wall = make_wall(self.rng, size_m, tint, temp, kind)
        if windows:
            add_windows(self.rng, wall, *windows)
        self.facade(left, right, low, high, wall)

    def stroke(self, a, b, radius_a, radius_b, colour=None, temp=None, *, glow=0.0, flat=False) -> None:
        """Tapered round bar: limb, pole, trunk; `flat` cuts the ends of an upright one off, as of a tank."""
        (pa, pb), z = self.project([a, b]), (a[2] + b[2]) / 2
        ra, rb = (max(r * self.focal / z, 0.6) for r in (radius_a, radius_b))
        box = self.window(np.stack([pa, pb]), max(ra, rb) + 1)
        inside, across = capsule(self.u[box], self.v[box], pa, pb, ra, rb)
        alpha, bulge = np.clip(inside + 0.5, 0, 1), np.sqrt(1 - 0.9 * across**2)
        if flat:
            rim = np.sqrt(1 - across**2) * self.focal * radius_a / z**2  # the ends are discs in perspective
            foot, top = pa[1] + rim * (self.eye_m - a[1]), pb[1] + rim * (self.eye_m - b[1])
            alpha *= np.clip(foot - self.v[box], 0, 1) * np.clip(self.v[box] - top, 0, 1)
        if colour is not None:
            colour = tinted(0.45 + 0.55 * bulge - 0.15 * across, colour)
        if temp is not None:
            temp = temp * (0.86 + 0.14 * bulge)
        ends = ((a, -radius_a), (a, radius_a), (b, radius_b), (b, -radius_b))
        self.cast([(end[0] + reach, end[1], z) for end, reach in ends])
        self.paint(box, alpha, colour, temp, z, glow)

    def foliage(self, centre: Vec, size: Vec, colour: Vec, temp: float, *, cone: bool = False) -> None:
        """A crown of leaves: overlapping puffs with a ragged edge, or the layers of a conifer."""
        (x, y, z), (rx, ry) = centre, size
        corners = self.project(front(x - rx, x + rx, y - ry, y + ry, z))
        box = self.window(corners, 2)
        if not self.shade[box].size:
            return
        px = (self.u[box] - corners[:, 0].mean()) / (rx * self.focal / z)  # -1 ... 1 across the crown
        py = (self.v[box] - corners[:, 1].mean()) / (ry * self.focal / z)
        if cone:
            layer = ((py + 1) * 4 + 0.3 * np.sin(px * 5)) % 1
            field, lit = (py + 1) / 2 * (0.62 + 0.38 * layer) - np.abs(px), 0.45 + 0.5 * layer - 0.25 * px
        else:
            field, lit = np.full(px.shape, -1.0), np.zeros(px.shape)
            for angle, reach, r in self.rng.uniform((0, 0.1, 0.28), (2 * np.pi, 0.62, 0.42), (16, 3)):
                ox, oy = reach * np.cos(angle), reach * np.sin(angle)
                puff = 1 - np.hypot(px - ox, py - oy) / r
                lit = np.where(puff > field, 0.72 - 0.5 * (py - oy) / r - 0.15 * (px - ox) / r, lit)
                field = np.maximum(field, puff)
                self.cast(circle((x + ox * rx, y - oy * ry, z), (r * rx, 0, 0), (0, r * ry, 0)))
        leaves = pink(self.rng, px.shape, 0.7)
        tone = np.clip(lit * (1 + 0.28 * leaves), 0.12, 1.6)
        alpha = smoothstep(0.0, 0.1, field + 0.13 * leaves)
        self.paint(box, alpha, tinted(tone, colour), temp + 0.035 * leaves + 0.03 * lit, z)

    def sky(self, top: Vec, bottom: Vec, cloud: float, temp: float) -> None:
        height = np.clip(1 - self.v / self.horizon, 0, 1)
        clouds = cloud * smoothstep(-0.3, 1.6, pink(self.rng, self.shape, 1.6, 2.2))
        clear = tinted(height**0.7, top) + tinted(1 - height**0.7, bottom)
        self.glow[:] = clear + clouds[..., None] * (0.96 * np.max(bottom) - clear)
        self.temp[:] = temp + 0.1 * (1 - height) ** 3 + 0.1 * clouds

    def floor(self, colour: Vec, temp: float, rough: float, grain_m: float, patchy: float) -> None:
        """The ground plane, its texture fixed to the world so that the grain shrinks with distance."""
        fine, coarse = (self.ground_noise(*spec) for spec in ((0.5, 1 / grain_m), (1.4, 18)))
        tone = np.clip(1 + rough * fine + patchy * coarse, 0.15, 2.2)
        self.paint(ALL, self.ground, tinted(tone, colour), temp + 0.012 * fine + 0.03 * coarse)

    def ground_noise(self, power: float, px_per_m: float) -> np.ndarray:
        x = self.depth * (self.u - self.cx) / self.focal
        world = [np.mod(px_per_m * c, 512) for c in (x, self.depth)]
        noise = cv2.remap(pink(self.rng, (512, 512), power), *world, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
        texels = self.depth**2 * px_per_m / (self.focal * self.eye_m)  # under one pixel
        return noise / (1 + 0.25 * texels)  # fades where it would alias

    def grass(self, colour: Vec, temp: float, far_m: float, count: int) -> None:
        """Blades as lines, far to near, on the bare ground."""
        tone, blades = np.full(self.shape, 128, np.uint8), np.zeros(self.shape, np.uint8)
        z = 1 / np.sort(self.rng.uniform(1 / far_m, 1 / 3, count))
        x, lean = self.rng.uniform(-0.58, 0.58, count) * z, self.rng.normal(0, 0.05, count)
        roots = self.project(np.stack([x, 0 * x, z], 1))
        tips = self.project(np.stack([x + lean, self.rng.uniform(0.06, 0.22, count), z], 1))
        ends = np.rint(np.stack([roots, tips], 1) * 16).astype(int).tolist()
        for (root, tip), grey in zip(ends, self.rng.integers(40, 250, count).tolist(), strict=True):
            cv2.line(tone, root, tip, grey, 1, cv2.LINE_AA, 4)
            cv2.line(blades, root, tip, 160, 1, cv2.LINE_AA, 4)
        tone = tone.astype(np.float32) / 128
        self.paint(ALL, blades / 255 * self.ground, tinted(tone, colour), temp + 0.05 * (tone - 1))

    def smoke(self, x: float, z: float, size_m: Vec, colour: Vec) -> None:
        """A drifting plume: thick in the visible image, almost nothing in the infrared one."""
        corners = self.project(front(x - size_m[0] / 2, x + size_m[0] / 2, 0, size_m[1], z))
        (left, bottom), (right, top) = corners[0], corners[2]
        px, rise = (self.u - left) / (right - left) - 0.5, (bottom - self.v) / (bottom - top)
        billow, wander = pink(self.rng, self.shape, 1.5), 0.06 * pink(self.rng, self.shape, 2.0)
        half = np.maximum(0.28 + 0.24 * rise, 0.05)
        body = 1 - ((px + wander - 0.16 * rise) / half) ** 2 - np.maximum(rise - 0.7, 0)
        alpha = 0.97 * smoothstep(-0.1, 0.9, body + 0.28 * billow) * smoothstep(-0.12, 0.05, rise)
        self.paint(ALL, alpha, tinted(0.9 + 0.1 * billow + 0.12 * rise, colour))
        self.paint(ALL, 0.1 * alpha, temp=0.3)
        self.shade += alpha * (1 - self.shade)

    # Cameras

    def render(self) -> Pair:
        """The pair: infrared (H, W) and visible (H, W, 3) in BGR, 8 bit."""
        return self.render_infrared(), self.render_visible()

    def render_infrared(self) -> np.ndarray:
        cooled = self.temp - 0.07 * (1 - self.shade)  # a shadow is a little cooler
        heat = reduce(cv2.GaussianBlur(cooled, (0, 0), 0.7 * SUPERSAMPLE))
        columns = self.rng.normal(0, 0.0035, (1, heat.shape[1]))  # fixed pattern of the readout
        return to_bytes(heat + columns + self.rng.normal(0, 0.005, heat.shape))

    def render_visible(self) -> np.ndarray:
        light, shade = self.light, self.shade[..., None]
        x = (self.u - self.cx) * self.depth / self.focal
        y = self.eye_m - (self.v - self.horizon) * self.depth / self.focal
        lit = np.zeros_like(self.albedo) + np.float32(light.ambient)
        for (lx, ly, lz), colour, power in self.lamps:
            square = (x - lx) ** 2 + (y - ly) ** 2 + (self.depth - lz) ** 2 + 0.3
            downward = 0.15 + 0.85 * np.clip((ly - y) / np.sqrt(square), 0, 1)
            lit += tinted(power * downward / square, colour)
        image = self.albedo * (lit * (0.2 + 0.8 * shade) + shade**2 * np.float32(light.sun)) + self.glow
        haze = np.where(self.depth < 1e5, 1 - np.exp(-self.depth / light.haze_m), 0)  # the sky has its own
        image = np.float32(image * (1 - haze[..., None]) + tinted(haze, light.haze))
        bright = np.clip(image - 0.9, 0, 6)
        for sigma, weight in ((4, 0.12), (14, 0.12), (45, 0.15)):  # lamps glow
            image += weight * cv2.GaussianBlur(bright, (0, 0), sigma)
        encoded = reduce((1 - np.exp(-light.exposure * image)) ** (1 / 2.2))
        grain = self.rng.normal(0, 0.8, (*encoded.shape[:2], 1)) + self.rng.normal(0, 0.5, encoded.shape)
        return to_bytes(encoded + light.noise * cv2.GaussianBlur(grain, (0, 0), 0.5))[..., ::-1]


# --- objects --------------------------------------------------------------------------------------------

DARK, STEEL, WHITE, NAVY = (0.02, 0.02, 0.02), (0.09, 0.10, 0.10), (0.6, 0.6, 0.56), (0.07, 0.09, 0.17)


def person(s: Scene, x: float, z: float, coat: Vec, trousers: Vec, stride: float, side=1, lit=1.0) -> None:
    """Somebody walking; bare skin is warmest, shoes are least warm. `lit` dims somebody out of the light."""
    skin, hair = (0.52, 0.32, 0.23), (0.06, 0.045, 0.035)
    s.darken(circle((x, 0, z), (0.38, 0, 0), (0, 0, 0.22)), max(0.05 * s.focal / z, 1), 0.75)

    def part(ax, ay, bx, by, radius_a, radius_b, colour, temp):
        a, b = (x + side * ax, ay, z), (x + side * bx, by, z)
        s.stroke(a, b, radius_a, radius_b, lit * np.array(colour), temp)

    for hip, step, temp in ((-0.07, -stride, 0.63), (0.07, 0.9 * stride, 0.68)):
        knee, foot = hip + 0.35 * step + 0.04, 0.8 * (hip + step)
        part(hip, 0.9, knee, 0.5, 0.105, 0.075, trousers, temp)
        part(knee, 0.5, foot, 0.1, 0.075, 0.052, trousers, 0.93 * temp)
        part(foot, 0.05, foot + 0.12, 0.04, 0.045, 0.035, DARK, 0.5)
    for shoulder, swing in ((-0.2, 0.5 * stride), (0.2, -0.5 * stride)):
        elbow, hand = 1.25 * shoulder + 0.3 * swing, 1.3 * shoulder + swing
        part(shoulder, 1.37, elbow, 1.1, 0.062, 0.052, coat, 0.66)
        part(elbow, 1.1, hand + 0.03, 0.86, 0.052, 0.042, coat, 0.66)
        part(hand + 0.03, 0.84, hand + 0.04, 0.8, 0.042, 0.038, skin, 0.86)
    part(0, 0.95, 0, 1.32, 0.15, 0.17, coat, 0.72)
    part(-0.13, 1.39, 0.13, 1.39, 0.075, 0.075, coat, 0.74)
    part(0, 1.42, 0, 1.52, 0.06, 0.055, skin, 0.88)
    part(0.01, 1.58, 0, 1.65, 0.082, 0.093, skin, 0.9)
    part(-0.015, 1.68, -0.01, 1.70, 0.086, 0.07, hair, 0.77)


def car(s: Scene, x: float, z: float, colour: Vec, *, nose: bool, driven: bool, lights: float = 0.0) -> None:
    """A car in line with the view, nose or rear towards us; one just driven has a hot engine and tyres."""
    body, engine, tyres = 0.33, 0.88 if driven else 0.4, 0.62 if driven else 0.38
    deck, deck_y, deck_temp = (1.15, 0.92, engine) if nose else (0.55, 0.98, body)  # bonnet or boot
    glass, roof_end, half, flank = deck + 0.7, deck + 2.2, 0.86, -np.sign(x) * 0.86
    paint, black = np.array(colour), (0.03, 0.035, 0.04)

    def panel(points, tone, temp, **how):  # points are (across, up, along)
        s.polygon(np.asarray(points) + (x, 0, z), tone, temp, **how)

    def slope(half0, y0, z0, half1, y1, z1):
        return [(-half0, y0, z0), (half0, y0, z0), (half1, y1, z1), (-half1, y1, z1)]

    s.darken([(x + dx, 0, z + dz) for dx, dz in ((-1, -0.25), (1, -0.25), (1, 4.4), (-1, 4.4))], 5.0, 0.85)
    near_end = [(4.3, 0.3), (0, 0.3), (0, 0.75), (deck, deck_y), (glass, 1.42)]
    far_end = [(roof_end, 1.42), (roof_end + 0.55, 0.95), (4.3, 0.8)]
    panel([(flank, y, along) for along, y in rounded(near_end + far_end)], 0.62 * paint, body, fade=0.5)
    pane = [(deck + 0.25, 0.97), (glass + 0.1, 1.34), (roof_end - 0.05, 1.34), (roof_end + 0.35, 0.97)]
    panel([(1.005 * flank, y, along) for along, y in pane], black, 0.2)
    for along in (0.75, 3.5):
        for radius, tone, temp in ((0.33, DARK, tyres), (0.19, (0.25, 0.25, 0.26), tyres + 0.08)):
            panel(circle((1.01 * flank, 0.33, along), (0, radius, 0), (0, 0, radius)), tone, temp)
    for left in (-0.86, 0.62):
        panel(front(left, left + 0.24, 0, 0.35, 0.3), DARK, tyres)
    panel(slope(0.7, 1.42, glass, 0.72, 1.4, roof_end), 1.1 * paint, 0.27)
    panel(slope(half, deck_y, deck, 0.7, 1.42, glass), 0.9 * paint, body)
    panel(slope(0.76, deck_y + 0.04, deck + 0.05, 0.64, 1.37, glass), (0.10, 0.12, 0.14), 0.19, fade=0.25)
    panel(slope(half, 0.8, 0, half, deck_y, deck), 1.15 * paint, deck_temp)
    panel(rounded(slope(0.88, 0.28, 0, 0.87, 0.84, 0)), 0.85 * paint, 0.5 * (body + deck_temp), fade=0.6)
    panel(front(-0.8, 0.8, 0.28, 0.42, -0.02), DARK, body + 0.04)  # bumper
    grille, exhaust = front(-0.45, 0.45, 0.5, 0.7, -0.03), front(0.4, 0.52, 0.26, 0.33, -0.04)
    panel(grille if nose else exhaust, DARK, engine)
    panel(front(-0.26, 0.26, 0.46, 0.57, -0.04), WHITE, body)  # number plate
    beam = np.array((1.0, 0.92, 0.75) if nose else (1.0, 0.06, 0.03))
    for left in (-0.83, 0.53):
        panel(rounded(front(left, left + 0.3, 0.66, 0.8, -0.03)), 0.8 * beam, body + 0.1, glow=lights * beam)


def street_lamp(s: Scene, x: float, z: float, power: float) -> None:
    head, colour = (x - np.sign(x) * 1.1, 6.3, z), (1.0, 0.74, 0.42)
    s.stroke((x, 0, z), (x, 6.1, z), 0.09, 0.05, STEEL, 0.27)
    s.stroke((x, 6.1, z), head, 0.05, 0.04, STEEL, 0.27)
    if power:  # or the bulb is broken
        s.lamps.append((head, colour, power))
        s.stroke(head, (head[0], 6.28, z), 0.12, 0.12, colour, 0.8, glow=8 * np.array(colour))


def sign(s: Scene, ends: Points, low: float, text: str, ink: Vec, board: Vec, temp: float, glow=0.0) -> None:
    s.facade(*ends, low, low + 1.3, make_sign(text, ink, board, temp, glow))


def tree(s: Scene, x: float, z: float, tall: float) -> None:
    s.darken(circle((x, 0, z), (0.5, 0, 0), (0, 0, 0.3)), 2, 0.7)
    s.stroke((x, 0, z), (x + 0.1, 0.6 * tall, z), 0.035 * tall, 0.02 * tall, (0.10, 0.075, 0.055), 0.36)
    s.foliage((x, 0.64 * tall, z), (0.36 * tall, 0.37 * tall), (0.12, 0.20, 0.05), 0.30)


# --- scenes ---------------------------------------------------------------------------------------------


def street_night() -> Pair:
    """A dim shopping street: signs, lamps and brick in the visible, walkers in the dark in the infrared."""
    light = Light((0.005, 0.006, 0.010), haze=(0.012, 0.012, 0.02), haze_m=150, exposure=1.8, noise=0.016)
    s = Scene(11, (288, 384), light, horizon=0.44, eye_m=1.75)
    s.sky((0.004, 0.006, 0.016), (0.035, 0.03, 0.035), cloud=0.3, temp=0.03)
    s.floor((0.19, 0.19, 0.20), 0.22, rough=0.16, grain_m=0.02, patchy=0.12)
    for side in (-1, 1):
        s.patch(side * 3.7, side * 7, 2.2, 70, (0.27, 0.25, 0.23), 0.26, opacity=0.55)
        s.patch(side * 3.7, side * 3.85, 2.2, 70, (0.4, 0.39, 0.37), 0.28)
    for z in np.arange(4.0, 60, 4.5):
        s.patch(-0.07, 0.07, z, z + 2.2, WHITE)
    for x in np.arange(-3.3, 3.3, 0.95):
        s.patch(x, x + 0.5, 13.5, 16.0, WHITE)
    s.wall((-9, 70), (9, 70), 0, 13.5, "brick", (0.2, 0.17, 0.15), 0.24, ((6, 4), 0.4, 0.2))
    left = ((-1, 38, 62, 10), (-1, 20, 38, 12), (-1, 5, 20, 9.5))
    right = ((1, 34, 62, 11), (1, 16, 34, 9.5), (1, 5, 16, 11))
    for side, near, far, tall in left + right:
        ends = [(side * 6.6, z) for z in (near, far)[::-side]]  # left to right, as we see them
        tint, windows = s.rng.uniform(0.7, 1.15) * np.array((0.32, 0.17, 0.12)), (int((far - near) / 2.6), 3)
        s.wall(*ends, 0, tall, "brick", tint, s.rng.uniform(0.20, 0.27), (windows, 0.3, 0.25))
    for x, z, power in ((4.3, 50, 5.0), (-4.3, 41, 5.0), (4.3, 32, 6.0), (-4.3, 22, 0.0), (4.3, 16.5, 8.0)):
        street_lamp(s, x, z, power)
    red, blue = (1.0, 0.25, 0.16), (0.25, 0.7, 1.0)
    for side, near, text, ink in ((-1, 12.5, "CAFE", red), (1, 22.5, "HOTEL", blue)):
        ends = [(side * 6.5, z) for z in (near, near + 3.4)[::-side]]
        sign(s, ends, 3.1, text, ink, (0.03, 0.03, 0.04), 0.25, glow=1.6)
        s.lamps.append(((side * 6.0, 3.4, near + 1.5), ink, 0.35))
    person(s, 1.3, 26, (0.05, 0.05, 0.06), DARK, 0.25, side=-1)
    person(s, -5.0, 19, (0.10, 0.05, 0.05), DARK, 0.10)
    car(s, 1.9, 17.0, (0.30, 0.05, 0.05), nose=False, driven=True, lights=1.6)
    s.lamps += [((1.9, 0.7, 23.5), (1.0, 0.95, 0.8), 1.5), ((1.9, 0.7, 16.3), (1.0, 0.05, 0.03), 0.15)]
    person(s, -4.6, 9.5, (0.04, 0.05, 0.06), DARK, 0.28)
    person(s, 4.7, 10.5, (0.05, 0.04, 0.04), DARK, 0.16, side=-1)
    return s.render()


def car_park_day() -> Pair:
    """Parked cars in the sun: colours and bay lines against hot bonnets and somebody under a tree."""
    light = Light((0.34, 0.38, 0.46), (1.05, 0.98, 0.86), (1.0, -0.35), (0.62, 0.72, 0.85), 600, 1.25)
    s = Scene(23, (321, 433), light, horizon=0.36, eye_m=3.2)
    s.sky((0.16, 0.36, 0.80), (0.60, 0.76, 0.92), cloud=0.9, temp=0.05)
    s.floor((0.145, 0.145, 0.15), 0.46, rough=0.10, grain_m=0.025, patchy=0.10)
    for x in np.arange(-40, 42, 4.5):
        r = s.rng.uniform(3.5, 5.5)
        s.foliage((x, r - 0.6, 60 + r), (1.2 * r, r), (0.022 * r, 0.04 * r, 0.05), 0.27)
    s.wall((-24, 46), (2, 46), 0, 9, "brick", (0.50, 0.40, 0.30), 0.50, ((8, 2), 0.0, 0.3))
    sign(s, ((-4.6, 45.9), (0.4, 45.9)), 7.2, "PARK", (0.9, 0.9, 0.9), (0.05, 0.16, 0.42), 0.50)
    s.patch(-40, 40, 40, 46, (0.13, 0.2, 0.07), 0.34, soft=1.5, opacity=1.0)
    for x in np.arange(-13.0, 14.0, 2.6):
        for z in (25.0, 12.5):
            s.patch(x - 0.06, x + 0.06, z, z + 4.8, WHITE)
    s.patch(-13, 13, 29.8, 29.95, WHITE)
    s.patch(-0.25, 0.25, 6, 8.2, WHITE)
    s.polygon([(-0.7, 0, 8.2), (0.7, 0, 8.2), (0, 0, 9.8)], WHITE, opacity=0.85)
    tree(s, -9.9, 33, 7.5)
    tree(s, 11.0, 32, 8.0)
    colours = ((0.5, 0.5, 0.52), (0.04, 0.1, 0.3), (0.55, 0.06, 0.04), (0.7, 0.7, 0.68), (0.03, 0.03, 0.035))
    for x, colour, driven in zip((-9.1, -6.5, -1.3, 3.9, 9.1), colours, (0, 1, 0, 0, 1), strict=True):
        car(s, x, 25.3, colour, nose=True, driven=bool(driven))
    person(s, 1.6, 24, (0.65, 0.28, 0.04), NAVY, 0.22)
    tree(s, -11.6, 17.5, 8.2)
    person(s, -6.9, 15.6, (0.07, 0.09, 0.06), (0.06, 0.07, 0.06), 0.08, lit=0.5)
    car(s, 6.5, 12.8, (0.62, 0.42, 0.05), nose=True, driven=True)
    car(s, 3.9, 12.8, (0.10, 0.22, 0.14), nose=False, driven=False)
    person(s, -2.6, 10.5, (0.12, 0.2, 0.42), (0.18, 0.16, 0.13), 0.26, side=-1)
    return s.render()


def forest_smoke() -> Pair:
    """A field before a conifer wood: a plume hides a fire and two people, the edge of the wood a third."""
    light = Light((0.30, 0.34, 0.40), (0.85, 0.78, 0.62), (0.9, -0.5), (0.62, 0.70, 0.78), 320, 1.35, 0.007)
    s = Scene(37, (241, 319), light, horizon=0.40, eye_m=2.2)
    s.sky((0.40, 0.52, 0.70), (0.74, 0.78, 0.80), cloud=0.8, temp=0.08)
    s.floor((0.16, 0.19, 0.065), 0.34, rough=0.20, grain_m=0.05, patchy=0.2)
    for z in np.linspace(85, 42, 9):
        for x in np.arange(-0.65, 0.65, 0.085) * z:
            tall, green = s.rng.uniform(8, 15), s.rng.uniform(0.7, 1.2) * np.array((0.055, 0.10, 0.045))
            place = (x + s.rng.normal(0, 1.5), tall / 2, z)
            s.foliage(place, (0.23 * tall, tall / 2), green, 0.26, cone=True)
    for x in np.arange(-22, 22, 1.3) + s.rng.normal(0, 0.5, 34):
        s.foliage((x, 0.5, 40), (1.5, s.rng.uniform(0.7, 1.4)), (0.06, 0.085, 0.03), 0.27)
    s.patch(-60, 60, 34, 41, (0.05, 0.06, 0.03), 0.27, soft=3, opacity=0.7)
    person(s, 9.5, 33, (0.05, 0.06, 0.035), (0.045, 0.05, 0.03), 0.2, lit=0.5)
    track = [(-3.4, 0, 2.5), (-1.6, 0, 2.5), (2.2, 0, 36), (1.4, 0, 36)]
    s.polygon(track, (0.26, 0.21, 0.14), 0.41, soft=5, opacity=0.7)
    s.grass((0.17, 0.22, 0.06), 0.33, 40, 5200)
    person(s, -5.0, 23, (0.2, 0.08, 0.05), NAVY, 0.15)
    for x, tip, tall in ((-4.0, -3.85, 0.5), (-3.4, -3.5, 0.45), (-3.6, -3.6, 0.8)):
        flame = {"colour": (0.9, 0.4, 0.1), "temp": 1.0, "glow": (1.5, 0.5, 0.08)}
        s.stroke((x, 0.05, 21), (tip, tall, 21), 0.2, 0.04, **flame)
    person(s, -2.6, 20, (0.06, 0.08, 0.16), (0.08, 0.07, 0.06), 0.24, side=-1)
    s.smoke(-3.4, 19, (9.6, 9.0), (0.62, 0.63, 0.66))
    tree(s, 6.6, 14.5, 6.2)
    person(s, 3.1, 12.5, (0.5, 0.10, 0.05), NAVY, 0.2, side=-1)
    return s.render()


def works_dusk() -> Pair:
    """A plant at dusk: hot pipes and tank levels are infrared only, sky and lettering visible only."""
    light = Light((0.085, 0.075, 0.10), haze=(0.36, 0.20, 0.15), haze_m=420, exposure=2.0, noise=0.011)
    s = Scene(41, (256, 341), light, horizon=0.52, eye_m=2.0)
    s.sky((0.05, 0.09, 0.24), (0.75, 0.33, 0.13), cloud=0.25, temp=0.05)
    s.floor((0.20, 0.19, 0.18), 0.33, rough=0.14, grain_m=0.03, patchy=0.2)
    s.wall((10, 88), (42, 88), 0, 9, "plaster", (0.10, 0.09, 0.10), 0.27)
    s.stroke((-14, 0, 60), (-14, 24, 60), 1.1, 0.75, (0.24, 0.15, 0.12), 0.62, flat=True)
    s.wall((-17, 34), (3, 34), 0, 8.5, "metal", (0.20, 0.23, 0.26), 0.34, ((8, 2), 0.5, 0.3))
    roof = [(-17.4, 8.4, 34), (3.4, 8.4, 34), (-0.5, 10.6, 38), (-13.5, 10.6, 38)]
    s.polygon(roof, (0.08, 0.08, 0.09), 0.22, fade=0.7)
    s.polygon(front(-6.6, -2.4, 0, 3.6, 33.9), (0.10, 0.11, 0.12), 0.58, fade=0.8)
    ends, ink, board = ((-14.5, 33.8), (-7.5, 33.8)), (0.9, 0.85, 0.7), (0.06, 0.1, 0.16)
    sign(s, ends, 6.5, "PLANT 7", ink, board, 0.34, glow=0.5)
    for x, tall, level in ((8.2, 7.5, 4.6), (13.4, 6.5, 2.2)):
        s.stroke((x, 0, 30), (x, tall, 30), 2.2, 2.2, (0.30, 0.31, 0.32), 0.27, flat=True)
        s.stroke((x, 0, 30), (x, level, 30), 2.2, 2.2, None, 0.52, flat=True)
    for y, temp in ((4.4, 0.9), (4.95, 0.66)):
        s.stroke((3.0, y, 31), (16, y, 31), 0.17, 0.17, (0.11, 0.11, 0.12), temp)
        s.stroke((3.0, 0, 31), (3.0, y, 31), 0.17, 0.17, (0.11, 0.11, 0.12), temp)
    for x in np.arange(-18, 18, 2.2):
        s.stroke((x, 0, 20), (x, 1.9, 20), 0.05, 0.05, STEEL, 0.25)
    for y in (0.5, 1.1, 1.7):
        s.stroke((-18, y, 20), (18, y, 20), 0.025, 0.025, STEEL, 0.26)
    street_lamp(s, -4.4, 24, 8.0)
    street_lamp(s, 5.2, 24, 8.0)
    for z in (5.0, 8.0, 11.5, 16.0):
        s.patch(-1.9, -1.7, z, z + 1.8, (0.6, 0.45, 0.08))
    car(s, 4.4, 12.5, (0.4, 0.42, 0.42), nose=True, driven=True)
    person(s, -3.6, 15, (0.06, 0.06, 0.07), (0.05, 0.05, 0.06), 0.22)
    person(s, -0.4, 9.0, (0.07, 0.07, 0.08), (0.05, 0.05, 0.06), 0.18, side=-1)
    return s.render()


def underpass() -> Pair:
    """A bridge by day, the smallest sample: two people stand in its dark, only the visible reads the sign."""
    light = Light((0.36, 0.39, 0.45), (0.9, 0.84, 0.72), (0.5, 0.2), (0.7, 0.76, 0.84), 900, 1.3)
    s = Scene(53, (161, 200), light, horizon=0.5, eye_m=1.7)
    s.sky((0.22, 0.42, 0.78), (0.66, 0.78, 0.9), cloud=0.7, temp=0.06)
    s.floor((0.24, 0.23, 0.21), 0.44, rough=0.13, grain_m=0.02, patchy=0.1)
    for x, z, r in ((-9, 62, 5), (1, 60, 4), (9, 64, 6)):
        s.foliage((x, 0.8 * r, z), (1.3 * r, r), (0.10, 0.19, 0.05), 0.28)
    near, far, steel = 16.0, 28.0, (0.2, 0.22, 0.25)
    s.darken([(-6, 0, near - 0.5), (6, 0, near - 0.5), (6, 0, far), (-6, 0, far)], 3.0, 0.99)
    s.wall((-5, near), (-5, far), 0, 4.4, "plaster", (0.022, 0.022, 0.024), 0.29)
    s.wall((5, far), (5, near), 0, 4.4, "plaster", (0.022, 0.022, 0.024), 0.29)
    s.polygon([(-5, 4.4, near), (5, 4.4, near), (5, 4.4, far), (-5, 4.4, far)], DARK, 0.28)
    s.wall((-19, near), (-5, near), 0, 4.4, "hedge", (0.12, 0.17, 0.05), 0.33)
    s.wall((5, near), (19, near), 0, 4.4, "hedge", (0.12, 0.17, 0.05), 0.33)
    s.wall((-20, near), (20, near), 4.4, 6.1, "plaster", (0.36, 0.34, 0.31), 0.50)
    sign(s, ((-2.8, near), (2.8, near)), 4.6, "EXIT 7", (0.9, 0.9, 0.88), (0.02, 0.22, 0.10), 0.50)
    for x in np.arange(-20, 20, 1.0):
        s.stroke((x, 6.1, near), (x, 7.0, near), 0.03, 0.03, steel, 0.4)
    s.stroke((-20, 7.0, near), (20, 7.0, near), 0.04, 0.04, steel, 0.4)
    person(s, 4.2, 20.5, WHITE, WHITE, 0.24, side=-1, lit=0.02)
    person(s, -4.1, 17.5, WHITE, WHITE, 0.12, lit=0.02)
    for z in (4.0, 7.5, 11.5):
        s.patch(-0.08, 0.08, z, z + 1.8, WHITE)
    person(s, -1.3, 9.5, (0.6, 0.45, 0.06), NAVY, 0.22)
    return s.render()


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
            self.mark(brain & (capsule(np.abs(self.x), self.y, a, b, radius_a, radius_b)[0] > 0), tissue)

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
    "Sample_IVF": (("ir", "vi"), (street_night, car_park_day, forest_smoke, works_dusk, underpass)),
    "Sample_MRI_CT": (("MRI", "CT"), (ventricles_t2, convexity_t1)),
    "Sample_MRI_PET": (("MRI", "PET"), (uptake_t1,)),
}


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a PNG under a temporary name first, so that an interrupted run leaves no half file."""
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise OSError(f"OpenCV could not encode {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.tobytes())
    os.replace(part, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Paint the bundled sample image pairs (procedural, seeded).")
    parser.add_argument("--out", type=Path, default=Path("test_img"), help="folder for the Sample_* sets")
    out = parser.parse_args(argv).out
    listing: dict[Path, list[str]] = {}
    try:
        for name, (modalities, painters) in SETS.items():
            for painter in painters:
                for modality, image in zip(modalities, painter(), strict=True):
                    path = out / name / modality / f"{painter.__name__}.png"
                    write_png(path, image)
                    size = f"{image.shape[0]} x {image.shape[1]}  {path.stat().st_size / 1024:.0f} kB"
                    listing.setdefault(path.parent, []).append(f"  {path.name}  {size}")
    except OSError as error:
        print(f"make_samples: cannot write the samples to {out}: {error}", file=sys.stderr)
        return 2
    for folder, lines in listing.items():
        print(folder, *lines, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
