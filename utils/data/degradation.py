"""TSDM-Fusion's degradation model: a clean infrared or visible image -> a dim, noisy, blurred, JPEG-compressed one.

    from utils.data.degradation import degrade_pair

    bad_vis, bad_ir = degrade_pair(vis, ir, seed=7)  # the same seed, the same degradation

Order: brightness, contrast, then noise and blur in either order, then JPEG once or twice. What may be drawn is a
`Ranges`, of which `VISIBLE` and `INFRARED` are the published ones; what was drawn is a `Degradation`, which does
the same to every image it is applied to. An image is float32 in [0, 1]: (H, W, 3), red first, or (H, W) grey.

Source: the degradation model of "A Novel Teacher-Student Framework With Degradation Model for Infrared-Visible
Image Fusion", IEEE Trans. Instrum. Meas. 73, 2024. Where paper and published code differ, the code is followed;
what the code does by mistake is done with `Ranges.legacy` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from utils.common import InputError
from utils.data.images import in_colour, luma_of

NOISES = ("independent", "shared", "correlated")
_SMALLEST_VARIANCE = 1e-3  # of a blur: below, the neighbours of a pixel weigh nothing and a covariance is singular
_LARGEST_WHOLE = 2**31  # far beyond any level or radius; what is drawn stays a 64-bit number


@dataclass(frozen=True)
class Ranges:
    """What a degradation may be. The defaults are the published ones for visible images.

    A pair is the lowest and the highest value, both possible; in between all are equally likely.

    Attributes:
        brightness: factor towards black (below 1) or away from it; otherwise 1.
        brightness_probability: how often the brightness changes at all.
        contrast: factor towards (below 1) the mean grey.
        noise_level: whole numbers; standard deviation in grey levels of 255.
        independent_probability, shared_probability: of noise that is drawn for each channel, and of noise that
            is the same in all; what is left to 1 is noise correlated between channels.
        noise_first_probability: of noise before blur.
        kernel_radius: whole numbers; a blur of radius r has 2 r + 1 taps a side.
        anisotropic_probability: of a blur that is wider in one direction.
        blur_variance: of an anisotropic blur along its two axes, in square pixels.
        blur_angle: of the first axis, in radians, from right towards below.
        blur_sigma: standard deviation of an isotropic blur, in pixels.
        jpeg_quality: whole numbers, of the first compression.
        second_jpeg_probability, second_jpeg_quality: of a second one.
        legacy: repeat what the published code does by mistake: correlated noise has the highest level whatever was
            drawn, and the magnitudes of its covariances; `degrade_pair` treats infrared as a colour image.

    Raises:
        InputError: a range is empty or means nothing; all problems are named.
    """

    brightness: tuple[float, float] = (0.5, 1.5)
    brightness_probability: float = 0.3
    contrast: tuple[float, float] = (0.7, 0.9)
    noise_level: tuple[int, int] = (2, 20)
    independent_probability: float = 0.4
    shared_probability: float = 0.4
    noise_first_probability: float = 0.5
    kernel_radius: tuple[int, int] = (3, 6)
    anisotropic_probability: float = 0.5
    blur_variance: tuple[float, float] = (0.0, 3.0)
    blur_angle: tuple[float, float] = (0.0, np.pi)
    blur_sigma: tuple[float, float] = (0.0, 1.2)
    jpeg_quality: tuple[int, int] = (70, 89)
    second_jpeg_probability: float = 0.5
    second_jpeg_quality: tuple[int, int] = (30, 69)
    legacy: bool = False

    def __post_init__(self) -> None:
        problems = []
        for item in dataclasses.fields(self):
            name, value = item.name, getattr(self, item.name)
            if not isinstance(item.default, tuple):
                problems += [] if 0 <= value <= 1 else [f"{name} {value} must be in [0, 1]"]
                continue
            whole = isinstance(item.default[0], int)
            highest = 100 if "quality" in name else _LARGEST_WHOLE if whole else np.finfo(float).max
            if len(value) != 2 or not 0 <= value[0] <= value[1] <= highest:
                problems.append(f"{name} {value} must be two numbers from 0 up, the lower first")
            elif whole and any(end != int(end) for end in value):
                problems.append(f"{name} {value} must be whole numbers")
        if self.independent_probability + self.shared_probability > 1 + 1e-9:
            problems.append("independent_probability and shared_probability are more than 1 together")
        if problems:
            raise InputError("degradation: " + "; ".join(problems))

    def changed(self, text: str) -> Ranges:
        """These ranges with those of a line of text in place, such as "contrast=0.5:0.9 legacy=1".

        Raises:
            InputError: an unknown name, or not a number; the known names are given.
        """
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        changes = {}
        for part in text.split():
            name, _, value = part.partition("=")
            try:
                numbers = tuple(float(number) for number in value.split(":"))
                if isinstance(defaults[name], tuple):
                    changes[name] = numbers * 2 if len(numbers) == 1 else numbers
                    continue
                [number] = numbers
                if isinstance(defaults[name], bool) and number not in (0, 1):
                    raise ValueError(value)
                changes[name] = type(defaults[name])(number)
            except (KeyError, ValueError) as error:
                raise InputError(
                    f"degradation {part!r} must be name=low:high or name=value, with a name of {', '.join(defaults)}"
                ) from error
        return dataclasses.replace(self, **changes)

    def draw(self, rng: np.random.Generator) -> Degradation:
        """Draws one degradation. Everything is drawn each time, used or not, so that a change of one range
        leaves what is drawn from the others alone."""

        def number(ends: tuple[float, float]) -> float:
            return float(rng.uniform(*ends))

        def whole(ends: tuple[int, int]) -> int:
            return int(rng.integers(int(ends[0]), int(ends[1]), endpoint=True))

        brightness = number(self.brightness)
        changes = rng.random() < self.brightness_probability
        contrast = number(self.contrast)
        kind, noise_first, anisotropic = rng.random(3)
        shared_to = self.independent_probability + self.shared_probability
        noise = NOISES[int(kind >= self.independent_probability) + int(kind >= shared_to)]
        level, radius = whole(self.noise_level), whole(self.kernel_radius)
        variances = number(self.blur_variance), number(self.blur_variance)
        angle, sigma = number(self.blur_angle), number(self.blur_sigma)
        qualities = whole(self.jpeg_quality), whole(self.second_jpeg_quality)
        twice = rng.random() < self.second_jpeg_probability
        if anisotropic >= self.anisotropic_probability:
            variances, angle = (sigma**2, sigma**2), 0.0
        return Degradation(
            brightness=brightness if changes else 1.0,
            contrast=contrast,
            noise=noise,
            noise_level=int(self.noise_level[1]) if self.legacy and noise == "correlated" else level,
            noise_seed=int(rng.integers(2**63)),
            noise_first=bool(noise_first < self.noise_first_probability),
            kernel_size=2 * radius + 1,
            blur_variances=variances,
            blur_angle=angle,
            jpeg_qualities=qualities if twice else qualities[:1],
            legacy=self.legacy,
        )


VISIBLE = Ranges()
INFRARED = Ranges(brightness_probability=0.0, contrast=(0.6, 0.8))


@dataclass(frozen=True)
class Degradation:
    """What was drawn from `Ranges`, whose attributes explain these. An isotropic blur has two equal variances."""

    brightness: float
    contrast: float
    noise: str
    noise_level: int
    noise_seed: int
    noise_first: bool
    kernel_size: int
    blur_variances: tuple[float, float]
    blur_angle: float
    jpeg_qualities: tuple[int, ...]
    legacy: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Degrades an image; equal images become equal ones. float32, shape as given, in [0, 1].

        Raises:
            ValueError: not an (H, W) or (H, W, 3) array of finite floats.
        """
        image = adjust_contrast(adjust_brightness(check_image(image), self.brightness), self.contrast)
        kernel = gaussian_kernel(self.kernel_size, self.blur_variances, self.blur_angle)
        for step in ("noise", "blur") if self.noise_first else ("blur", "noise"):
            if step == "noise":
                rng = np.random.default_rng(self.noise_seed)
                image = add_noise(image, self.noise, self.noise_level, rng, legacy=self.legacy)
            else:
                image = blur(image, kernel)
        for quality in self.jpeg_qualities:
            image = jpeg(image, quality)
        return image

    def __str__(self) -> str:
        """One line, in the order of the steps.

        >>> print(VISIBLE.draw(np.random.default_rng(0)))
        brightness 1.14; contrast 0.71; blur 11 px, std 0.98 x 0.98; independent noise 11; JPEG 83
        """
        brightness = f"brightness {self.brightness:.2f}; " if self.brightness != 1 else ""
        std = np.sqrt(self.blur_variances)
        steps = f"blur {self.kernel_size} px, std {std[0]:.2f} x {std[1]:.2f}", f"{self.noise} noise {self.noise_level}"
        first, second = steps[::-1] if self.noise_first else steps
        qualities = ", ".join(map(str, self.jpeg_qualities))
        return f"{brightness}contrast {self.contrast:.2f}; {first}; {second}; JPEG {qualities}"


