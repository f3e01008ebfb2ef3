"""The same maps as captum, TorchCAM and pytorch-grad-cam, where their definitions agree; else why not.

Each peer is asked at the layer's own resolution, before its own resizing and min-max scaling; then both maps are
divided by their maximum. Random weights, several architectures and layers, two targets.
"""

# ruff: noqa: I001  (cam_core before the peers: it makes torchvision importable beside a CPU-only torch)
from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import cam_core as cc
from nets import images, network, tiny

import pytorch_grad_cam
import torchcam.methods
from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

CASES = [  # architecture, layer
    ("resnet18", "layer4"),
    ("resnet18", "layer2"),
    ("resnet18", "layer3.0.bn1"),
    ("mobilenet_v2", "features.18"),
    ("mobilenet_v2", "features.7"),
    ("mobilenet_v2", "features.7.conv.0.1"),
    ("small_vgg", "features.19"),
    ("small_vgg", "features.10"),
    ("small_vgg", "features.18"),
    ("squeezenet1_1", "features.12"),
    ("squeezenet1_1", "features.7"),
]
# these lie in front of an in-place ReLU, which overwrites what a peer has hooked
IN_PLACE = {("resnet18", "layer3.0.bn1"), ("mobilenet_v2", "features.7.conv.0.1"), ("small_vgg", "features.18")}
UNTOUCHED = [c for c in CASES if c not in IN_PLACE]


def everyone(cases):
    return pytest.mark.parametrize(("arch", "layer"), cases, ids=[f"{a}-{n}" for a, n in cases])


@functools.cache
def net(arch: str) -> torch.nn.Module:
    return network(arch, seed=3)


@functools.cache
def x() -> torch.Tensor:
    return images(2, (64, 64), seed=4)


@functools.cache
def shot(arch: str, layer: str, target: int) -> cc.Capture:
    return cc.capture(net(arch), x(), layer, target)


@functools.cache
def targets(arch: str, layer: str) -> tuple[int, int]:
    """The first two classes whose maps are not zero for any image: of random weights about half of all maps are."""
    good = [t for t in range(10) if all(ours(n, arch, layer, t).amax((1, 2)).all() for n in cc.CAMS)]
    assert len(good) >= 2, "choose another seed"
    return good[0], good[1]


def ours(name: str, arch: str, layer: str, target: int) -> torch.Tensor:
    s = shot(arch, layer, target)
    return cc.CAMS[name](s.activations[layer], s.gradients[layer])


def agree(a: torch.Tensor, b, atol: float = 1e-5) -> None:
    b = torch.as_tensor(np.asarray(b)).clamp(min=0)
    assert a.shape == b.shape
    assert (a.flatten(1).amax(1) > 0).all(), "an all-zero map agrees with anything: choose another seed or target"
    assert torch.allclose(cc.normalise(a), cc.normalise(b), rtol=0, atol=atol)


def differ(a: torch.Tensor, b) -> None:
    assert not torch.allclose(cc.normalise(a), cc.normalise(torch.as_tensor(np.asarray(b)).clamp(min=0)), atol=1e-2)


@everyone(CASES)
@pytest.mark.parametrize("name", ["grad_cam", "layer_cam", "hires_cam"])
def test_maps_are_there_and_differ_between_two_targets(name, arch, layer):
    a, b = (cc.normalise(ours(name, arch, layer, t)) for t in targets(arch, layer))
    assert (a.amax((1, 2)) == 1).all() and (b.amax((1, 2)) == 1).all()
    assert ((a - b).abs().amax((1, 2)) > 1e-3).all()


# ------------------------------------------------------------------------------------------------------------- captum


@everyone(CASES)
@pytest.mark.parametrize("which", [0, 1])
def test_grad_cam_like_captum(arch, layer, which):
    target = targets(arch, layer)[which]
    module = net(arch).get_submodule(layer)
    theirs = LayerGradCam(net(arch), module).attribute(x(), target, relu_attributions=True).detach()
    agree(ours("grad_cam", arch, layer, target), theirs[:, 0])


