"""PROTOCOL.md transcribed: plain, slow, image by image and pixel by pixel. Imports only numpy; knows no torch.

A model is a callable that takes one image (C, H, W) and returns its K logits, both as arrays.
"""

import numpy as np


def softmax(logits):
    e = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return e / e.sum()


def order(attribution, tie_break):
    """Pixel indices, largest attribution first; of two that are equal, the one that comes first in tie_break."""
    flat = np.asarray(attribution).ravel()
    place = {pixel: k for k, pixel in enumerate(tie_break)}
    return sorted(range(flat.size), key=lambda pixel: (-flat[pixel], place[pixel]))


def group_ends(pixels, steps):
    """How many pixels are replaced after each of the steps: groups equal to within one pixel, none dropped."""
    return [s * pixels // steps for s in range(steps + 1)]


def curve(model, start, end, pixel_order, target, steps):
    """Probability of the target while start becomes end, one group of pixels (all channels) after the other."""
    height, width = start.shape[1:]
    image = start.copy()
    values, done = [softmax(model(image))[target]], 0
    for stop in group_ends(height * width, steps)[1:]:
        for pixel in pixel_order[done:stop]:
            row, column = pixel // width, pixel % width
            image[:, row, column] = end[:, row, column]
        done = stop
        values.append(softmax(model(image))[target])
    return np.array(values)


def auc(values):
    """Trapezoid: the mean of neighbouring values, step by step, over the number of steps."""
    return sum((values[k] + values[k + 1]) / 2 for k in range(len(values) - 1)) / (len(values) - 1)


def rise_kernel(size=11, sigma=5.0):
    """A unit impulse, Gaussian-filtered along both axes with a reflecting border (d c b a | a b c d | d c b a).

    SciPy cuts the Gaussian at 4 sigma, so it is wider than the kernel and is reflected several times.
    """
    radius = int(4 * sigma + 0.5)
    weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weight /= weight.sum()
    line = np.zeros(size)
    for k in range(size):
        for offset in range(-radius, radius + 1):
            seen = (k + offset) % (2 * size)
            seen = seen if seen < size else 2 * size - 1 - seen
            line[k] += weight[offset + radius] * (seen == size // 2)
    return np.outer(line, line)


def blur(image, kernel):
    """Each channel convolved with the kernel, zeros beyond the border."""
    half = len(kernel) // 2
    padded = np.pad(image, ((0, 0), (half, half), (half, half)))
    out = np.zeros_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            out[:, row, column] = (padded[:, row : row + len(kernel), column : column + len(kernel)] * kernel).sum(
                (1, 2)
            )
    return out


def pointing(attribution, mask, tolerance=0):
    """1 if some pixel of the mask lies at most `tolerance` from the map's (first) maximum."""
    if attribution.max() <= 0:
        return 0.0
    row, column = np.unravel_index(np.argmax(attribution), attribution.shape)
    return float(
        any((row - r) ** 2 + (column - c) ** 2 <= tolerance**2 for r, c in zip(*np.nonzero(mask), strict=True))
    )


def energy(attribution, mask):
    total = attribution.sum(dtype=np.float64)
    return float(attribution[mask].sum(dtype=np.float64) / total) if total > 0 else 0.0


def average_precision(attribution, mask):
    """sum over thresholds of (recall gained) x (precision there); equal values fall below a threshold together."""
    score, truth = attribution.ravel(), mask.ravel()
    total = recall = 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        chosen = score >= threshold
        hits = (chosen & truth).sum()
        total += (hits / truth.sum() - recall) * hits / chosen.sum()
        recall = hits / truth.sum()
    return total


def tied(attribution):
    """The share of pixels that some other pixel equals."""
    flat = attribution.ravel().tolist()
    return sum(flat.count(v) > 1 for v in flat) / len(flat)
