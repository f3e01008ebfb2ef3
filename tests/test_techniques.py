"""What notebook 02 uses beside Grad-CAM: classes by name, methods at the pixels, moved pictures."""

import collections
import sys

import matplotlib.pyplot as plt
import nbformat
import nets
import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from PIL import Image
from torch import nn

import cam_core as cc

NAMES = ["cat", "dog", "7", "owl"]


@pytest.mark.parametrize(
    ("text", "found"),
    [("", []), ("dog, Cat", [1, 0]), ("3", [3]), ("7", [2]), ("owl,owl", [3, 3])],
)
def test_classes_are_asked_for_by_name_or_number(text, found):
    assert cc.asked_classes(text, NAMES) == found


@pytest.mark.parametrize("word", ["4", "doog", "-1", "²"])
def test_an_unknown_class_is_refused_with_what_there_is(word):
    allowed = rf"targets: '{word}' is neither .* number from 0 to 3.*dog"
    with pytest.raises(ValueError, match=allowed):
        cc.asked_classes(f"cat,{word}", NAMES)


def test_negative_grad_cam_is_what_the_relu_cuts():
    draw = torch.Generator().manual_seed(0)
    A = torch.rand(2, 5, 4, 3, generator=draw)
    G = torch.randn(2, 5, 4, 3, generator=draw)
    weighted = torch.einsum("bk,bkhw->bhw", G.mean((2, 3)), A)
    assert torch.allclose(cc.grad_cam(A, G) - cc.grad_cam(A, -G), weighted, atol=1e-6)
    assert (weighted > 0).any() and (weighted < 0).any()


def test_fgsm_moves_every_pixel_by_epsilon_within_the_range():
    model = nets.tiny()
    before = nets.state(model)
    colours = ("gray", "black", "white")
    x = cc.networks.preprocess([Image.new("RGB", (12, 12), colour) for colour in colours], 12)
    epsilon = 4 / 255
    moved = cc.fgsm(model, x, [0, 1, 2], epsilon)
    mean = torch.tensor(cc.networks.MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(cc.networks.STD).view(1, 3, 1, 1)
    pixels = moved * deviation + mean
    change = pixels - (x * deviation + mean)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert change.abs().max() <= epsilon + 1e-6
    sign = cc.input_gradient(model, x, [0, 1, 2]).sign()
    assert torch.allclose(change[0], -epsilon * sign[0], atol=1e-6)  # gray is far from both ends
    with torch.no_grad():
        assert model(moved)[0, 0] < model(x)[0, 0]
    assert nets.state(model) == before


def test_integrated_gradients_are_captums_and_add_up_to_the_change_of_the_logit():
    model = nets.tiny()
    before = nets.state(model)
    x = nets.images(2, (12, 12))
    expected = IntegratedGradients(model).attribute(x, target=[1, 3], n_steps=100)
    found = cc.integrated_gradients(model, x, [1, 3], steps=100)
    assert torch.allclose(found, expected.float(), atol=1e-5)
    with torch.no_grad():
        change = (model(x) - model(0 * x)).gather(1, torch.tensor([[1], [3]]))[:, 0]
    assert torch.allclose(found.sum((1, 2, 3)), change, rtol=0.02, atol=2e-3)
    assert nets.state(model) == before


def test_pixel_maps():
    model = nets.tiny()
    before = nets.state(model)
    x = nets.images(2, (12, 12))
    maps = cc.pixel_maps(model, x, [1, 3], "6")
    assert list(maps) == [
        "Grad-CAM",
        "vanilla gradient",
        "guided backpropagation",
        "guided Grad-CAM",
        "Integrated Gradients",
    ]
    for found in maps.values():
        assert found.shape == (2, 12, 12) and found.min() >= 0
        assert found.amax((1, 2)).tolist() == [1, 1]
    guided = cc.input_gradient(model, x, [1, 3], guided=True).abs().amax(1)
    assert torch.allclose(maps["guided Grad-CAM"], cc.normalise(guided * maps["Grad-CAM"]))
    assert nets.state(model) == before


def test_pixel_maps_of_a_network_for_which_guided_backpropagation_has_no_rule():
    model = nets.tiny()
    model[2] = nn.GELU()
    maps = cc.pixel_maps(model, nets.images(2), None, "6")
    assert list(maps) == ["Grad-CAM", "vanilla gradient", "Integrated Gradients"]


# ---- the notebook as a whole

NETWORK = """
from torch import nn

class Net(nn.Module):
    image_size = 32

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential()
        for i, o in ((3, 6), (6, 8), (8, 8)):
            self.body.extend([nn.Conv2d(i, o, 3, 2, 1), nn.ReLU()])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""


def test_memory_of_notebook_02_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch, repo):
    """60 photographs with masks: no call gets more of them than a figure shows."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "photos" / "masks").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    for k, pixels in enumerate(noise):
        picture = Image.fromarray(pixels).resize((32, 32))
        picture.save(tmp_path / "photos" / f"p{k}.png")
        Image.new("L", (32, 32), 255).save(tmp_path / "photos" / "masks" / f"p{k}.png")
    most = collections.Counter()

    def watch(room, name):
        real = getattr(room, name)

        def watched(given, *args, **kwargs):
            most[name] = max(most[name], len(given))
            return real(given, *args, **kwargs)

        monkeypatch.setattr(room, name, watched)

    watch(cc.datasets, "load_batch")
    watch(cc.datasets, "load_masks")
    watch(cc, "energy_in_mask")
    watch(cc.figures, "grid")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(repo)
    monkeypatch.setattr(cc.figures, "save", lambda figure, path: plt.close(figure))
    saved = []
    monkeypatch.setattr(cc.figures, "save_pictures", lambda folder, stem, *rest: saved.append(stem))

    book = nbformat.read(repo / "notebooks" / "02_gradcam.ipynb", 4)
    given = {"dataset": str(tmp_path / "photos"), "n_images": 0, "device": "cpu"}
    given["settings"] = {
        "arch": f"{tmp_path / 'net.py'}:Net",
        "batch_size": 2,
        "threads": 1,
        "results_dir": str(tmp_path / "out"),
    }
    names = {"__name__": "__main__"}
    with plt.rc_context():
        for cell in book.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, "notebook 02", "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= given
    assert len(names["images"]) == len(saved) == 60
    assert most["load_batch"] <= 4 and most["energy_in_mask"] <= 2 and most["grid"] <= 24
    for name, value in names.items():
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
            assert len(value) < 60 or value.ndim == 1, f"{name} keeps {value.shape}"
        if isinstance(value, list) and len(value) >= 60:
            kept = torch.Tensor | np.ndarray | Image.Image
            assert not any(isinstance(part, kept) for part in value), f"{name} keeps a list"