@everyone(CASES)
def test_activation_and_gradient_like_captum(arch, layer):
    """captum hands out clones too, so its activations and A x G at a pre-ReLU layer are right."""
    target = targets(arch, layer)[1]
    module, s = net(arch).get_submodule(layer), shot(arch, layer, target)
    A, G = s.activations[layer], s.gradients[layer]
    assert torch.equal(LayerActivation(net(arch), module).attribute(x()).detach(), A)
    product = LayerGradientXActivation(net(arch), module).attribute(x(), target).detach()
    assert torch.allclose(product, A * G, rtol=1e-4, atol=1e-6 * float((A * G).abs().max())) and product.any()
    agree(ours("hires_cam", arch, layer, target), product.sum(1))  # HiResCAM is the sum of A x G over channels


# ----------------------------------------------------------------------------------------------------------- TorchCAM


def torch_cam(method: str, arch: str, layer: str, target: int) -> torch.Tensor:
    """TorchCAM, not normalised (its own normalisation is min-max, which forces a zero into every map)."""
    model = net(arch)
    with getattr(torchcam.methods, method)(model, layer) as extractor:
        return extractor(target, model(x()), normalized=False)[0].detach()


@everyone(UNTOUCHED)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("name", "method"), [("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM")])
def test_like_torchcam(name, method, arch, layer, which):
    target = targets(arch, layer)[which]
    agree(ours(name, arch, layer, target), torch_cam(method, arch, layer, target))


@everyone(UNTOUCHED)
def test_xgrad_cam_like_torchcam(arch, layer):
    target = targets(arch, layer)[1]
    agree(ours("xgrad_cam", arch, layer, target), torch_cam("XGradCAM", arch, layer, target), atol=1e-4)


@everyone(sorted(IN_PLACE))
def test_torchcam_explains_the_relu_when_asked_for_the_layer_in_front_of_it(arch, layer):
    """TorchCAM keeps no clone: an in-place ReLU overwrites what it hooked, and its gradient is the one behind the ReLU.

    That is the map of the layer behind. captum and cam_core give the map of the layer that was asked for.
    """
    target = targets(arch, layer)[1]
    theirs = torch_cam("GradCAM", arch, layer, target)
    s = shot(arch, layer, target)
    assert (s.activations[layer] < 0).any()
    differ(ours("grad_cam", arch, layer, target), theirs)


def test_torchcams_grad_cam_pp_is_another_formula():
    """TorchCAM 0.5.0 does not compute eq. 19, so there is nothing to agree on.

    Its `alpha[mask].div_(...)` divides a copy, so alpha stays G^2 and the weight is the sum of G^2 ReLU(G).
    """
    s = shot("resnet18", "layer2", 7)
    A, G = s.activations["layer2"], s.gradients["layer2"]
    theirs = torch_cam("GradCAMpp", "resnet18", "layer2", 7)
    agree(torch.einsum("bk,bkhw->bhw", (G**2 * G.relu()).sum((2, 3)), A).relu(), theirs)
    differ(ours("grad_cam_pp", "resnet18", "layer2", 7), theirs)


# --------------------------------------------------------------------------------------------------- pytorch-grad-cam


def pytorch_cam(method: str, arch: str, layer: str, target: int, scale: float = 1.0) -> np.ndarray:
    """pytorch-grad-cam at the layer's resolution: what it computes before it resizes and scales."""
    model, module = net(arch), net(arch).get_submodule(layer)
    peer = getattr(pytorch_grad_cam, method)(model, [module])
    chosen = [ClassifierOutputTarget(target)] * len(x())
    try:
        peer(x(), chosen)
        A, G = (t[0].numpy() for t in (peer.activations_and_grads.activations, peer.activations_and_grads.gradients))
        return peer.get_cam_image(x(), module, chosen, A, scale * G, eigen_smooth=False)
    finally:
        peer.activations_and_grads.release()
        model.zero_grad(set_to_none=True)


