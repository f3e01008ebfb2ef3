"""The measures written down as their papers say: plain, slow, pixel by pixel. Imports only numpy.

A model is a callable that takes one image (C, H, W) and returns its K logits, both as arrays.
"""

import numpy as np


def softmax(logits):
    e = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return e / e.sum()


def order(attribution, tie_break):
    """Pixel indices, largest attribution first; of two that are equal, the one that comes first in
    tie_break.
    """
    flat = np.asarray(attribution).ravel()
    place = {pixel: k for k, pixel in enumerate(tie_break)}
    return sorted(range(flat.size), key=lambda pixel: (-flat[pixel], place[pixel]))


def places(attribution, tie_break):
    """The place of every pixel in `order`, in the shape of the map: 0 is replaced first."""
    found = np.empty(np.size(attribution), dtype=int)
    for place, pixel in enumerate(order(attribution, tie_break)):
        found[pixel] = place
    return found.reshape(np.shape(attribution))


def block_places(attribution, tie_break, block):
    """The place of every pixel's block, by the mean of the pixels that the block really has."""
    height, width = attribution.shape
    rows, columns = range(0, height, block), range(0, width, block)
    blocks = [
        [attribution[r : r + block, c : c + block].mean(dtype=np.float64) for c in columns]
        for r in rows
    ]
    of_blocks = places(np.array(blocks, dtype=np.float32), tie_break)
    found = np.empty((height, width), dtype=int)
    for row in range(height):
        for column in range(width):
            found[row, column] = of_blocks[row // block, column // block]
    return found


def group_ends(count, steps):
    """How many places are replaced after each of the steps: groups equal to within one place, none
    dropped.
    """
    return [s * count // steps for s in range(steps + 1)]


def curve(model, start, end, place, target, steps):
    """Probability of the target while start becomes end, all channels together; place: (H, W), see
    `places`.

    Every point is a picture of its own, made anew from start and end.
    """
    height, width = place.shape
    values = []
    for stop in group_ends(int(place.max()) + 1, steps):
        image = start.copy()
        for row in range(height):
            for column in range(width):
                if place[row, column] < stop:
                    image[:, row, column] = end[:, row, column]
        values.append(softmax(model(image))[target])
    return np.array(values)


def auc(values):
    """Trapezoid: the mean of neighbouring values, step by step, over the number of steps."""
    return sum((values[k] + values[k + 1]) / 2 for k in range(len(values) - 1)) / (len(values) - 1)


def rise_kernel(size=11, sigma=5.0):
    """A unit impulse, Gaussian-filtered along both axes with a reflecting border (d c b a | a b c d
    | d c b a).

    SciPy cuts the Gaussian at 4 sigma, so it is wider than the kernel and is reflected several
    times.
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
            out[:, row, column] = (
                padded[:, row : row + len(kernel), column : column + len(kernel)] * kernel
            ).sum((1, 2))
    return out


def pointing(attribution, mask, tolerance=0):
    """Of the pixels that share the map's maximum, the part at most `tolerance` from some pixel of
    the mask.
    """
    if attribution.max() <= 0:
        return 0.0
    inside = list(zip(*np.nonzero(mask), strict=True))
    hits = [
        any((row - r) ** 2 + (column - c) ** 2 <= tolerance**2 for r, c in inside)
        for row, column in zip(*np.nonzero(attribution == attribution.max()), strict=True)
    ]
    return sum(hits) / len(hits)


def energy(attribution, mask):
    total = attribution.sum(dtype=np.float64)
    return float(attribution[mask].sum(dtype=np.float64) / total) if total > 0 else 0.0


def average_precision(attribution, mask):
    """sum over thresholds of (recall gained) x (precision there); equal values fall below a
    threshold together.
    """
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


def confidence(model, image, attribution, target):
    """(drop, increase, gain) of the image multiplied by its map."""
    before = softmax(model(image))[target]
    after = softmax(model((image * attribution).astype(image.dtype)))[target]
    if abs(after - before) <= 1e-6:
        return 0.0, 0.0, 0.0
    if after < before:
        return (before - after) / before, 0.0, 0.0
    return 0.0, 1.0, (after - before) / (1 - before)


def weights(large, small):
    """Bilinear, as a matrix (large, small): centres at i + 1/2, the outermost values go on."""
    w = np.zeros((large, small))
    for k in range(large):
        place = min(max((k + 0.5) * small / large - 0.5, 0), small - 1)
        for cell in range(small):
            w[k, cell] = max(0, 1 - abs(place - cell))
    return w


def rise(model, image, target, masks, keep):
    """RISE, section 3.1: masks weighted by what the model says of the masked images; over the
    maximum at the end.
    """
    total = sum(softmax(model((image * m).astype(image.dtype)))[target] * m for m in masks) / (
        len(masks) * keep
    )
    return total / total.max()


def iou(attribution, mask, threshold):
    """Pixels in both over pixels in either."""
    top = attribution.max()
    both = either = 0
    for value, inside in zip(attribution.ravel(), mask.ravel(), strict=True):
        chosen = top > 0 and value / top >= attribution.dtype.type(threshold)
        both, either = both + (chosen and inside), either + (chosen or inside)
    return both / either


def regions(chosen):
    """Sets of pixels that hang together over edges and corners, in reading order of their first
    pixels.
    """
    left, found = list(zip(*map(list, np.nonzero(chosen)), strict=True)), []
    todo = set(left)
    for start in left:
        if start not in todo:
            continue
        todo.discard(start)
        region, edge = [start], [start]
        while edge:
            row, column = edge.pop()
            near = [(row + r, column + c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
            edge += [p for p in near if p in todo]
            region += [p for p in near if p in todo]
            todo -= set(near)
        found.append(region)
    return found


def box_iou(attribution, boxes, threshold):
    """Pixel by pixel: the box around the largest region against each of the boxes, the best of
    them.
    """
    top = attribution.max()
    if top <= 0:
        return 0.0
    region = max(
        regions(attribution / top >= attribution.dtype.type(threshold)), key=len
    )  # the first of the largest
    rows, columns = [r for r, _ in region], [c for _, c in region]
    drawn = np.zeros(attribution.shape, bool)
    drawn[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
    best = 0.0
    for x0, y0, x1, y1 in boxes:
        true = np.zeros(attribution.shape, bool)
        true[y0:y1, x0:x1] = True
        best = max(best, (drawn & true).sum() / (drawn | true).sum())
    return best


def spearman(a, b):
    """Pearson's correlation of the ranks; equal values share a mean rank; 0 for a constant map."""

    def ranks(values):
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    p, q = ranks(a.ravel()), ranks(b.ravel())
    p, q = p - p.mean(), q - q.mean()
    spread = np.sqrt((p**2).sum() * (q**2).sum())
    return float((p * q).sum() / spread) if spread > 0 else 0.0


def ssim(a, b, size=7):
    """Wang et al. 2004 with a range of 1: the mean over all windows that lie in the image, sample
    (co)variances.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2, values = 0.01**2, 0.03**2, []
    for row in range(a.shape[0] - size + 1):
        for column in range(a.shape[1] - size + 1):
            p, q = (m[row : row + size, column : column + size].ravel() for m in (a, b))
            (vp, cov), (_, vq) = np.cov(p, q)
            luminance = (2 * p.mean() * q.mean() + c1) / (p.mean() ** 2 + q.mean() ** 2 + c1)
            values.append(luminance * (2 * cov + c2) / (vp + vq + c2))
    return float(np.mean(values))
