"""What notebooks 02 and 03 define for themselves: classes by name, pictures that were moved, CAM, scaling, ..."""

import collections
import sys

import matplotlib.pyplot as plt
import nbformat
import nets
import numpy as np
import pandas as pd
import pytest
import torch
from captum.attr import GradientShap, IntegratedGradients
from nbcode import definitions
from scipy.stats import rankdata, spearmanr

import cam_core as cc

NAMES = ["cat", "dog", "7", "owl"]


@pytest.fixture(scope="module")
def book():
    given = {"np": np, "torch": torch, "rankdata": rankdata}
    return definitions("02_gradcam", GradientShap=GradientShap, IntegratedGradients=IntegratedGradients, **given)


@pytest.mark.parametrize(
    ("text", "found"), [("", []), ("dog, Cat", [1, 0]), ("3", [3]), ("7", [2]), ("owl,owl", [3, 3]), ("0,dog", [0, 1])]
)
def test_classes_are_asked_for_by_name_or_number(book, text, found):
    assert book["asked_for"](text, NAMES) == found


@pytest.mark.parametrize("word", ["4", "doog", "-1"])
def test_an_unknown_class_is_refused_with_what_there_is(book, word):
    with pytest.raises(ValueError, match=rf"targets: '{word}' is neither .* number from 0 to 3.*dog"):
        book["asked_for"](f"cat,{word}", NAMES)


def test_negative_grad_cam_is_what_the_relu_cuts(book):
    A, G = torch.rand(2, 5, 4, 3), torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(0))
    summed = (G.mean((2, 3))[..., None, None] * A).sum(1)
    assert torch.allclose(book["negative_grad_cam"](A, G), (-summed).relu(), atol=1e-6)
    assert torch.allclose(cc.grad_cam(A, G) - book["negative_grad_cam"](A, G), summed, atol=1e-6)
    assert (summed > 0).any() and (summed < 0).any()


def test_rank_correlation_is_scipys(book):
    a, b = np.random.default_rng(0).integers(0, 5, (2, 40))
    assert book["spearman"](a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert book["spearman"](a, np.zeros(40)) == 0


def pixels(x):
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (cc.MEAN, cc.STD))
    return x * deviation + mean


def test_fgsm_moves_every_pixel_a_little_and_lowers_the_logit(book):
    model, x = nets.tiny(), cc.preprocess([cc.Image.new("RGB", (12, 12), c) for c in ("gray", "black", "white")], 12)
    moved = book["fgsm"](model, x, [0, 1, 2], 4 / 255)
    before, after = pixels(x), pixels(moved)
    assert after.min() >= -1e-6 and after.max() <= 1 + 1e-6
    assert (after - before).abs().max() <= 4 / 255 + 1e-6
    grey = cc.input_gradient(model, x, [0, 1, 2])[0]
    assert torch.allclose((after - before)[0][grey != 0], (-4 / 255 * grey.sign())[grey != 0], atol=1e-6)
    with torch.no_grad():
        assert model(moved)[0, 0] < model(x)[0, 0]


def test_techniques_return_maps_of_the_images_size(book):
    model, x = nets.tiny(), nets.images(1, (12, 12))
    made = book["techniques"](model, "6", (12, 12), 4)
    assert list(made) == [
        "Grad-CAM", "vanilla gradient", "guided backpropagation", "guided Grad-CAM", "Integrated Gradients",
        "GradientSHAP",
    ]  # fmt: skip
    maps = pd.Series({name: method(x, 1) for name, method in made.items()})
    assert all(m.shape == (1, 12, 12) and (m >= 0).all() and m.any() for m in maps)
    assert torch.equal(maps["GradientSHAP"], made["GradientSHAP"](x, 1)), "the random draws are seeded"
    shot = cc.capture(model, x, "6", 1)
    cam = cc.enlarge(cc.grad_cam(shot.activations["6"], shot.gradients["6"]), (12, 12))
    guided = cc.input_gradient(model, x, 1, guided=True)
    assert torch.allclose(maps["guided Grad-CAM"], (guided * cam[:, None]).abs().amax(1))


