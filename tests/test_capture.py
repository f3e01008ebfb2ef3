"""capture: the right numbers, clear errors, and the caller's model as it was, whatever happens."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from nets import images, resnet18, state, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cam_core as cc

# ---- the right numbers


@pytest.mark.parametrize(("layer", "target"), [("1", 0), ("4", 3), ("6", 2)])
def test_gradients_equal_finite_differences(layer, target):
    """Independent of autograd: nudge one number of the layer's output and see the target logit."""
    net, x = tiny(1, dtype=torch.float64), images(1, dtype=torch.float64)
    captured = cc.capture(net, x, layer, target)
    A, G = captured.activations[layer], captured.gradients[layer]
    behind = net[int(layer) + 1 :]
    draw = np.random.default_rng(0)
    eps = 1e-6
    for _ in range(20):
        place = (0, *(int(draw.integers(n)) for n in A.shape[1:]))
        logits = []
        for nudge in (eps, -eps):
            nudged = A.clone()
            nudged[place] += nudge
            with torch.no_grad():
                logits.append(float(behind(nudged)[0, target]))
        assert G[place] == pytest.approx((logits[0] - logits[1]) / (2 * eps), abs=1e-7)
    assert G.abs().max() > 1e-3, "the comparison would be of zeros"


def test_activations_are_the_layers_own_output():
    """Behind 1 and 5 a ReLU works in place; what was captured is what the layer put out."""
    net, x = tiny(2), images(3)
    layers = ["0", "1", "3", "4", "5", "6"]
    captured = cc.capture(net, x, layers, 1)
    with torch.no_grad():
        assert torch.equal(captured.logits, net(x))
        for layer in layers:
            assert torch.equal(captured.activations[layer], net[: int(layer) + 1](x)), layer
    closed = captured.activations["5"] < 0  # the ReLU lets nothing through here
    before, behind = captured.gradients["5"], captured.gradients["6"]
    assert closed.any() and not before[closed].any() and behind[closed].any()
    assert torch.equal(before[~closed], behind[~closed])


def test_scores_are_logits_not_probabilities():
    """The gradients of a softmax vanish where a network is sure; those of logits do not."""
    net, x = tiny(4), images(1)
    before = cc.capture(net, x, "4", 2).gradients["4"]
    net[11].weight.data *= 1000
    after = cc.capture(net, x, "4", 2)
    assert torch.allclose(after.gradients["4"], 1000 * before, rtol=1e-4)
    assert after.logits.softmax(1).amax() > 0.999


def test_several_layers_equal_each_alone_in_order_of_execution():
    net, x = resnet18(), images(2, (64, 64))
    names = ["layer4", "layer3.1", "layer3.0.bn1", "layer3"]
    together = cc.capture(net, x, names, 3)
    assert list(together.activations) == ["layer3.0.bn1", "layer3.1", "layer3", "layer4"]
    for name in names:
        alone = cc.capture(net, x, name, 3)
        assert torch.equal(together.activations[name], alone.activations[name])
        assert torch.allclose(together.gradients[name], alone.gradients[name], rtol=1e-4, atol=1e-7)
        assert alone.gradients[name].any()
    assert torch.equal(together.gradients["layer3"], together.gradients["layer3.1"])  # one output


@pytest.mark.parametrize("target", [None, 2, (3, 0, 1)])
def test_a_batch_equals_its_images_one_by_one(target):
    net, x = tiny(5), images(3)
    captured = cc.capture(net, x, ["2", "6"], target)
    expected = {None: captured.logits.argmax(1).tolist(), 2: [2, 2, 2]}.get(target, [3, 0, 1])
    assert captured.target.tolist() == expected
    for b in range(3):
        alone = cc.capture(net, x[b : b + 1], ["2", "6"], target and expected[b])
        assert torch.allclose(alone.logits[0], captured.logits[b], atol=1e-6)
        for name in ("2", "6"):
            assert torch.allclose(alone.gradients[name][0], captured.gradients[name][b], atol=1e-6)


def test_the_state_of_the_model_does_not_change_the_numbers():
    """Training mode, with batch norm and dropout, and frozen weights give the same gradients."""
    net, x = tiny(9).insert(7, nn.Dropout2d(0.5)), images(4)
    expected = cc.capture(net.eval(), x, "6", 0)
    for changed in (net.train(), net.requires_grad_(False)):
        found = cc.capture(changed, x, "6", 0)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.gradients["6"], expected.gradients["6"])


