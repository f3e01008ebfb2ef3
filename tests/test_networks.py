"""Every kind of network that `arch` can name, one by one with random weights; and checkpoints of all origins."""

from __future__ import annotations

import functools
import pickle

import nets
import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation
from torch import nn

import cam_core as cc

NETWORKS = {  # name: (side of the input, deep layer, shallow layer)
    "alexnet": (96, "features.11", "features.1"),
    "vgg16": (64, "features.29", "features.15"),
    "vgg19": (64, "features.35", "features.17"),
    "resnet18": (64, "layer4", "layer2"),
    "resnet34": (64, "layer4", "layer2"),
    "resnet50": (64, "layer4", "layer2"),
    "resnet101": (64, "layer4", "layer2"),
    "densenet121": (64, "features", "features.transition2.conv"),
    "googlenet": (64, "inception5b", "inception3b"),
    "inception_v3": (299, "Mixed_7c", "Mixed_5d"),
    "squeezenet1_1": (64, "features", "features.4"),
    "mobilenet_v2": (64, "features", "features.7.conv.0"),
    "mobilenet_v3_large": (64, "features", "features.7.block.0"),
    "mobilenet_v3_small": (64, "features", "features.4.block.0"),
    "efficientnet_b0": (64, "features", "features.4.0.block.0"),
    "shufflenet_v2_x1_0": (64, "conv5", "stage2"),
    "regnet_y_400mf": (64, "trunk_output", "trunk_output.block2"),
    "convnext_tiny": (64, "features", "features.4.0"),
    "vit_b_16": (224, "encoder.layers.encoder_layer_11.ln_1", "encoder.layers.encoder_layer_5.ln_1"),
    "swin_t": (64, "permute", "features.3"),
}


@functools.cache
def net(arch: str) -> nn.Module:
    model = nets.network(arch, seed=1)
    if arch == "vit_b_16":  # torchvision starts its head at zero, where every map is zero
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


@functools.cache
def x(arch: str) -> torch.Tensor:
    side = NETWORKS[arch][0]
    return nets.images(1, (side, side), seed=2)


@functools.cache
def deep(arch: str) -> str:
    return cc.default_layers(net(arch), x(arch))[0]


@functools.cache
def cam(arch: str, target: int) -> torch.Tensor:
    shot = cc.capture(net(arch), x(arch), deep(arch), target)
    return cc.grad_cam(shot.activations[deep(arch)], shot.gradients[deep(arch)])


