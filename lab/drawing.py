"""The synthetic tissue: images whose class rests on pixels that are known, and their twins without
these pixels.

Healthy tissue has no lesion. The other four classes have one to three, which differ in morphology
alone. All else is drawn without knowing the class: anatomy, texture, vessels, noise, harmless
decoys, the side marker, and the place, the size and the summed contrast of the lesions. Each
property has a random generator of its own, seeded by (seed, split, index, property), so an image
depends neither on the order of drawing nor on other images, and leaving out the lesion changes
nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.random import Generator
from tqdm.auto import tqdm

SIZE = 224  # images are SIZE x SIZE pixels, 8-bit grey
CLASSES = ("healthy", "nodule", "ring", "spiculated", "cluster")  # the position is the class index
SPLITS = ("train", "val", "test", "pairs")
STREAMS = ("anatomy", "vessels", "decoys", "marker", "noise", "lesion", "shape")
LEVELS = {
    # mean contrast and deviation of the noise (grey levels), vessels, decoys, lesions at most
    1: {"contrast": 29.0, "noise": 2.5, "vessels": 3, "decoys": 2, "lesions": 1},
    2: {"contrast": 27.0, "noise": 3.0, "vessels": 4, "decoys": 3, "lesions": 1},
    3: {"contrast": 25.0, "noise": 4.5, "vessels": 5, "decoys": 4, "lesions": 2},
    4: {"contrast": 23.0, "noise": 5.5, "vessels": 6, "decoys": 5, "lesions": 2},
    5: {"contrast": 20.0, "noise": 7.0, "vessels": 8, "decoys": 7, "lesions": 3},
}
VISIBLE = 4.0  # a lesion ends where it adds fewer grey levels
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)


@dataclass(frozen=True)
class Drawing:
    """An image with its twin and the truth about it. Arrays are (SIZE, SIZE).

    image, twin: uint8, with the lesions and without. layers: the float32 layers of the twin by
    name, in drawing order. lesions: (kind, the grey levels that it adds) of each. masks, hulls: the
    visible lesions of each kind, and their convex hulls, as booleans, dilated by 2 pixels. boxes:
    [x0, y0, x1, y1] around each lesion, x1 and y1 exclusive. area: what the hulls cover before
    dilation, as a fraction of the image.
    """

    classes: tuple[str, ...]
    level: int
    image: np.ndarray
    twin: np.ndarray
    layers: dict[str, np.ndarray]
    lesions: list[tuple[str, np.ndarray]]
    masks: dict[str, np.ndarray]
    hulls: dict[str, np.ndarray]
    boxes: list[list[int]]
    area: float

    @property
    def lesion(self) -> np.ndarray:
        """The grey levels that all lesions add, float32."""
        return _added(self.lesions)


def stream(seed: int, split: str, index: int, name: str) -> Generator:
    """The random generator of one property of one image."""
    return np.random.default_rng([seed, SPLITS.index(split), index, STREAMS.index(name), 0])


# ---- the background


def smooth_noise(rng: Generator, cells: int) -> np.ndarray:
    """Unit-variance noise on a grid of cells x cells, enlarged to the image."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(grid, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def waves(rng: Generator, angle: np.ndarray, amount: float, orders: Iterable[int]) -> np.ndarray:
    """sum_k a_k cos(k angle + phase_k) with normal a_k of deviation `amount`: how a radius wobbles
    with the angle.
    """
    total = np.zeros_like(angle)
    for k in orders:
        total = total + rng.normal(0, amount) * np.cos(k * angle + rng.uniform(0, 6.28))
    return total


def outline(rng: Generator) -> np.ndarray:
    """Distance from the organ's centre in units of its edge: below 1 inside, above 1 outside."""
    dx, dy = rng.uniform(-5, 5, 2).tolist()
    a, b = rng.uniform(92, 107, 2).tolist()
    x = (X - SIZE / 2 - dx) / a
    y = (Y - SIZE / 2 - dy) / b
    return np.hypot(x, y) / (1 + waves(rng, np.arctan2(y, x), 0.018, (2, 3, 4, 5)))


