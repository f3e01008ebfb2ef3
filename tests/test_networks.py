"""Kinds of networks: where they can be asked, maps like captum's, and checkpoints of all origins.

The small networks have the module names of the well-known ones of their kind (see nets.py).
"""

from __future__ import annotations

import functools
import pickle

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation
from torch import nn

import cam_core as cc

VIT = "encoder.layers.encoder_layer_{}.ln_1"
TRANSITION = "features.transition{}.conv"
KINDS = {  # side of the input, shallow layer, all stages; the deep layer is the last of them
    "resnet18": (64, "layer2", ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "small_vgg": (64, "features.9", [f"features.{k}" for k in (1, 4, 9, 14, 19)]),
    "squeezenet1_1": (64, "features.4", ["features.1", "features.4", "features.7", "features"]),
    "googlenet": (
        64,
        "inception3b",
        ["conv1", "conv3", "inception3b", "inception4e", "inception5b"],
    ),
    "small_densenet": (
        64,
        TRANSITION.format(2),
        ["features.relu0", *(TRANSITION.format(k) for k in (1, 2, 3)), "features.denseblock4"],
    ),
    "mobilenet_v3_small": (
        64,
        "features.4.block.0",
        ["features.0", *(f"features.{k}.block.0" for k in (2, 4, 9)), "features"],
    ),
    "small_convnext": (
        64,
        "features.3",
        ["features.1", "features.3", "features.5", "features"],
    ),
    "small_vit": (32, VIT.format(5), [VIT.format(k) for k in (2, 5, 8, 11)]),
    "small_swin": (64, "features.3", ["features.1", "features.3", "features.5", "permute"]),
}
PLAIN = [name for name in KINDS if name not in ("small_vit", "small_swin")]  # maps (B, C, h, w)


@functools.cache
def net(arch: str) -> nn.Module:
    return nets.network(arch, seed=1)


def x_for(arch: str) -> torch.Tensor:
    side = KINDS[arch][0]
    return nets.images(1, (side, side), seed=2)


@functools.cache
def maps_of_two_targets(arch: str) -> dict[int, torch.Tensor]:
    """Grad-CAM for the first two classes whose map is not zero, at the default layer."""
    found = {}
    for target in range(10):
        deep = KINDS[arch][2][-1]
        captured = cc.capture(net(arch), x_for(arch), deep, target)
        m = cc.grad_cam(captured.activations[deep], captured.gradients[deep])
        if m.any() and len(found) < 2:
            found[target] = m
    return found


@pytest.mark.parametrize("arch", KINDS)
def test_the_default_layers_and_the_maps_there(arch):
    _, shallow, stages = KINDS[arch]
    assert list(cc.stages(net(arch), x_for(arch))) == stages
    assert cc.default_layers(net(arch), x_for(arch)) == (stages[-1], shallow)
    a, b = maps_of_two_targets(arch).values()
    assert a.shape[1] * a.shape[2] > 1
    assert (cc.normalise(a) - cc.normalise(b)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", PLAIN)
def test_grad_cam_is_captums(arch):
    module = net(arch).get_submodule(KINDS[arch][2][-1])
    target, ours = list(maps_of_two_targets(arch).items())[1]
    theirs = LayerGradCam(net(arch), module).attribute(x_for(arch), target, relu_attributions=True)
    theirs = theirs.detach()[:, 0]
    assert torch.allclose(cc.normalise(ours), cc.normalise(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "layer", "skipped"),
    [("small_vit", VIT.format(11), 1), ("small_swin", "features.3", 0)],
)
def test_grad_cam_of_tokens_and_of_channels_last_is_captums(arch, layer, skipped):
    """captum's activations A and (A G) / A, from which Grad-CAM is built here by its formula."""
    module, x, target = net(arch).get_submodule(layer), x_for(arch), 1
    A = LayerActivation(net(arch), module).attribute(x).detach()
    G = LayerGradientXActivation(net(arch), module).attribute(x, target).detach() / A
    A, G = (t.reshape(1, -1, t.shape[-1])[:, skipped:] for t in (A, G))  # without the class token
    side = int(A.shape[1] ** 0.5)
    theirs = torch.einsum("bc,bnc->bn", G.mean(1), A).relu().view(1, side, side)
    captured = cc.capture(net(arch), x, layer, target)
    ours = cc.grad_cam(captured.activations[layer], captured.gradients[layer])
    assert ours.any() and torch.allclose(cc.normalise(ours), cc.normalise(theirs), atol=1e-4)


def test_behind_the_last_attention_of_a_vit_the_patches_count_nothing():
    with pytest.raises(ValueError, match="layer='encoder.*11'.*encoder_layer_11.ln_1"):
        cc.capture(net("small_vit"), x_for("small_vit"), "encoder.layers.encoder_layer_11", 0)


def test_tokens_are_put_back_in_rows_where_the_image_is_wider_than_high():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 6, 4, 4)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x):
            self.kept = self.norm(self.patches(x).flatten(2).mT)
            return self.head(self.kept.mean(1))

    model = Tokens()
    captured = cc.capture(model, nets.images(2, (12, 20)), "norm", 1)
    assert captured.activations["norm"].shape == (2, 6, 3, 5)
    assert torch.equal(captured.activations["norm"].flatten(2).mT, model.kept.detach())