@functools.cache
def targets(arch: str) -> list[int]:
    """The first two classes whose map is not zero: with random weights about half of all maps are."""
    return [k for k in range(10) if cam(arch, k).any()][:2]


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_maps_are_there_and_differ_between_two_targets(arch):
    assert len(targets(arch)) == 2
    a, b = (cc.normalise(cam(arch, k)) for k in targets(arch))
    assert a.max() == 1 and b.max() == 1 and a.shape[1] * a.shape[2] > 1 and (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("arch", NETWORKS)
def test_the_default_layers(arch):
    side, deep_layer, shallow_layer = NETWORKS[arch]
    assert cc.default_layers(net(arch), x(arch)) == (deep_layer, shallow_layer)


@pytest.mark.parametrize("arch", [a for a in NETWORKS if a not in ("vit_b_16", "swin_t")])
def test_grad_cam_is_captums(arch):
    k = targets(arch)[1]
    module = net(arch).get_submodule(deep(arch))
    theirs = LayerGradCam(net(arch), module).attribute(x(arch), k, relu_attributions=True).detach()[:, 0]
    assert torch.allclose(cc.normalise(cam(arch, k)), cc.normalise(theirs), rtol=0, atol=1e-5)


def captums_tensors(arch: str, layer: str, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and gradients as captum gives them: A, and (A G) / A."""
    module = net(arch).get_submodule(layer)
    A = LayerActivation(net(arch), module).attribute(x(arch)).detach()
    product = LayerGradientXActivation(net(arch), module).attribute(x(arch), target).detach()
    assert (A.abs() > 1e-12).all()
    return A, product / A


def test_vit_takes_the_patches_and_leaves_the_class_token_out():
    k = targets("vit_b_16")[0]
    A, G = captums_tensors("vit_b_16", deep("vit_b_16"), k)
    assert A.shape == (1, 197, 768)
    theirs = torch.einsum("bc,bnc->bn", G[:, 1:].mean(1), A[:, 1:]).relu().view(1, 14, 14)
    assert torch.allclose(cc.normalise(cam("vit_b_16", k)), cc.normalise(theirs), atol=1e-4)


def test_swin_has_its_channels_last():
    k = targets("swin_t")[0]
    A, G = captums_tensors("swin_t", "features.3", k)
    assert A.shape == (1, 8, 8, 192)
    theirs = torch.einsum("bc,bhwc->bhw", G.mean((1, 2)), A).relu()
    shot = cc.capture(net("swin_t"), x("swin_t"), "features.3", k)
    ours = cc.grad_cam(shot.activations["features.3"], shot.gradients["features.3"])
    assert ours.any() and torch.allclose(cc.normalise(ours), cc.normalise(theirs), atol=1e-4)


def test_behind_vits_last_attention_the_patches_count_nothing():
    with pytest.raises(ValueError, match="none of its patches.*Choose an earlier one, such as 'encoder.*11.ln_1'"):
        cc.capture(net("vit_b_16"), x("vit_b_16"), "encoder.layers.encoder_layer_11", 0)


def test_a_small_vit_that_is_not_square():
    """Tokens are put back in rows, also where the image is wider than high."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 3)

        def forward(self, images):
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            self.kept = self.norm(tokens) if hasattr(self, "norm") else tokens
            return self.head(self.kept.mean(1))

    model = Tokens()
    model.norm = nn.LayerNorm(6)
    images = nets.images(2, (12, 20))
    shot = cc.capture(model, images, "norm", 1)
    assert shot.activations["norm"].shape == (2, 6, 3, 5)
    assert torch.equal(shot.activations["norm"].flatten(2).transpose(1, 2), model.kept.detach())


@pytest.mark.parametrize("layer", ["layer5", "layer4.2", "layer4.1.conv9", "Layer4"])
def test_a_wrong_layer_gets_the_nearest_names_and_the_list_with_shapes(layer):
    with pytest.raises(
        ValueError, match=rf"layer='{layer}' is not in this ResNet. Nearest: .*layer4.*Known: .*layer4 \(512 × 2 × 2\)"
    ):
        cc.capture(net("resnet18"), x("resnet18"), layer)


@pytest.mark.parametrize("layer", ["layer4.1", "layer4.1.conv2", "layer3.0.downsample.0", "relu", "maxpool"])
def test_any_dotted_name_is_a_layer(layer):
    if layer == "relu":  # the first one of the network runs once, those of the blocks have names of their own
        assert cc.capture(net("resnet18"), x("resnet18"), layer).activations[layer].shape[2:] == (32, 32)
    else:
        assert cc.capture(net("resnet18"), x("resnet18"), layer).activations[layer].ndim == 4


# --------------------------------------------------------------------------------------------------------- checkpoints


def saved(folder, model, name="file.pth", **extra):
    torch.save({"model_state_dict": model.state_dict(), **extra} if extra else model.state_dict(), folder / name)
    return folder / name


@pytest.mark.parametrize(
    "arch", ["resnet34", "vgg16", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x1_0", "swin_t"]
)
def test_a_file_tells_its_architecture(tmp_path, arch):
    model, info = cc.load_model("auto", saved(tmp_path, net(arch)))
    assert info["arch"] == arch and len(info["class_names"]) == 10
    with torch.inference_mode():
        assert torch.allclose(model(x(arch)), net(arch)(x(arch)), atol=1e-4)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize("classes", [1000, 4])
def test_auxiliary_heads_and_transform_input(tmp_path, arch, aux, classes):
    """Both were trained on inputs scaled otherwise, which 1000 classes tell; heads are there if the file has them."""
    settings = {"aux_logits": aux, "init_weights": False, "num_classes": classes}
    model = cc.torchvision.models.get_model(arch, weights=None, **settings).eval()
    loaded, info = cc.load_model(arch, saved(tmp_path, model))
    assert loaded.aux_logits == aux and loaded.transform_input == (classes == 1000)
    assert info["size"] == (299 if arch == "inception_v3" else 224)
    model.transform_input = classes == 1000
    images = nets.images(1, (96, 96))
    with torch.inference_mode():
        assert torch.allclose(loaded(images), model(images), atol=1e-4)
    again, _ = cc.load_model(arch, saved(tmp_path, model, "said.pth", transform_input=True))
    assert again.transform_input


def test_a_checkpoint_of_another_architecture_names_keys_shapes_and_what_fits(tmp_path):
    file = saved(tmp_path, net("resnet34"))
    with pytest.raises(ValueError) as caught:
        cc.load_model("resnet18", file)
    assert "does not fit arch=resnet18" in str(caught.value) and "arch=resnet34" in str(caught.value)
    assert "unknown: layer1.2.bn1.bias" in str(caught.value)
    wide = nets.network("resnet18")
    wide.layer1[0].conv1 = nn.Conv2d(64, 64, 1)
    with pytest.raises(ValueError, match=r"shape: layer1.0.conv1.weight \(64, 64, 1, 1\) instead of \(64, 64, 3, 3\)"):
        cc.load_model("resnet18", saved(tmp_path, wide, "wide.pth"))
    with pytest.raises(ValueError, match="saved for arch='vgg11', not 'resnet18'. Give arch=vgg11"):
        cc.load_model("resnet18", saved(tmp_path, net("resnet18"), "vgg.pth", arch="vgg11"))


def test_class_names_and_numbers_of_numpy_inside(tmp_path):
    names = ["Rudo", "Baya", "Greg", "Yuki"]
    model = nets.network("resnet18", classes=4)
    by_number = dict(enumerate(names))
    by_word = [{str(k): n for k, n in by_number.items()}, {n: k for k, n in by_number.items()}]
    for inside in (names, tuple(names), by_number, *by_word):
        extra = {"class_names": inside, "val_acc": np.float64(0.75), "epoch": np.int64(3), "train_acc": np.float32(0.5)}
        _, info = cc.load_model("auto", saved(tmp_path, model, **extra))
        assert info["class_names"] == names and info["val_acc"] == 0.75 and info["epoch"] == 3
    _, info = cc.load_model("auto", saved(tmp_path, model), class_names=["a", "b", "c", "d"])
    assert info["class_names"] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="classes: 3 names for a network with 4 classes"):
        cc.load_model("auto", saved(tmp_path, model), class_names=["a", "b", "c"])
    for inside in (["a", "b"], {0: "a", 3: "d"}):
        file = saved(tmp_path, model, class_names=inside)
        with pytest.raises(ValueError, match="classes: 2 names in the file for a network with 4 classes. Give them"):
            cc.load_model("auto", file)
        assert cc.load_model("auto", file, class_names=names)[1]["class_names"] == names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_what_wrappers_put_before_the_names_is_taken_off(tmp_path, prefix):
    state = {prefix + k: v for k, v in net("resnet18").state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    loaded, info = cc.load_model("auto", tmp_path / "wrapped.pth")
    assert info["arch"] == "resnet18" and torch.equal(loaded.fc.weight, net("resnet18").fc.weight)


def test_the_arch_that_a_file_names(tmp_path):
    """torchvision's names are taken in any case; another name helps only where the tensors tell nothing."""
    assert cc.load_model("resnet18", saved(tmp_path, net("resnet18"), arch="ResNet18"))[1]["arch"] == "resnet18"
    assert cc.load_model("auto", saved(tmp_path, net("resnet34"), arch="mine"))[1]["arch"] == "resnet34"
    with pytest.raises(ValueError, match="was saved for arch='Mine', your own. Give arch=FILE.py:Mine"):
        cc.load_model("auto", saved(tmp_path, nets.tiny(), arch="Mine"))


def test_a_whole_model_is_refused_with_what_to_save_instead(tmp_path):
    torch.save(nets.tiny(), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole.pth is not .*would execute what is in it: save its state_dict\(\)"):
        cc.load_model("auto", tmp_path / "whole.pth")


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model_state_dict": net("resnet18").state_dict(), "class_names": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a PyTorch file of plain tensors"):
            cc.load_model("resnet18", tmp_path / name)
    assert not (tmp_path / "sprung").exists()


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


def test_a_network_of_ones_own(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(OWN)
    model, info = cc.load_model(f"{file}:Net")
    assert info["arch"] == "Net" and info["size"] == 40 and info["class_names"] == ["class 0", "class 1", "class 2"]
    found = cc.explain(model, nets.images(1, (40, 40)), method="grad_cam", layer="body")
    assert found.cam.shape == (40, 40)
    torch.manual_seed(5)
    other = cc.load_model(f"{file}:Net")[0]
    weights = saved(tmp_path, other, class_names=["a", "b", "c"])
    model, info = cc.load_model(f"{file}:Net", weights)
    assert info["class_names"] == ["a", "b", "c"] and info["weights"] == "file.pth"
    assert torch.equal(model.head.weight, other.head.weight)
    again, told = cc.load_model(other, class_names=["x", "y", "z"])
    assert again is other and told["class_names"] == ["x", "y", "z"] and told["arch"] == "Net"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Nett", "defines no class or function Nett"),
        ("number", "defines no class or function number"),
        ("not_a_module", "gives a str, not a torch.nn.Module"),
        ("NoImages", r"does not take a batch \(1, 3, 40, 40\) of images"),
    ],
)
def test_a_network_of_ones_own_that_is_none(tmp_path, name, said):
    (tmp_path / "net.py").write_text(OWN)
    with pytest.raises(ValueError, match=said):
        cc.load_model(f"{tmp_path / 'net.py'}:{name}")
    with pytest.raises(ValueError, match="there is no file .*gone.py"):
        cc.load_model(f"{tmp_path / 'gone.py'}:{name}")