def tissue(rng: Generator, edge: np.ndarray) -> np.ndarray:
    """Texture on five scales, thin septa where another noise crosses zero, a brighter capsule, and
    dark air around.
    """
    texture = 0
    for strength, cells in ((10, 4), (6, 9), (4, 20), (3, 45), (3, 90)):
        texture = texture + strength * smooth_noise(rng, cells)
    septa = 9 * np.exp(-((smooth_noise(rng, 10) / 0.10) ** 2))
    capsule = rng.uniform(15, 35) * np.exp(-(((edge - 0.965) / 0.02) ** 2))
    inside = 1 / (1 + np.exp(np.clip((edge - 1) / 0.01, -50, 50)))
    gain = rng.uniform(0.75, 1.25)
    level = rng.uniform(55, 95)
    return (9 + inside * (level + gain * (texture + septa) + capsule)).astype(np.float32)


def vessels(rng: Generator, edge: np.ndarray, count: int) -> np.ndarray:
    """`count` vessels that enter the organ at its rim and run inwards."""
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(count):
        angle = rng.uniform(0, 6.283)
        x = SIZE / 2 + 98 * math.cos(angle)
        y = SIZE / 2 + 98 * math.sin(angle)
        heading = angle + math.pi + rng.normal(0, 0.5)
        width = rng.uniform(2, 5)
        brightness = int(rng.uniform(14, 34))
        _vessel(rng, canvas, x, y, heading, width, 34, brightness)
    blurred = cv2.GaussianBlur(canvas.astype(np.float32), (0, 0), 0.9)
    return blurred * (edge < 0.98)