def test_a_wrong_layer_gets_the_nearest_names_with_their_shapes():
    with pytest.raises(ValueError, match=r"layer='layer5'.*layer4 \(512 × 2 × 2\)"):
        cc.capture(net("resnet18"), x_for("resnet18"), "layer5")


# ---- default layers of networks that are written otherwise


class Block(nn.Module):
    """A residual block: not everything passes through its branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(x)))


class Functional(nn.Module):
    """ReLU and pooling as functions, without modules of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last, self.head = Block(), nn.Linear(4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(F.relu(self.body(x)), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1))


class OneRelu(nn.Module):
    """One ReLU module serves the whole network, which has one resolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


class Branch(OneRelu):
    """What ends last in front of the pooling is a branch: not everything passes through it."""

    def forward(self, x):
        y = F.max_pool2d(self.a(x), 2)
        return self.head((y + self.b(y)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "layers"),
    [(Functional, ("last", "stem")), (OneRelu, ("b", "b")), (Branch, ("a", "a"))],
)
def test_default_layers_without_modules_for_every_step(model, layers):
    model, x = model(), nets.images(1, (32, 32))
    assert cc.default_layers(model, x) == layers
    assert cc.capture(model, x, layers[0]).gradients[layers[0]].any()


def test_a_model_without_maps_has_no_default_layers():
    with pytest.raises(ValueError, match="Sequential has no layer.*layer="):
        cc.default_layers(nn.Sequential(nn.Flatten(), nn.Linear(360, 4)), nets.images(1))


def test_names_of_layers_are_kept_and_auto_is_filled_in():
    model, x = net("resnet18"), x_for("resnet18")
    assert cc.resolve_layers(model, x, "layer3") == ("layer3", "layer2")
    assert cc.resolve_layers(model, x, "auto", "layer1") == ("layer4", "layer1")


# ---- devices


def test_an_apple_gpu_has_two_names(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name in ("mps", "mps:0"):
        assert cc.networks.pick_device(name).type == "mps"
        assert cc.settings.check("device", name) == name
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='mps:0' is not available"):
        cc.networks.pick_device("mps:0")


# ---- checkpoints


def saved(folder, model, name="file.pth", **extra):
    state = model.state_dict()
    torch.save({"model_state_dict": state, **extra} if extra else state, folder / name)
    return folder / name


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "swin_t"])
def test_a_file_tells_its_architecture(tmp_path, arch):
    model = nets.network(arch)
    loaded, info = cc.networks.load("auto", saved(tmp_path, model))
    assert info["arch"] == arch and len(info["class_names"]) == 10
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    state = loaded.state_dict()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("arch", "heads", "classes", "size"),
    [("googlenet", True, 1000, 224), ("inception_v3", False, 4, 299)],
)
def test_auxiliary_heads_and_the_scaling_of_the_input(tmp_path, arch, heads, classes, size):
    """Both were trained on inputs scaled otherwise, which 1000 classes tell, or the file."""
    options = {"aux_logits": heads, "init_weights": False, "num_classes": classes}
    model = nets.models.get_model(arch, weights=None, **options).eval()
    loaded, info = cc.networks.load(arch, saved(tmp_path, model))
    assert loaded.aux_logits == heads and loaded.transform_input == (classes == 1000)
    assert info["size"] == size
    model.transform_input = classes == 1000
    x = nets.images(1, (96, 96))
    with torch.inference_mode():
        assert torch.allclose(loaded(x), model(x), atol=1e-4)
    if classes != 1000:
        file = saved(tmp_path, model, transform_input=True)
        assert cc.networks.load(arch, file)[0].transform_input


def test_a_checkpoint_of_another_architecture_names_keys_shapes_and_what_fits(tmp_path):
    file = saved(tmp_path, nets.network("squeezenet1_1"))
    with pytest.raises(ValueError) as caught:
        cc.networks.load("squeezenet1_0", file)
    message = str(caught.value)
    assert "missing: " in message and "unknown: " in message and "arch=squeezenet1_1" in message
    assert "features.0.weight (64, 3, 3, 3) instead of (96, 3, 7, 7)" in message


def test_the_arch_that_a_file_names(tmp_path):
    """torchvision's names count in any case; another name only where the tensors tell nothing."""
    file = saved(tmp_path, net("resnet18"), arch="ResNet18")
    assert cc.networks.load("resnet18", file)[1]["arch"] == "resnet18"
    with pytest.raises(ValueError, match="arch='resnet18', not 'vgg11'"):
        cc.networks.load("vgg11", file)
    with pytest.raises(ValueError, match="arch='Mine'.*FILE.py:Mine"):
        cc.networks.load("auto", saved(tmp_path, nets.tiny(), arch="Mine"))


