"""The published formulas of the twelve fusion metrics, literal and slow.

This is the second implementation that `utils/metrics.py` is tested against, and the baseline of
`benchmarks/metrics.py`. It shares no code with `utils/metrics.py`: full two-dimensional windows through
`scipy.signal.convolve2d`, mutual information from scikit-learn, SSIM from scikit-image, every pair of
images on its own. It checks nothing and hides no warning; give it sensible images.

Every function works in the dtype of its inputs, like the published evaluator, which reads float32. Pass
float64 to compare definitions, float32 to compare with what was published.
"""

import numpy as np
from scipy.signal import convolve2d
from skimage.metrics import structural_similarity
from sklearn.metrics import mutual_info_score

SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
SOBEL_Y = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])


def en(f: np.ndarray) -> float:
    levels = np.uint8(np.round(f)).ravel()
    p = np.bincount(levels) / levels.size
    return -np.sum(p * np.log2(p + (p == 0)))


def sd(f: np.ndarray) -> float:
    return np.std(f)


def sf(f: np.ndarray) -> float:
    horizontal = np.mean((f[:, 1:] - f[:, :-1]) ** 2)
    vertical = np.mean((f[1:, :] - f[:-1, :]) ** 2)
    return np.sqrt(horizontal + vertical)


def ag(f: np.ndarray) -> float:
    gy, gx = np.gradient(f)
    return np.mean(np.sqrt((gx**2 + gy**2) / 2))


def mi(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return mutual_info_score(f.ravel(), a.ravel()) + mutual_info_score(f.ravel(), b.ravel())


def mse(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return (np.mean((a - f) ** 2) + np.mean((b - f) ** 2)) / 2


def psnr(f: np.ndarray, a: np.ndarray, b: np.ndarray, peak: float | None = None) -> float:
    return 10 * np.log10((np.max(f) if peak is None else peak) ** 2 / mse(f, a, b))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - np.mean(x), y - np.mean(y)
    return np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))


def cc(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return (pearson(a, f) + pearson(b, f)) / 2


def scd(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return pearson(a, f - b) + pearson(b, f - a)


def gaussian_window(side: int, sigma: float) -> np.ndarray:
    offsets = np.arange(side) - (side - 1) / 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    window = np.exp(-(x * x + y * y) / (2 * sigma * sigma))
    return window / window.sum()


def vif_one_source(ref: np.ndarray, dist: np.ndarray) -> float:
    eps, noise_variance = 1e-10, 2.0
    num = den = 0.0
    for scale in range(1, 5):
        side = 2 ** (5 - scale) + 1
        window = gaussian_window(side, side / 5)
        if scale > 1:
            ref = convolve2d(ref, window, mode="valid")[::2, ::2]
            dist = convolve2d(dist, window, mode="valid")[::2, ::2]
        m1 = convolve2d(ref, window, mode="valid")
        m2 = convolve2d(dist, window, mode="valid")
        s1 = convolve2d(ref * ref, window, mode="valid") - m1 * m1
        s2 = convolve2d(dist * dist, window, mode="valid") - m2 * m2
        s12 = convolve2d(ref * dist, window, mode="valid") - m1 * m2
        s1[s1 < 0] = 0
        s2[s2 < 0] = 0
        g = s12 / (s1 + eps)
        sv = s2 - g * s12
        g[s1 < eps] = 0
        sv[s1 < eps] = s2[s1 < eps]
        s1[s1 < eps] = 0
        g[s2 < eps] = 0
        sv[s2 < eps] = 0
        sv[g < 0] = s2[g < 0]
        g[g < 0] = 0
        sv[sv <= eps] = eps
        num += np.sum(np.log10(1 + g * g * s1 / (sv + noise_variance)))
        den += np.sum(np.log10(1 + s1 / noise_variance))
    return 1.0 if den == 0 else num / den


def vif(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    return vif_one_source(a, f) + vif_one_source(b, f)


def edge_strength_and_angle(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gx = convolve2d(image, SOBEL_X.astype(image.dtype), mode="same")
    gy = convolve2d(image, SOBEL_Y.astype(image.dtype), mode="same")
    angle = np.full_like(image, np.pi / 2)
    defined = gx != 0
    angle[defined] = np.arctan(gy[defined] / gx[defined])
    return np.sqrt(gx * gx + gy * gy), angle


def edge_preservation(g_f, a_f, g_s, a_s, equal_case: str) -> np.ndarray:
    strength = g_f.copy() if equal_case == "published" else np.ones_like(g_f)
    strength[g_f > g_s] = g_s[g_f > g_s] / g_f[g_f > g_s]
    strength[g_f < g_s] = g_f[g_f < g_s] / g_s[g_f < g_s]
    alignment = 1 - np.abs(a_s - a_f) / (np.pi / 2)
    return 0.9994 / (1 + np.exp(-15 * (strength - 0.5))) * (0.9879 / (1 + np.exp(-22 * (alignment - 0.8))))


def qabf(f: np.ndarray, a: np.ndarray, b: np.ndarray, equal_case: str = "published") -> float:
    g_f, a_f = edge_strength_and_angle(f)
    g_a, a_a = edge_strength_and_angle(a)
    g_b, a_b = edge_strength_and_angle(b)
    q_a = edge_preservation(g_f, a_f, g_a, a_a, equal_case)
    q_b = edge_preservation(g_f, a_f, g_b, a_b, equal_case)
    return np.sum(q_a * g_a + q_b * g_b) / np.sum(g_a + g_b)


def ssim(f: np.ndarray, a: np.ndarray, b: np.ndarray, data_range: float = 2) -> float:
    return sum(structural_similarity(f, source, data_range=data_range) for source in (a, b))


def eight(f: np.ndarray, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The eight columns of the published table."""
    values = {"EN": en(f), "SD": sd(f), "SF": sf(f), "MI": mi(f, a, b), "SCD": scd(f, a, b)}
    values |= {"VIF": vif(f, a, b), "Qabf": qabf(f, a, b), "SSIM": ssim(f, a, b)}
    return {key: float(value) for key, value in values.items()}


def score(f: np.ndarray, a: np.ndarray, b: np.ndarray, protocol: str = "paper") -> dict[str, float]:
    """All twelve metrics under `paper` or `standard`."""
    values = eight(f, a, b) | {"AG": ag(f), "CC": cc(f, a, b), "MSE": mse(f, a, b), "PSNR": psnr(f, a, b)}
    if protocol == "standard":
        values |= {"Qabf": qabf(f, a, b, "textbook"), "SSIM": ssim(f, a, b, 255), "PSNR": psnr(f, a, b, 255)}
    return {key: float(value) for key, value in values.items()}
