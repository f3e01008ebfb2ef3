"""A study in little, for tests: a small network, and a few pictures with masks, twins and boxes."""

import json

import numpy as np
import pandas as pd
from PIL import Image

import cam_core as cc

SIZE = 24
METHODS = (*cc.CURVES, "grad_cam_coarse", "times_other", "noise", "centre")
LAYERS = {"deep": "6", "coarse": "6", "shallow": "2", "finer": "2"}  # of nets.tiny


def study_of(model, **change):
    """A study of `nets.tiny` that takes a second to measure; change: its other fields."""
    fields = {
        "arch": "tiny",
        "weights": "none",
        "how": cc.networks.as_preprocessing(SIZE),
        "layers": LAYERS,
        "alpha": 0.4,
        "rule": "product",
        "methods": METHODS,
        "baselines": ("twin",),
        "thresholds": dict.fromkeys(METHODS, 0.5),
        "steps": 4,
    }
    return cc.Study(model=model, **(fields | change))


def toy_images(folder, count):
    """A table of `count` pictures of noise with a bright square, and the files that it names."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(count):
        twin = rng.integers(0, 120, (SIZE, SIZE, 3), dtype=np.uint8)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        top, left = rng.integers(2, 12, 2).tolist()
        mask[top : top + 8, left : left + 9] = 255
        bright = rng.integers(180, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        picture = np.where(mask[..., None] > 0, bright, twin)
        row = {"id": f"i{k}", "split": "test", "label": "", "class": -1, "truth": "mask"}
        row["boxes"] = json.dumps([[left, top, left + 9, top + 8]])
        row["target"] = k % 4
        for column, pixels in (("file", picture), ("twin", twin), ("mask", mask)):
            row[column] = str(folder / f"{column}_{k}.png")
            Image.fromarray(pixels).save(row[column])
        rows.append(row)
    return pd.DataFrame(rows)


def seen_by(model, rows):
    """The rows with what `measurable` finds out: p_image and p_twin, of their targets."""
    target = np.array(rows["target"])
    found = {}
    for name, column in (("p_image", "file"), ("p_twin", "twin")):
        p = cc.probabilities(model, cc.datasets.load_batch(rows, column, SIZE)).cpu().numpy()
        found[name] = p[np.arange(len(rows)), target]
    return rows.assign(**found)
