"""The same maps as captum, TorchCAM and pytorch-grad-cam, where their definitions agree.

Each peer is asked at the layer's own resolution, before its own resizing and min-max scaling; then
both maps are divided by their maximum. Random weights, three kinds of network; test_networks.py has
captum's Grad-CAM for more kinds.
"""

from __future__ import annotations

import functools

import cam_core as cc  # isort: skip  (it makes torchvision importable beside a CPU-only torch)
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from captum.attr import LayerActivation, LayerGradCam, LayerGradientXActivation
from nets import images, network, tiny
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

CASES = [
    ("resnet18", "layer4"),
    ("resnet18", "layer2"),
    ("small_vgg", "features.19"),
    ("squeezenet1_1", "features.7"),
]
IN_PLACE = ("resnet18", "layer3.0.bn1")  # in front of a ReLU that overwrites what a peer has hooked


def everyone(cases):
    return pytest.mark.parametrize(("arch", "layer"), cases, ids=["-".join(c) for c in cases])


@functools.cache
def net(arch: str) -> torch.nn.Module:
    return network(arch, seed=3)


X = images(2, (64, 64), seed=4)


@functools.cache
def target_of(arch: str, layer: str) -> int:
    """The first class whose maps are not zero: of random weights about half of all maps are."""
    for target in range(10):
        A, G = activations_and_gradients(arch, layer, target)
        if all(cam(A, G).amax((1, 2)).all() for cam in cc.CAMS.values()):
            return target
    raise AssertionError("choose another seed")


@functools.cache
def activations_and_gradients(arch: str, layer: str, target: int):
    captured = cc.capture(net(arch), X, layer, target)
    return captured.activations[layer], captured.gradients[layer]


def ours(name: str, arch: str, layer: str) -> torch.Tensor:
    return cc.CAMS[name](*activations_and_gradients(arch, layer, target_of(arch, layer)))


def difference(a: torch.Tensor, b) -> float:
    """The largest difference of two maps divided by their maxima, neither of them zero."""
    b = torch.as_tensor(np.asarray(b)).clamp(min=0)
    assert a.shape == b.shape and a.amax((1, 2)).all(), "an all-zero map agrees with anything"
    return float((cc.normalise(a) - cc.normalise(b)).abs().max())


# ---- captum


@everyone([*CASES, IN_PLACE])
def test_like_captum(arch, layer):
    """captum hands out clones too, so it agrees in front of an in-place ReLU as well."""
    model, module, target = net(arch), net(arch).get_submodule(layer), target_of(arch, layer)
    A, G = activations_and_gradients(arch, layer, target)
    assert torch.equal(LayerActivation(model, module).attribute(X).detach(), A)
    product = LayerGradientXActivation(model, module).attribute(X, target).detach()
    assert torch.allclose(product, A * G, rtol=1e-4, atol=1e-6 * float((A * G).abs().max()))
    theirs = LayerGradCam(model, module).attribute(X, target, relu_attributions=True).detach()[:, 0]
    assert difference(ours("grad_cam", arch, layer), theirs) < 1e-5
    assert difference(ours("hires_cam", arch, layer), product.sum(1)) < 1e-5


# ---- TorchCAM


def torch_cam(method: str, arch: str, layer: str) -> torch.Tensor:
    """Not normalised: its own way is min-max, which forces a zero into every map."""
    with getattr(torchcam.methods, method)(net(arch), layer) as extractor:
        scores = net(arch)(X)
        return extractor(target_of(arch, layer), scores, normalized=False)[0].detach()


@everyone(CASES)
def test_like_torchcam(arch, layer):
    for name, method in (("grad_cam", "GradCAM"), ("layer_cam", "LayerCAM")):
        theirs = torch_cam(method, arch, layer)
        assert difference(ours(name, arch, layer), theirs) < 1e-5, name
    assert difference(ours("xgrad_cam", arch, layer), torch_cam("XGradCAM", arch, layer)) < 1e-4


# ---- pytorch-grad-cam


def pytorch_cam(method: str, arch: str, layer: str, scale: float = 1.0) -> np.ndarray:
    """At the layer's resolution: what it computes before it resizes and scales."""
    model, module = net(arch), net(arch).get_submodule(layer)
    peer = getattr(pytorch_grad_cam, method)(model, [module])
    chosen = [ClassifierOutputTarget(target_of(arch, layer))] * len(X)
    try:
        peer(X, chosen)
        A = peer.activations_and_grads.activations[0].numpy()
        G = peer.activations_and_grads.gradients[0].numpy()
        return peer.get_cam_image(X, module, chosen, A, scale * G, eigen_smooth=False)
    finally:
        peer.activations_and_grads.release()
        model.zero_grad(set_to_none=True)


@everyone(CASES)
def test_like_pytorch_grad_cam(arch, layer):
    methods = {"grad_cam": "GradCAM", "layer_cam": "LayerCAM", "hires_cam": "HiResCAM"}
    for name, method in methods.items():
        theirs = pytorch_cam(method, arch, layer)
        assert difference(ours(name, arch, layer), theirs) < 1e-5, name
    assert difference(ours("xgrad_cam", arch, layer), pytorch_cam("XGradCAM", arch, layer)) < 1e-4


@everyone(CASES)
def test_grad_cam_pp_like_pytorch_grad_cam(arch, layer):
    """Its denominator holds 1e-6, which outweighs the squares of a network's gradients.

    With gradients scaled so that it does not, the maps agree.
    """
    A, G = activations_and_gradients(arch, layer, target_of(arch, layer))
    scale = 100 / float(G[G != 0].abs().median())
    theirs = pytorch_cam("GradCAMPlusPlus", arch, layer, scale)
    assert difference(cc.grad_cam_pp(A, scale * G), theirs) < 1e-4


# ---- why not everywhere


def test_peers_explain_something_else_in_front_of_an_in_place_relu():
    """They keep no clone, so what they hold of the layer is what the ReLU behind it wrote there."""
    A, _ = activations_and_gradients(*IN_PLACE, target_of(*IN_PLACE))
    assert (A < 0).any()
    for theirs in (torch_cam("GradCAM", *IN_PLACE), pytorch_cam("GradCAM", *IN_PLACE)):
        assert difference(ours("grad_cam", *IN_PLACE), theirs) > 0.01


def test_a_peer_does_not_leave_the_model_as_it_was():
    """A fact about pytorch-grad-cam; if a new version behaves better, this test says so."""
    model, x = tiny().train(), images(2)
    model(x).sum().backward()
    kept = model[0].weight.grad.clone()
    cc.capture(model, x, "6", 1)
    assert torch.equal(model[0].weight.grad, kept) and model.training
    peer = pytorch_grad_cam.GradCAM(model, [model[6]])
    peer(x, [ClassifierOutputTarget(1)] * 2)
    peer.activations_and_grads.release()
    assert not model.training and not torch.equal(model[0].weight.grad, kept)