def test_half_and_double_precision_and_autocast():
    x = images(2)
    expected = cc.capture(tiny(10), x, "6", 1).gradients["6"]
    for dtype in (torch.bfloat16, torch.float64):
        captured = cc.capture(tiny(10, dtype=dtype), x.to(dtype), "6", 1)
        assert captured.activations["6"].dtype == captured.gradients["6"].dtype == dtype
        assert torch.allclose(captured.gradients["6"].float(), expected, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        captured = cc.capture(tiny(10), x, "6", 1)
    assert torch.allclose(captured.gradients["6"].float(), expected, atol=0.02)


class Gated(nn.Module):
    """Its input is used again behind the layer, so autograd has to save it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head((self.conv(x) * x[:, :1]).mean((2, 3)))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_autograd_around_it(guard):
    """Also with an input and a target made there, which autograd refuses to save."""
    net = Gated()
    expected = cc.capture(net, images(2), "conv").gradients["conv"]
    with guard():
        x = images(2)
        target = net(x).argmax(1)
        assert torch.equal(cc.capture(net, x, "conv", target).gradients["conv"], expected)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_callers_input_is_left_alone_by_a_network_that_works_in_place():
    layers = [nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net, x = nn.Sequential(*layers), images(1)
    before = x.clone()
    cc.capture(net, x, "1")
    cc.layer_shapes(net, x)
    cc.input_gradient(net, x, 0)
    assert torch.equal(x, before)


# ---- the model afterwards


def peculiar() -> nn.Sequential:
    """A model that nobody tidied up: mixed modes and flags, kept gradients, hooks."""
    net = tiny()
    net(images(2)).sum().backward()
    net[9].weight.grad = None
    net.training = net[5].training = True
    net[0].weight.requires_grad_(False)
    net[11].bias.requires_grad_(False)
    net[3].register_forward_hook(lambda module, args, output: None)
    net[4].register_full_backward_pre_hook(lambda module, grad: None)
    return net


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


class RefusesHooks(nn.Conv2d):
    """As a scripted module does."""

    def register_forward_hook(self, *args, **kwargs):
        raise RuntimeError("no hooks here")


def with_hook(error):
    def hook(module, args, output):
        raise error

    return lambda net: net[6].register_forward_hook(hook)


def with_nan(net):
    net[11].weight.data[0, 0] = float("nan")


FAILURES = {  # what is done to the model, the call, and the error that it ends in
    "unknown layer": (None, {"layers": ["4", "nonsense"]}, ValueError),
    "target out of range": (None, {"layers": "4", "target": 99}, ValueError),
    "no spatial output": (None, {"layers": ["4", "9"]}, ValueError),
    "wrong input": (None, {"layers": "4", "x": torch.zeros(2, 7, 12, 10)}, ValueError),
    "forward raises": (lambda net: net.insert(8, Breaks()), {"layers": "6"}, RuntimeError),
    "no hooks": (lambda net: net.insert(5, RefusesHooks(6, 6, 1)), {"layers": "45"}, RuntimeError),
    "a hook raises": (with_hook(KeyError("hook")), {"layers": ["1", "4"]}, KeyError),
    "interrupted": (with_hook(KeyboardInterrupt()), {"layers": "4"}, KeyboardInterrupt),
    "NaN": (with_nan, {"layers": "6"}, ValueError),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_model_is_untouched_after_an_exception(case):
    prepare, call, error = FAILURES[case]
    net = peculiar()
    if prepare:
        prepare(net)
    layers = list(call["layers"]) if isinstance(call["layers"], str) else call["layers"]
    before = state(net)
    with pytest.raises(error):
        cc.capture(net, call.get("x", images(2)), layers, call.get("target"))
    assert state(net) == before


def test_the_model_is_untouched_by_all_that_looks_at_it():
    net, x = peculiar(), images(2)
    before = state(net)
    cc.capture(net, x, ["1", "6"], 1)
    cc.default_layers(net, x)
    cc.explain(net, x[0])
    cc.input_gradient(net, x, 0, guided=False)
    cc.probabilities(net, x)
    assert state(net) == before


def test_weights_that_are_computed_anew_in_every_pass():
    """torch.nn.utils.parametrize; the gradients are the same and the model stays as it was."""
    net, x = tiny(12), images(2)
    expected = cc.capture(net, x, "2", 0).gradients["2"]
    nn.utils.parametrizations.weight_norm(net[4])
    before = state(net)
    assert torch.allclose(cc.capture(net, x, "2", 0).gradients["2"], expected, atol=1e-6)
    assert state(net) == before


def test_training_goes_on_as_if_nothing_had_happened():
    """Three steps with and without captures in between end in the same weights, bit by bit."""
    ends = []
    for look in (False, True):
        net = tiny(13).train()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            net(images(4, seed=step)).square().sum().backward()
            if look:
                cc.capture(net, images(2, seed=9), ["1", "6"])
            optimiser.step()
            optimiser.zero_grad()
        ends.append(state(net)["tensors"])
    assert ends[0] == ends[1]


# ---- errors that test_properties.py does not draw


class Branches(nn.Module):
    """The output of `side` is thrown away, `unused` never runs, `twice` runs two times."""

    def __init__(self):
        super().__init__()
        self.main, self.side, self.unused = (nn.Conv2d(3, 4, 3) for _ in range(3))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        self.side(x)
        return self.head(self.pool(self.twice(self.twice(self.main(x)))).flatten(1))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("side", "depend on layer"),
        (["main", "side"], "depend on layer='side'"),
        ("unused", "layer='unused' did not run"),
        ("twice", "layer='twice' runs more than once"),
        ("pool", "layer='pool' has no spatial output"),  # one pixel is no map
        ("mian", "layer='mian'.*Nearest: main"),
    ],
)
def test_a_layer_without_a_map_is_refused_by_name(layers, says):
    net = Branches().train()
    before = state(net)
    with pytest.raises(ValueError, match=says):
        cc.capture(net, images(2), layers)
    assert state(net) == before


def test_a_model_made_under_inference_mode_is_refused():
    with torch.inference_mode():
        net = tiny()
    with pytest.raises(ValueError, match="inference_mode"):
        cc.capture(net, images(2), "6")


# ---- wrappers


def test_wrappers_are_taken_off_with_a_warning():
    net, x = tiny(14), images(2)
    expected = cc.capture(net, x, "6", 0).gradients["6"]
    for wrapped in (nn.DataParallel(net), torch.compile(nn.DataParallel(net), backend="eager")):
        with pytest.warns(UserWarning, match="is unwrapped"):
            captured = cc.capture(wrapped, x, "6", 0)
        assert torch.equal(captured.gradients["6"], expected)


# ---- memory


def bytes_saved(action) -> int:
    """Bytes of the tensors that autograd keeps for a backward pass, each storage once."""
    seen = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        action()
    return sum(seen.values())


def test_nothing_in_front_of_the_captured_layer_is_kept_for_backward():
    net = resnet18()
    x = images(2, (64, 64)).requires_grad_()
    kept = bytes_saved(lambda: cc.capture(net, x, "layer4", 0))
    ordinary = bytes_saved(lambda: net(x)[:, 0].sum().backward())
    behind = net.fc.weight.nbytes + 4 * 2 * 512 * 2 * 2  # the classifier and layer4's map
    assert 0 < kept <= behind + 4096 < ordinary / 50


class Convolutions(TorchDispatchMode):
    """Counts convolutions, forward, backward, and backward to their weights."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = self.to_weights = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.convolution.default:
            self.forward += 1
        if operation is torch.ops.aten.convolution_backward.default:
            self.backward += 1
            self.to_weights += any(
                args[-1][1:]
            )  # the mask of what is asked for: input, weight, bias
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layers", "behind"), [(["layer2", "layer4"], 10), (["layer4"], 0)])
def test_one_pass_forward_and_one_back_to_the_first_layer_and_to_no_weight(layers, behind):
    """This is what a capture costs: ResNet-18 has 20 convolutions, ten of them behind layer2."""
    net, x = resnet18().requires_grad_(), images(1, (64, 64))
    cc.capture(net, x, layers, 0)  # a network's first may look at it in passes of its own
    with Convolutions() as counted:
        cc.capture(net, x, layers, 0)
    assert (counted.forward, counted.backward, counted.to_weights) == (20, behind, 0)


def tensors_alive() -> int:
    gc.collect()
    return sum(type(o) is torch.Tensor for o in gc.get_objects())


def test_many_captures_leave_nothing_behind():
    net, x = tiny(), images(2)
    cc.capture(net, x, ["2", "6"])
    alive, before = tensors_alive(), state(net)
    for k in range(60):
        cc.capture(net, x, ["2", "6"], k % 4)
        if k % 20 == 0:
            with pytest.raises(ValueError, match="no spatial output"):
                cc.capture(net, x, ["2", "9"])
    assert tensors_alive() <= alive and state(net) == before


def test_a_capture_dies_with_its_last_reference():
    """No reference cycle: memory is free at once, without the garbage collector."""
    net, x = tiny(), images(2)
    gc.collect()
    gc.disable()
    try:
        captured = cc.capture(net, x, "4")
        try:
            cc.capture(net, x, ["4", "9"])
        except ValueError:
            pass
        tensors = (x, captured.activations["4"], captured.gradients["4"])
        references = [weakref.ref(t) for t in tensors]
        del x, captured, tensors
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