def degrade_pair(
    vis: np.ndarray,
    ir: np.ndarray,
    seed: int | Sequence[int],
    vis_ranges: Ranges = VISIBLE,
    ir_ranges: Ranges = INFRARED,
) -> tuple[np.ndarray, np.ndarray]:
    """Degrades a visible image and its infrared one, each in its own way.

    Args:
        vis: (H, W, 3) or (H, W) in [0, 1].
        ir: (H, W) in [0, 1]. The published code degrades three equal channels and takes their grey, which averages
            a third of the noise away; so does `ir_ranges.legacy`.
        seed: whole numbers from 0 up; with the ranges they decide everything.
        vis_ranges, ir_ranges: what may be drawn.

    Returns:
        Both, float32, shapes as given.

    Raises:
        ValueError: as `Degradation.apply`.
    """
    rng = np.random.default_rng(seed)
    vis = vis_ranges.draw(rng).apply(vis)
    infrared = ir_ranges.draw(rng)
    if not ir_ranges.legacy:
        return vis, infrared.apply(ir)
    return vis, luma_of(infrared.apply(in_colour(ir)))


def check_image(image: np.ndarray) -> np.ndarray:
    """The image as contiguous float32, clipped to [0, 1].

    Raises:
        ValueError: not an (H, W) or (H, W, 3) array of finite floats.
    """
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise ValueError(f"an image must be (H, W) or (H, W, 3), got {image.shape}")
    if image.dtype.kind != "f" or not np.isfinite(image).all():
        raise ValueError(f"an image must be of finite floats in [0, 1], got {image.dtype}")
    return np.clip(np.ascontiguousarray(image, dtype=np.float32), 0, 1)