def test_integrated_gradients_add_up_to_the_change_of_the_logit(book):
    """Their completeness, which the notebook's text states: captum's attribution sums to y(x) - y(grey)."""
    model, x = nets.tiny(), nets.images(1, (12, 12))
    total = IntegratedGradients(model).attribute(x, target=1, n_steps=200).sum()
    with torch.no_grad():
        change = model(x)[0, 1] - model(torch.zeros_like(x))[0, 1]
    assert float(total) == pytest.approx(float(change), abs=0.02 * abs(float(change)) + 1e-3)


# --------------------------------------------------------------------------------------------------------- notebook 03


@pytest.fixture(scope="module")
def layers():
    return definitions("03_layercam", np=np, torch=torch, pd=pd)


@pytest.mark.parametrize(
    ("arch", "head", "deep"), [("resnet18", "fc", "layer4"), ("mobilenet_v2", "classifier.1", "features")]
)
def test_zhous_cam_is_grad_cam_where_only_an_average_and_one_linear_layer_follow(layers, arch, head, deep):
    model = nets.network(arch, seed=2)
    x, linear = nets.images(2, (64, 96)), model.get_submodule(head)
    cams = [
        layers["zhou_cam"](cc.capture(model, x, deep).activations[deep], linear, torch.tensor([k, k]))
        for k in range(10)
    ]
    k = next(k for k, cam in enumerate(cams) if (cam.amax((1, 2)) > 0).all())  # a map that is zero equals anything
    shot = cc.capture(model, x, deep, k)
    A, G = shot.activations[deep], shot.gradients[deep]
    assert cams[k].shape == A[:, 0].shape
    assert layers["deviation"](A.shape[2] * A.shape[3] * cc.grad_cam(A, G), cams[k].relu()) < 1e-4
    assert layers["deviation"](cams[k - 1], cams[k]) > 0.1


def test_min_max_by_hand(layers):
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert layers["min_max"](maps).tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]


def test_min_max_takes_a_place_out_of_a_product_and_the_maximum_does_not(layers):
    a, b = torch.tensor([[[0.2, 1.0], [0.6, 0.4]]]), torch.tensor([[[1.0, 0.1], [0.3, 0.5]]])
    fused = layers["fused_both_ways"](a, b, (2, 2))
    assert (fused["max"] > 0).all()
    assert fused["min-max"][0, 0, 0] == 0 and fused["min-max"][0, 0, 1] == 0, (
        "each factor's smallest value became a zero"
    )
    assert torch.allclose(fused["max"], cc.hybrid(a, b, 0.5))


def test_without_a_floor_both_scalings_agree(layers):
    a, b = torch.tensor([[[0.0, 1.0], [0.6, 0.4]]]), torch.tensor([[[1.0, 0.0], [0.3, 0.5]]])
    fused = layers["fused_both_ways"](a, b, (8, 8))
    assert torch.allclose(fused["max"], fused["min-max"], atol=1e-6) and fused["max"].any()


def test_single_and_fused(layers):
    coarse = {"fine": torch.rand(1, 8, 8), "deep": torch.rand(1, 2, 2)}
    found = layers["single_and_fused"](coarse, (16, 16))
    assert list(found) == ["fine", "deep", *(f"all, {rule}" for rule in cc.LAYER_FUSIONS)]
    large = [cc.enlarge(coarse[name], (16, 16)) for name in ("fine", "deep")]
    assert torch.equal(found["fine"], large[0]) and torch.equal(found["deep"], large[1])
    assert torch.allclose(found["all, mean"], cc.normalise((large[0] + large[1]) / 2))
    lifted = torch.maximum(torch.tanh(2 * large[0]), large[1])
    assert torch.allclose(found["all, layercam"], cc.normalise(lifted))