@everyone(UNTOUCHED)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("name", "method"), [("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM"), ("hires_cam", "HiResCAM")]
)
def test_like_pytorch_grad_cam(name, method, arch, layer, which):
    target = targets(arch, layer)[which]
    agree(ours(name, arch, layer, target), pytorch_cam(method, arch, layer, target))


@everyone(UNTOUCHED)
def test_xgrad_cam_like_pytorch_grad_cam(arch, layer):
    target = targets(arch, layer)[1]
    agree(ours("xgrad_cam", arch, layer, target), pytorch_cam("XGradCAM", arch, layer, target), atol=1e-4)


@everyone(UNTOUCHED)
def test_grad_cam_pp_like_pytorch_grad_cam(arch, layer):
    """Its denominator 2 G^2 + S G^3 + 1e-6 needs gradients whose square is far above 1e-6, which those of real networks
    are not. Scaling the classifier makes them so; cam_core, without the 1e-6, gets the scaled gradients too.
    """
    target = targets(arch, layer)[1]
    s = shot(arch, layer, target)
    A, G = s.activations[layer], s.gradients[layer]
    scale = 100 / float(G[G != 0].abs().median())
    theirs = pytorch_cam("GradCAMPlusPlus", arch, layer, target, scale)
    agree(cc.grad_cam_pp(A, scale * G), theirs, atol=1e-4)


@pytest.mark.parametrize(("arch", "layer"), [("mobilenet_v2", "features.7"), ("squeezenet1_1", "features.7")])
def test_the_epsilon_of_pytorch_grad_cam_is_not_negligible(arch, layer):
    """Where gradients are small, as at early layers, its 1e-6 outweighs G^2 and the map is that of another formula."""
    target = targets(arch, layer)[1]
    G = shot(arch, layer, target).gradients[layer]
    assert float(G[G != 0].square().median()) < 1e-6
    theirs = cc.normalise(torch.from_numpy(pytorch_cam("GradCAMPlusPlus", arch, layer, target)).clamp(min=0))
    assert float((theirs - cc.normalise(ours("grad_cam_pp", arch, layer, target))).abs().max()) > 0.01


@everyone(sorted(IN_PLACE))
def test_pytorch_grad_cam_mixes_layers_in_front_of_an_in_place_relu(arch, layer):
    """Its activation is the one behind the ReLU, which overwrote it; its gradient is the one in front."""
    target = targets(arch, layer)[1]
    model, module = net(arch), net(arch).get_submodule(layer)
    peer = pytorch_grad_cam.GradCAM(model, [module])
    peer(x(), [ClassifierOutputTarget(target)] * 2)
    (theirs_A,), (theirs_G,) = peer.activations_and_grads.activations, peer.activations_and_grads.gradients
    peer.activations_and_grads.release()
    model.zero_grad(set_to_none=True)
    s = shot(arch, layer, target)
    A, G = s.activations[layer], s.gradients[layer]
    assert torch.allclose(theirs_G, G, rtol=1e-3, atol=1e-6 * float(G.abs().max()))
    assert (A < 0).any() and (theirs_A >= 0).all()


# --------------------------------------------------------------------- what the peers do to a model, and cam_core not


def test_peers_do_not_leave_the_model_as_it_was():
    """Facts that the README states; if a new version of a peer behaves better, this says so."""
    model, batch = tiny().train(), images(2)
    model(batch).sum().backward()
    kept = model[0].weight.grad.clone()
    cc.capture(model, batch, "6", 1)
    assert torch.equal(model[0].weight.grad, kept) and model.training
    peer = pytorch_grad_cam.GradCAM(model, [model[6]])
    peer(batch, [ClassifierOutputTarget(1)] * 2)
    peer.activations_and_grads.release()
    assert not model.training  # left in eval mode
    assert not torch.equal(model[0].weight.grad, kept)  # the caller's gradients are overwritten