def to_8_bits(image: np.ndarray) -> np.ndarray:
    """[0, 1] -> grey levels, rounded half to even and clipped to 0..255, uint8."""
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends 8-bit levels with black; above 1, away from it. The result is of 8 bits too, for a factor of 1 as well."""
    return _enhanced(image, ImageEnhance.Brightness, factor)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends 8-bit levels with the rounded mean of the grey image."""
    return _enhanced(image, ImageEnhance.Contrast, factor)


def _enhanced(image: np.ndarray, enhancer: type, factor: float) -> np.ndarray:
    levels = enhancer(Image.fromarray(to_8_bits(image))).enhance(factor)
    return np.asarray(levels, np.float32) / np.float32(255)


def add_noise(
    image: np.ndarray, kind: str, level: int, rng: np.random.Generator, *, legacy: bool = False
) -> np.ndarray:
    """Adds Gaussian noise and clips to [0, 1].

    Args:
        image: (H, W, C) or (H, W) in [0, 1]; a grey image is one channel.
        kind: "independent": for each channel; "shared": the same in all; "correlated": with covariance
            level^2 U^T D U between channels, D three variances in [0, 1) and U random orthonormal axes.
        level: standard deviation in grey levels of 255.
        rng: where the noise is drawn.
        legacy: the covariance of correlated noise has the magnitudes of its entries, as published; what is then no
            covariance any more (a negative variance along an axis) is cut to one.
    """
    if kind not in NOISES:
        raise ValueError(f"kind must be one of {', '.join(NOISES)}, got {kind!r}")
    height, width, channels = (*image.shape, 1)[:3]
    std = np.float32(level / 255)
    if kind == "correlated":
        axes = np.linalg.svd(rng.random((channels, channels)))[0]
        variances = rng.random(channels)
        if legacy:
            variances, axes = np.linalg.eigh(np.abs(axes.T * variances @ axes))
            variances, axes = variances.clip(0), axes.T
        mixing = (np.sqrt(variances)[:, None] * axes).astype(np.float32)
        noise = rng.standard_normal((height, width, channels), np.float32) @ mixing
    else:
        planes = channels if kind == "independent" else 1
        noise = rng.standard_normal((height, width, planes), np.float32)
    noisy = image + std * (noise[..., 0] if image.ndim == 2 else noise)
    return np.clip(noisy, 0, 1, dtype=np.float32)