def test_class_names_and_numbers_of_numpy_inside(tmp_path):
    names = ["Rudo", "Baya", "Greg", "Yuki"]
    model = nets.network("squeezenet1_1", classes=4)
    by_number = dict(enumerate(names))
    forms = [names, by_number, {str(k): n for k, n in by_number.items()}]
    forms.append({n: k for k, n in by_number.items()})
    for form in forms:
        file = saved(tmp_path, model, class_names=form, val_acc=np.float64(0.75), epoch=np.int64(3))
        _, info = cc.networks.load("squeezenet1_1", file)
        assert info["class_names"] == names and info["val_acc"] == 0.75 and info["epoch"] == 3
    file = saved(tmp_path, model, class_names={0: "a", 3: "d"})
    with pytest.raises(ValueError, match="2 names .* 4 classes"):
        cc.networks.load("squeezenet1_1", file)
    assert cc.networks.load("squeezenet1_1", file, class_names=names)[1]["class_names"] == names
    with pytest.raises(ValueError, match="3 names .* 4 classes"):
        cc.networks.load("squeezenet1_1", file, class_names=names[:3])


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "model."])
def test_what_wrappers_put_before_the_names_is_taken_off(tmp_path, prefix):
    model = nets.network("squeezenet1_1")
    state = {prefix + name: t for name, t in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    loaded, info = cc.networks.load("auto", tmp_path / "wrapped.pth")
    assert info["arch"] == "squeezenet1_1"
    assert torch.equal(loaded.features[0].weight, model.features[0].weight)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    saved(tmp_path, nets.tiny(), "a.pth", class_names=Trap())
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Trap()))
    torch.save(nets.tiny(), tmp_path / "whole_model.pth")
    for file in tmp_path.glob("*.pth"):
        with pytest.raises(ValueError, match=file.name):
            cc.networks.load("resnet18", file)
    assert not (tmp_path / "sprung").exists()


# ---- networks of one's own

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    image_size = 40
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.GELU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 3)
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

class NoImages(Net):
    def forward(self, x):
        return self.head(x)

number = 3
def not_a_module():
    return "text"
"""


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(OWN)
    return file


def test_a_network_of_ones_own(own, tmp_path):
    model, info = cc.networks.load(f"{own}:Net")
    assert info["arch"] == "Net" and info["size"] == 40
    assert info["class_names"] == ["class 0", "class 1", "class 2"]
    found = cc.explain(model, nets.images(1, (40, 40)), method="grad_cam", layer="body")
    assert found.cam.shape == (40, 40)
    other, _ = cc.networks.load(f"{own}:Net")
    weights = saved(tmp_path, other, class_names=["a", "b", "c"])
    model, info = cc.networks.load(f"{own}:Net", weights)
    assert info["class_names"] == ["a", "b", "c"] and info["weights"] == "file.pth"
    assert torch.equal(model.head.weight, other.head.weight)
    again, info = cc.networks.load(other, class_names=["x", "y", "z"])
    assert again is other and info["class_names"] == ["x", "y", "z"]


@pytest.mark.parametrize("name", ["Nett", "number", "not_a_module", "NoImages"])
def test_what_is_no_network_of_ones_own_is_refused_by_name(own, name):
    with pytest.raises(ValueError, match=f"arch=.*{name}"):
        cc.networks.load(f"{own}:{name}")
    with pytest.raises(ValueError, match="no file .*gone.py"):
        cc.networks.load(f"{own.with_name('gone.py')}:{name}")