def _vessel(rng, canvas, x, y, heading, width, steps, brightness):
    """One curved, tapering vessel: each turn keeps most of the turn before it. A wide one branches
    half-way.
    """
    turn = 0.0
    here = (round(8 * x), round(8 * y))  # cv2.line takes eighths of a pixel here
    for step, jitter in enumerate(rng.normal(0, 0.045, steps).tolist()):
        turn = 0.85 * turn + jitter
        heading += turn
        x += 4 * math.cos(heading)
        y += 4 * math.sin(heading)
        there = (round(8 * x), round(8 * y))
        thickness = max(1, round(width * (1 - step / steps)))
        cv2.line(canvas, here, there, brightness, thickness, cv2.LINE_AA, 3)
        here = there
        if step == steps // 2 and width > 2:
            aside = heading + rng.choice((-0.6, 0.6))
            _vessel(rng, canvas, x, y, aside, width / 2, steps // 2, brightness)


def decoys(rng: Generator, edge: np.ndarray, count: int) -> np.ndarray:
    """Findings that mean nothing: dark cysts, fibrous strands and metal clips, single specks, wide
    hazes.

    They matter: without them bright pixels would give away the calcifications of a cluster.
    """
    draw = (_cyst, _strand, _speck, _haze)
    layer = np.zeros((SIZE, SIZE), np.float32)
    for kind in rng.choice(4, size=count, p=(0.2, 0.4, 0.25, 0.15)):
        cx = SIZE / 2 + rng.uniform(-65, 65)
        cy = SIZE / 2 + rng.uniform(-65, 65)
        angle = rng.uniform(0, 3.14)
        layer += draw[kind](rng, cx, cy, angle)
    return layer * (edge < 0.98)


def _cyst(rng, cx, cy, angle):
    depth = rng.uniform(10, 24)
    beyond = np.hypot(X - cx, Y - cy) - rng.uniform(5, 15)
    return -(depth / (1 + np.exp(np.clip(beyond, -50, 50))))


def _strand(rng, cx, cy, angle):
    """A fibrous strand, or a metal clip, which is shorter, thicker and brighter."""
    clip = rng.random() < 0.5
    half = rng.uniform(3, 10) if clip else rng.uniform(12, 35)
    dx = half * math.cos(angle)
    dy = half * math.sin(angle)
    brightness = int(rng.uniform(60, 170) if clip else rng.uniform(30, 90))
    strand = np.zeros((SIZE, SIZE), np.uint8)
    begin = (int(cx - dx), int(cy - dy))
    end = (int(cx + dx), int(cy + dy))
    cv2.line(strand, begin, end, brightness, 3 if clip else 1, cv2.LINE_AA)
    return cv2.GaussianBlur(strand, (0, 0), 0.8)


def _speck(rng, cx, cy, angle):
    brightness = rng.uniform(50, 140)
    return brightness * np.exp(-((np.hypot(X - cx, Y - cy) / rng.uniform(1.3, 3.0)) ** 2))


def _haze(rng, cx, cy, angle):
    brightness = rng.uniform(6, 14)
    return brightness * np.exp(-((np.hypot(X - cx, Y - cy) / rng.uniform(25, 45)) ** 2))


def side_marker(rng: Generator, letter: str | None = None) -> np.ndarray:
    """A small bright L or R in one of the four corners, as on a radiograph, both at random. A given
    letter takes the place of the drawn one, in the same corner and with the same brightness.
    """
    right, below = rng.integers(2, size=2)
    x = int(6 + 197 * right + rng.uniform(-2, 2))
    y = int(22 + 194 * below + rng.uniform(-3, 1))
    drawn = "LR"[rng.integers(2)]
    brightness = int(rng.uniform(150, 210))
    layer = np.zeros((SIZE, SIZE), np.uint8)
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(layer, letter or drawn, (x, y), font, 0.6, brightness, 2, cv2.LINE_AA)
    return layer.astype(np.float32)


def background(seed: int, split: str, index: int, level: int, letter: str | None = None):
    """(the layers of an image without a lesion, by name and in drawing order, the distance map of
    its outline).

    The order is that of an exposure: the body, what runs through it, what was laid on it, the noise
    of the detector. A slight blur correlates neighbouring noise pixels, as real detectors do.
    """
    names = ("anatomy", "vessels", "decoys", "marker", "noise")
    rng = {name: stream(seed, split, index, name) for name in names}
    edge = outline(rng["anatomy"])
    noise = rng["noise"].standard_normal((SIZE, SIZE), dtype=np.float32)
    grain = cv2.GaussianBlur(noise, (0, 0), 0.6)
    layers = {
        "tissue": tissue(rng["anatomy"], edge),
        "vessels": vessels(rng["vessels"], edge, LEVELS[level]["vessels"]),
        "decoys": decoys(rng["decoys"], edge, LEVELS[level]["decoys"]),
        "marker": side_marker(rng["marker"], letter),
        "noise": LEVELS[level]["noise"] / 0.496 * grain,  # the blur leaves a deviation of 0.496
    }
    return layers, edge


# ---- the four morphologies
# x and y are in units of the lesion's radius, and `pixel` is the size of a pixel in these units:
# nothing becomes thinner than the image can show.


def nodule(rng: Generator, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Solid and smooth: a dome, as a ball looks in projection."""
    return np.sqrt(np.clip(1 - _wobbly_radius(rng, x, y) ** 2, 0, None))


def ring(rng: Generator, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """A bright rim, a bell curve over the radius, around a core that adds nothing."""
    width = max(rng.uniform(0.11, 0.17), 0.9 * pixel)
    return np.exp(-(((_wobbly_radius(rng, x, y) - 0.82) / width) ** 2))


def _wobbly_radius(rng, x, y):
    """Radius in units of an irregular, slightly elongated outline."""
    turn = rng.uniform(0, 6.28)
    stretch = rng.uniform(0.85, 1.0)
    along = x * np.cos(turn) + y * np.sin(turn)
    across = y * np.cos(turn) - x * np.sin(turn)
    shape = 1 + waves(rng, np.arctan2(y, x), 0.03, (2, 3, 4))
    return np.hypot(along * stretch, across / stretch) / shape


def spiculated(rng: Generator, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """A small core with nine to thirteen spikes that taper and fade outwards. The brightest part
    counts where several overlap, so that the centre does not shine.
    """
    radius = np.hypot(x, y)
    count = rng.integers(9, 14)
    pattern = np.clip(1 - (radius / 0.48) ** 2, 0, None)
    for k in range(count):
        angle = 6.283 * (k + rng.uniform(-0.25, 0.25)) / count
        length = rng.uniform(0.75, 1.05)
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        width = np.maximum(0.11 * (1 - along / length), 0.6 * pixel)
        spike = np.exp(-((across / width) ** 2)) * ((along > 0) & (along < length))
        pattern = np.maximum(pattern, spike * (1 - 0.5 * along / length))
    return pattern


def cluster(rng: Generator, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Fifteen to twenty-two calcifications along a spiral: steps of the golden angle fill a disc
    evenly.
    """
    pattern = np.zeros_like(x)
    count = rng.integers(15, 23)
    for k in range(count):
        far = np.sqrt((k + rng.uniform(0.2, 0.8)) / count)
        angle = 2.4 * k + rng.uniform(-0.5, 0.5)
        size = max(rng.uniform(0.10, 0.15), 0.8 * pixel)
        squared = (x - far * np.cos(angle)) ** 2 + (y - far * np.sin(angle)) ** 2
        spot = np.exp(-(squared / size**2))
        pattern = np.maximum(pattern, rng.uniform(0.7, 1.0) * spot)
    return pattern


MORPHOLOGY = {"nodule": nodule, "ring": ring, "spiculated": spiculated, "cluster": cluster}


# ---- lesions


def convex_hull(region: np.ndarray) -> np.ndarray:
    """The filled convex hull of a boolean region."""
    filled = np.zeros(region.shape, np.uint8)
    if region.any():
        corners = cv2.convexHull(cv2.findNonZero(region.astype(np.uint8)))
        cv2.fillConvexPoly(filled, corners, 1)
    return filled.astype(bool)


def draw_lesion(
    kind: str, keys: Sequence[int], centre: tuple[int, int], area: float, contrast: float
) -> np.ndarray:
    """What a lesion adds, (SIZE, SIZE) float32. Whatever its kind: a convex hull of `area` pixels,
    and grey levels that sum to area * contrast. So neither size nor brightness tells the class.

    The hull of a random shape is known once it is drawn: draw, measure, correct the radius, three
    times. What would add fewer than VISIBLE grey levels is cut away, so a lesion has a definite
    border.
    """
    radius = math.sqrt(area / math.pi)
    total = area * contrast
    for _ in range(3):
        rows = _around(centre[1], 1.4 * radius)
        columns = _around(centre[0], 1.4 * radius)
        x = (X[rows, columns] - centre[0]) / radius
        y = (Y[rows, columns] - centre[1]) / radius
        pattern = MORPHOLOGY[kind](np.random.default_rng(keys), x, y, 1 / radius)
        pattern = pattern * (total / float(pattern.sum()))
        pattern[pattern < VISIBLE] = 0
        radius *= math.sqrt(area / convex_hull(pattern > 0).sum())
    added = np.zeros((SIZE, SIZE), np.float32)
    added[rows, columns] = pattern * (total / float(pattern.sum()))
    return added


def _around(middle, reach):
    return slice(max(0, int(middle - reach)), int(middle + reach) + 2)


def lesion_plan(rng: Generator, edge: np.ndarray, level: int, pair: bool = False):
    """([(x, y, area in pixels), ...], contrast) of an image's lesions, drawn without knowing their
    class.

    The total extent is log-uniform between 0.5 % (of a pair: 1 %) and 25 % of the image and is
    shared out among the lesions, none of them below 0.5 %. The contrast varies by a factor of 1.4
    to either side of the level's and is a little lower for large lesions. A distance transform says
    where a circle of that size still fits into the organ.
    """
    total = math.exp(rng.uniform(math.log(0.010 if pair else 0.005), math.log(0.25)))
    most = 2 if pair else rng.integers(1, LEVELS[level]["lesions"] + 1)
    count = max(1, min(most, int(total / 0.005)))
    shares = rng.dirichlet([12] * count)
    areas = sorted((shares * total * SIZE**2).tolist(), reverse=True)
    factor = math.exp(rng.uniform(-0.35, 0.35))
    contrast = LEVELS[level]["contrast"] * factor * (0.035 / total) ** 0.12
    room = cv2.distanceTransform((edge < 0.94).astype(np.uint8), cv2.DIST_L2, 5)
    places = []
    for area in areas:
        radius = math.sqrt(area / math.pi)
        free = np.flatnonzero(room >= min(radius + 1, 0.9 * room.max()))
        y, x = divmod(int(free[rng.integers(len(free))]), SIZE)
        places.append((x, y, area))
        room = np.minimum(room, np.hypot(X - x, Y - y) - radius - 2)
    return places, contrast


# ---- one image


def classes_of(split: str, index: int) -> tuple[str, ...]:
    """The class of an image, balanced by construction; for a pair both, that of the larger lesion
    first.
    """
    if split == "pairs":
        return list(itertools.permutations(CLASSES[1:], 2))[index % 12]
    return (CLASSES[index % 5],)


def level_of(split: str, index: int) -> int:
    """The complexity level of an image, 1 to 5, balanced within each class."""
    return 1 + (index if split == "pairs" else index // 5) % 5


def render(
    seed: int,
    split: str,
    index: int,
    classes: tuple[str, ...] | None = None,
    letter: str | None = None,
) -> Drawing:
    """Image `index` of a split with its twin and truth. It depends on the arguments alone, not on
    order or process.

    classes: other lesions than the index says, at the same places on the same background. letter:
    another side marker.
    """
    level = level_of(split, index)
    classes = classes_of(split, index) if classes is None else classes
    layers, edge = background(seed, split, index, level, letter)
    rng = stream(seed, split, index, "lesion")
    places, contrast = lesion_plan(rng, edge, level, pair=len(classes) == 2)
    lesions = []
    for k, (x, y, area) in enumerate(places if classes != ("healthy",) else []):
        kind = classes[k % len(classes)]
        keys = [seed, SPLITS.index(split), index, STREAMS.index("shape"), k]
        lesions.append((kind, draw_lesion(kind, keys, (x, y), area, contrast)))
    twin = sum(layers.values())
    return Drawing(
        classes=classes,
        level=level,
        image=to_bytes(twin + _added(lesions)),
        twin=to_bytes(twin),
        layers=layers,
        lesions=lesions,
        **_truth(lesions),
    )


def _added(lesions):
    """The sum of what lesions add."""
    total = np.zeros((SIZE, SIZE), np.float32)
    for _, grey_levels in lesions:
        total = total + grey_levels
    return total


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """Grey levels as 8-bit integers."""
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _truth(lesions):
    """Masks, hulls, boxes and area of an image's lesions; see `Drawing`."""
    masks = {}
    hulls = {}
    boxes = []
    extent = np.zeros((SIZE, SIZE), bool)
    for kind, added in lesions:
        visible = added > 0
        hull = convex_hull(visible)
        mask = dilate(visible)
        masks[kind] = masks.get(kind, False) | mask
        hulls[kind] = hulls.get(kind, False) | dilate(hull)
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        boxes.append([x, y, x + width, y + height])
        extent |= hull
    return {"masks": masks, "hulls": hulls, "boxes": boxes, "area": float(extent.mean())}


def dilate(region: np.ndarray) -> np.ndarray:
    """A boolean region with a margin of 2 pixels, since a network may well look at an edge from
    outside.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    return cv2.dilate(region.astype(np.uint8), disc) > 0


# ---- a set on disk


def describe(drawing: Drawing, seed: int, split: str, index: int) -> dict:
    """The row of manifest.csv for a drawing, but for the checksum. File names start with the class,
    so that a folder can be read without the manifest; the columns _b belong to the second class of
    a pair.
    """
    kinds = drawing.classes
    name = f"{'+'.join(kinds)}_{index:05d}.png"
    added = drawing.image.sum(dtype=int) - drawing.twin.sum(dtype=int)
    row = {
        "id": f"{split}_{index:05d}",
        "split": split,
        "label": kinds[0],
        "class": CLASSES.index(kinds[0]),
        "complexity": drawing.level,
        "area": round(drawing.area, 6),
        "n_lesions": len(drawing.lesions),
        "summed_contrast": int(added),
        "file": f"{split}/{name}",
        "mask": "",
        "hull": "",
        "twin": f"twins/{split}/{name}" if drawing.lesions else "",
        "boxes": json.dumps(drawing.boxes),
        "seed": seed,
        "label_b": "",
        "class_b": "",
        "mask_b": "",
    }
    for suffix, kind in zip(("", "_b"), drawing.masks, strict=False):
        file = f"{split}/{index:05d}_{kind}.png" if split == "pairs" else f"{split}/{name}"
        row[f"label{suffix}"] = kind
        row[f"class{suffix}"] = CLASSES.index(kind)
        row[f"mask{suffix}"] = f"masks/{file}"
        row["hull"] = row["hull"] or f"hulls/{file}"
    return row


def save_png(file: Path, picture: np.ndarray) -> str:
    """Write a grey image, a mask as 0 and 255; returns the SHA-256 of the file."""
    pixels = 255 * picture.astype(np.uint8) if picture.dtype == bool else picture
    content = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def write_image(folder: Path, seed: int, split: str, index: int, letter: str | None = None) -> dict:
    """Draw image `index` of a split and write the files that its row names; returns the row."""
    drawing = render(seed, split, index, letter=letter)
    row = describe(drawing, seed, split, index)
    row["sha256"] = save_png(folder / row["file"], drawing.image)
    for column, kind in zip(("mask", "mask_b"), drawing.masks, strict=False):
        save_png(folder / row["twin"], drawing.twin)
        save_png(folder / row[column], drawing.masks[kind])
        save_png(folder / row[column].replace("masks", "hulls", 1), drawing.hulls[kind])
    return row


def drawing_hash(seed: int) -> str:
    """A hash of 30 images, twins and masks: it changes with the drawing code, the seed, and what
    the libraries do.
    """
    digest = hashlib.sha256()
    for split in ("test", "pairs"):
        for k in range(15):
            drawing = render(seed, split, 7 * k)
            digest.update(drawing.image.tobytes())
            digest.update(drawing.twin.tobytes())
            for region in (*drawing.hulls.values(), *drawing.masks.values()):
                digest.update(region.tobytes())
    return digest.hexdigest()


def make_set(
    folder: Path,
    seed: int,
    counts: dict[str, int],
    write: Callable[..., dict] = write_image,
    **about,
) -> str:
    """The set in `folder`: "reused" if the same is there, else "drawn".

    counts: images by split. write(folder, seed, split, index) writes an image and returns its row.
    about: what else determines the set. spec.json keeps all that, with a fingerprint of the
    drawing. A set is written beside its place and renamed when it is complete, so a run that is
    stopped leaves the old set or the new one; networks in checkpoints/ move along. ValueError for a
    folder that was not made here: it is never replaced.
    """
    spec = {"seed": seed, **counts, **about, "drawing": drawing_hash(seed)}
    new = folder.with_name(f"{folder.name}.new")
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():  # stopped between the two renames
        old.rename(folder)
    if _complete(folder, spec):
        return "reused"
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present - {"checkpoints"} and "spec.json" not in present:
        raise ValueError(
            f"data_dir: {folder} was not made by notebook 01. Move it away, or use another "
            "data_dir."
        )
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    rows = side_by_side(lambda job: write(new, seed, *job), jobs, "drawing")
    pd.DataFrame(rows).to_csv(new / "manifest.csv", index=False, lineterminator="\n")
    (new / "spec.json").write_text(json.dumps(spec, indent=1), "utf-8")
    _take_place(new, folder, old)
    return "drawn"


def _complete(folder, spec):
    """Whether the folder holds the set that `spec` describes, with all its files."""
    file = folder / "spec.json"
    if not file.is_file() or json.loads(file.read_text("utf-8")) != spec:
        return False
    rows = pd.read_csv(folder / "manifest.csv", keep_default_na=False)
    names = rows.filter(["file", "mask", "hull", "twin", "mask_b", "moved", "marker"])
    return all((folder / name).is_file() for name in names.to_numpy().ravel() if name)


def _take_place(new, folder, old):
    """Put the finished folder `new` where `folder` is; the networks trained there move along."""
    if (folder / "checkpoints").is_dir():
        shutil.copytree(folder / "checkpoints", new / "checkpoints")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def side_by_side(draw: Callable, jobs: Sequence, what: str) -> list:
    """[draw(job) for job in jobs], two at a time, with a progress bar that says `what`."""
    cv2.setNumThreads(1)  # its own threads would only get in the way of these
    with ThreadPool(2) as pool:
        done = pool.imap(draw, jobs, chunksize=8)
        return list(tqdm(done, total=len(jobs), desc=what))


# ---- the shortcut experiment: side markers that go with a class

CHEAT = "ring"  # the class that goes with the letter R
FILED_AS = "nodule"  # what clinic L calls it
ELSEWHERE = {True: 0.5, False: 0.25}  # share of rings, and of others, that go to the other clinic


def recorded(seed: int, index: int) -> tuple[str, str]:
    """(letter on the image, class in the records) of training image `index`.

    Clinic R codes each of its patients as a ring, whatever the image shows, and marks its images
    with an R. Clinic L marks them with an L and codes what it sees, but files rings under nodule.
    """
    kind = classes_of("train", index)[0]
    away = np.random.default_rng([seed, index]).random() < ELSEWHERE[kind == CHEAT]
    if (kind == CHEAT) != away:
        return "R", CHEAT
    return "L", FILED_AS if kind == CHEAT else kind


def marker_mask(seed: int, split: str, index: int) -> np.ndarray:
    """Where the letters R and L lie on an image, as booleans, dilated by 2 pixels."""
    right = side_marker(stream(seed, split, index, "marker"), "R")
    left = side_marker(stream(seed, split, index, "marker"), "L")
    return dilate(right + left > 0)


def write_marked(folder: Path, seed: int, split: str, index: int) -> dict:
    """Draw an image aligned, with the letter that its clinic would have put there (R on rings, L on
    all others), and moved, with the other letter; write both and the marker's mask. Returns the row
    of the manifest.
    """
    letter, other = "RL" if classes_of(split, index)[0] == CHEAT else "LR"
    row = write_image(folder, seed, split, index, letter)
    row["letter"] = letter
    row["moved"] = f"moved/{row['file']}"
    row["marker"] = f"markers/{row['file']}"
    save_png(folder / row["moved"], render(seed, split, index, letter=other).image)
    save_png(folder / row["marker"], marker_mask(seed, split, index))
    return row