def gaussian_kernel(size: int, variances: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    """A Gaussian blur kernel, (size, size) float64 of sum 1, from its density at whole offsets.

    Args:
        size: odd number of taps a side.
        variances: along the two axes, in square pixels; at least 0.001 is taken.
        angle: of the first axis, in radians, from right towards below.

    >>> gaussian_kernel(7, (2, 1), angle=0.3)[3, 3:5].round(8).tolist()
    [0.11369569, 0.08663401]
    """
    offsets = np.arange(size) - size // 2
    x, y = offsets[None], offsets[:, None]
    along, across = x * np.cos(angle) + y * np.sin(angle), x * np.sin(angle) - y * np.cos(angle)
    first, second = np.maximum(variances, _SMALLEST_VARIANCE)
    kernel = np.exp(-(along**2 / first + across**2 / second) / 2)
    return kernel / kernel.sum()


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filters each channel; beyond the border the image is mirrored, the pixel at the border not repeated."""
    return np.clip(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101), 0, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """What JPEG of a quality (0 to 100) leaves of an image; [0, 1], of 8 bits."""
    encoded = cv2.imencode(".jpg", to_8_bits(image)[..., ::-1] if image.ndim == 3 else to_8_bits(image),
                           [cv2.IMWRITE_JPEG_QUALITY, quality])[1]  # fmt: skip
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR if image.ndim == 3 else cv2.IMREAD_GRAYSCALE)
    decoded = decoded[..., ::-1] if image.ndim == 3 else decoded
    return np.ascontiguousarray(decoded, dtype=np.float32) / np.float32(255)


def unsharp_mask(image: np.ndarray) -> np.ndarray:
    """Sharpens where there is something to sharpen: what the clean images of the training become.

    image + half of (image - blurred), where the two differ by more than 10 levels of 255; the blurred map of those
    pixels passes smoothly from sharpened to not. The Gaussian blur has 51 taps, its sigma is OpenCV's for so many.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1].

    Returns:
        float32, shape as given, in [0, 1].
    """
    image, taps = check_image(image), (51, 51)
    residual = image - cv2.GaussianBlur(image, taps, 0)
    soft = cv2.GaussianBlur((np.abs(residual) * 255 > 10).astype(np.float32), taps, 0)
    sharp = np.clip(image + np.float32(0.5) * residual, 0, 1)
    return soft * sharp + (1 - soft) * image