def test_areas_by_mode(layers):
    model, x = nets.tiny(), nets.images(2, (16, 16))
    coarse, ends = torch.rand(2, 4, 4), cc.baselines(x, "zero")
    found = layers["areas_by_mode"](model, x, coarse, torch.tensor([0, 1]), ["a", "b"], ends, (16, 16), 0, 8, 7)
    table = found.pivot(index=["metric", "method"], columns="image", values="value")
    ties = table.loc["ties"]
    assert (ties.loc["nearest"] == 1).all() and (ties.loc["bilinear"] < 0.5).all()
    maps = {"m": cc.enlarge(coarse, (16, 16), "bicubic")}
    expected = cc.faithfulness(model, x, maps, torch.tensor([0, 1]), ["a", "b"], *ends, 0, 7, 8)
    for metric, curves in expected.items():
        assert table.loc[(metric, "bicubic")].to_numpy() == pytest.approx(cc.auc(curves["m"]), abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- memory

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


def held(value, depth=2):
    """The tensors, arrays and tables in a value, or in the lists, tuples and dictionaries that it is."""
    if isinstance(value, torch.Tensor | np.ndarray | pd.DataFrame):
        yield value
    elif isinstance(value, list | tuple | dict) and depth:
        for part in value.values() if isinstance(value, dict) else value:
            yield from held(part, depth - 1)


@pytest.mark.parametrize("name", ["02_gradcam", "03_layercam"])
def test_memory_is_bounded_by_batch_size_whatever_the_number_of_images(name, tmp_path, monkeypatch, repo):
    """Run on 60 images, two in a batch: no call gets more than the few of a figure, and no maps of all are left."""
    (tmp_path / "net.py").write_text(NETWORK)
    for folder in ("photos", "photos/masks"):
        (tmp_path / folder).mkdir()
        for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)):
            picture = cc.Image.new("L", (32, 32), 255) if "masks" in folder else cc.Image.fromarray(pixels)
            picture.resize((32, 32)).save(tmp_path / folder / f"p{k}.png")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(cc, "save_figure", lambda fig, path: plt.close(fig))
    monkeypatch.setattr(cc, "save_pictures", lambda *args: None)
    most = collections.Counter()

    def watch(counted, real):
        def watched(given, *args, **kwargs):
            most[counted] = max(most[counted], len(given))
            return real(given, *args, **kwargs)

        monkeypatch.setattr(cc, counted, watched)

    for counted in ("load_batch", "load_masks", "enlarge", "normalise", "energy_in_mask"):
        watch(counted, getattr(cc, counted))
    names = {"__name__": "__main__", "display": lambda *args: None}
    cells = [c for c in nbformat.read(repo / "notebooks" / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    given = {"root": str(repo), "dataset": str(tmp_path / "photos"), "results_dir": str(tmp_path / "out")}
    given |= {"arch": f"{tmp_path / 'net.py'}:Net", "n_images": 0, "batch_size": 2, "threads": 1}
    with plt.rc_context():
        for cell in cells:
            exec(compile(cell.source.replace("import Markdown, display", "import Markdown"), name, "exec"), names)
            names |= given if "parameters" in cell.metadata.get("tags", []) else {}
    assert len(names["images"]) == 60
    assert max(most["load_batch"], most["load_masks"], most["energy_in_mask"]) <= 6
    assert max(most.values()) <= 32
    for variable, value in names.items():
        for kept in held(value) if variable not in ("frame", "In", "Out") else ():
            if not isinstance(kept, pd.DataFrame):
                count = kept.numel() if isinstance(kept, torch.Tensor) else kept.size
                assert len(kept if kept.ndim else [0]) < 60 or count <= 60 * 4, f"{variable} keeps {tuple(kept.shape)}"
        if isinstance(value, list) and len(value) >= 60:
            assert not any(isinstance(part, torch.Tensor | np.ndarray) for part in value), f"{variable} keeps a list"
