"""capture: right numbers, clear errors, and the caller's model exactly as it was, whatever happens inside."""

from __future__ import annotations

import gc
import re
import resource
import sys
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import images, network, settle, state, tiny
from torch import nn

import cam_core as cc

# ------------------------------------------------------------------------------------------------------ right numbers


@pytest.mark.parametrize("layer", ["1", "2", "4", "6"])
@pytest.mark.parametrize("target", [0, 3])
def test_gradients_equal_finite_differences(layer, target):
    """Independent of autograd: nudge one number of the layer's output, see what the target logit does."""
    net, x = tiny(1, dtype=torch.float64), images(1, dtype=torch.float64)
    shot = cc.capture(net, x, layer, target)
    A, G = shot.activations[layer], shot.gradients[layer]
    draw, eps = np.random.default_rng(0), 1e-6
    behind = net[int(layer) + 1 :]
    for c, i, j in zip(*(draw.integers(n, size=25) for n in A.shape[1:]), strict=True):
        y = []
        for sign in (1, -1):
            nudged = A.clone()
            nudged[0, c, i, j] += sign * eps
            with torch.no_grad():
                y.append(float(behind(nudged)[0, target]))
        assert G[0, c, i, j] == pytest.approx((y[0] - y[1]) / (2 * eps), abs=1e-7)
    assert G.abs().max() > 1e-3  # or the comparison above would be of zeros


@pytest.mark.parametrize("layer", ["0", "1", "3", "4", "5"])
def test_activations_are_the_layers_own_output(layer):
    """Right behind 1 and 5 a ReLU works in place: what was captured must be what the layer put out."""
    net, x = tiny(2), images(3)
    with torch.no_grad():
        expected = net[: int(layer) + 1](x)
    shot = cc.capture(net, x, layer)
    assert torch.equal(shot.activations[layer], expected)
    if layer in ("0", "1", "4", "5"):
        assert (expected < 0).any()  # an in-place ReLU would have left its mark
    with torch.no_grad():
        assert torch.equal(shot.logits, net(x))


def test_gradient_in_front_of_an_in_place_relu_knows_the_relu():
    """d y / d(pre-ReLU) is zero where the ReLU is closed, and d y / d(post-ReLU) is not."""
    net, x = tiny(3), images(2)
    shot = cc.capture(net, x, ["5", "6"], 1)
    closed = shot.activations["5"] <= 0
    assert closed.any() and not shot.gradients["5"][closed].any() and shot.gradients["6"][closed].any()
    assert torch.equal(shot.gradients["5"][~closed], shot.gradients["6"][~closed])


def test_scores_are_logits_not_probabilities():
    """With softmax scores the gradients of a sure network vanish; those of logits scale with the classifier."""
    net, x = tiny(4), images(1)
    before = cc.capture(net, x, "4", 2).gradients["4"]
    net[11].weight.data *= 1000
    after = cc.capture(net, x, "4", 2)
    assert torch.allclose(after.gradients["4"], 1000 * before, rtol=1e-4)
    assert after.logits.softmax(1).amax() > 0.999


def test_several_layers_at_once_equal_each_alone_in_order_of_execution():
    net, x = network("resnet18"), images(2, (64, 64))
    names = ["layer4", "layer1", "layer3.0.bn1", "layer2"]
    together = cc.capture(net, x, names, 3)
    assert list(together.activations) == list(together.gradients) == ["layer1", "layer2", "layer3.0.bn1", "layer4"]
    for name in names:
        alone = cc.capture(net, x, name, 3)
        assert torch.equal(together.activations[name], alone.activations[name])
        assert torch.allclose(together.gradients[name], alone.gradients[name], rtol=1e-4, atol=1e-7)
        assert alone.gradients[name].abs().max() > 0


def test_container_and_its_last_child_share_an_output():
    net, x = network("resnet18"), images(1, (64, 64))
    shot = cc.capture(net, x, ["layer3", "layer3.1"], 0)
    assert torch.equal(shot.activations["layer3"], shot.activations["layer3.1"])
    assert torch.equal(shot.gradients["layer3"], shot.gradients["layer3.1"]) and shot.gradients["layer3"].any()


def test_a_repeated_name_counts_once_and_a_string_is_one_name():
    net, x = tiny(), images()
    assert list(cc.capture(net, x, ["4", "4"]).activations) == list(cc.capture(net, x, "4").activations) == ["4"]


@pytest.mark.parametrize("target", [None, 2, [3, 0, 1], (3, 0, 1), np.array([3, 0, 1]), torch.tensor([3, 0, 1])])
def test_batch_equals_one_by_one(target):
    net, x = tiny(5), images(3)
    shot = cc.capture(net, x, ["2", "6"], target)
    for b in range(3):
        one = target if target is None or isinstance(target, int) else int(target[b])
        alone = cc.capture(net, x[b : b + 1], ["2", "6"], one)
        assert alone.target[0] == shot.target[b]
        assert torch.allclose(alone.logits[0], shot.logits[b], atol=1e-6)
        for name in ("2", "6"):
            assert torch.allclose(alone.activations[name][0], shot.activations[name][b], atol=1e-6)
            assert torch.allclose(alone.gradients[name][0], shot.gradients[name][b], atol=1e-6)
    assert shot.target.tolist() == (
        shot.logits.argmax(1).tolist() if target is None else [2] * 3 if isinstance(target, int) else [3, 0, 1]
    )


def test_maps_of_two_targets_differ():
    net, x = tiny(6), images(1)
    a, b = (cc.capture(net, x, "6", t).gradients["6"] for t in (0, 1))
    assert a.any() and b.any() and not torch.allclose(a, b)


def test_negative_and_numpy_scalar_targets():
    net, x = tiny(), images(2)
    assert cc.capture(net, x, "6", np.int64(3)).target.tolist() == [3, 3]
    with pytest.raises(ValueError, match="out of range"):
        cc.capture(net, x, "6", -1)  # never the last class, as Python's indexing would have it


# -------------------------------------------------------------------------------------------- circumstances of a call


def test_what_is_handed_back_is_detached():
    shot = cc.capture(tiny(), images(), ["2", "6"])
    for t in (shot.logits, shot.target, *shot.activations.values(), *shot.gradients.values()):
        assert not t.requires_grad and t.grad_fn is None and not t.is_inference()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_without_autograd_around_it(guard):
    net, x = tiny(7), images(2)
    expected = cc.capture(net, x, ["2", "6"], 1)
    with guard():
        inside = images(2)  # under inference_mode this is a tensor that autograd refuses to save
        shots = [cc.capture(net, x, ["2", "6"], 1), cc.capture(net, inside, ["2", "6"], 1)]
        assert not torch.is_grad_enabled()
    for shot in shots:
        assert all(torch.equal(shot.gradients[n], expected.gradients[n]) for n in ("2", "6"))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_input_made_under_inference_mode_that_is_used_again_behind_the_layer():
    """Autograd has to save it then, which it refuses for an inference tensor."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x):
            return self.head((self.conv(x) * x[:, :1]).mean((2, 3)))

    net = Gated()
    expected = cc.capture(net, images(2), "conv", 1).gradients["conv"]
    with torch.inference_mode():
        inside = images(2)
        assert torch.equal(cc.capture(net, inside, "conv", 1).gradients["conv"], expected)


def test_target_made_under_inference_mode():
    """The natural thing to do: predict under inference_mode, then explain what was predicted."""
    net, x = tiny(7), images(2)
    with torch.inference_mode():
        target = net(x).argmax(1)
    assert torch.equal(cc.capture(net, x, "6", target).gradients["6"], cc.capture(net, x, "6").gradients["6"])


def test_callers_input_is_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = images(2).requires_grad_()
    before = x.detach().clone()
    cc.capture(net, x, "0")
    assert torch.equal(x, before) and x.grad is None and x.requires_grad


def test_callers_input_is_left_alone_by_a_network_that_works_in_place():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = images(1)
    before = x.clone()
    cc.capture(net, x, "1")
    assert torch.equal(x, before), "two captures of the same x would explain two different images"


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_change_nothing(frozen):
    net, x = tiny(8), images(2)
    expected = cc.capture(net, x, "4", 0)
    shot = cc.capture(net.requires_grad_(not frozen), x, "4", 0)
    assert torch.equal(shot.gradients["4"], expected.gradients["4"])


def test_model_in_train_mode_is_explained_in_eval_mode():
    net, x = tiny(9), images(4)
    expected = cc.capture(net, x, "6", 0)
    shot = cc.capture(net.train(), x, "6", 0)
    assert torch.equal(shot.logits, expected.logits) and torch.equal(shot.gradients["6"], expected.gradients["6"])


def test_dropout_does_not_act():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout2d(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)
    ).train()
    first, second = (cc.capture(net, images(2), "0", 1).gradients["0"] for _ in range(2))
    assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net, x = tiny(10, dtype=dtype), images(2, dtype=dtype)
    shot = cc.capture(net, x, ["2", "6"], 1)
    assert shot.activations["6"].dtype == shot.gradients["6"].dtype == dtype
    single = cc.capture(tiny(10), images(2), ["2", "6"], 1)
    a, b = (cc.grad_cam(s.activations["6"], s.gradients["6"]) for s in (shot, single))
    assert a.dtype == torch.float32  # CAM arithmetic is done in single precision, whatever the network's is
    assert b.amax() > 0 and torch.allclose(cc.normalise(a), cc.normalise(b), atol=0.05)


def test_under_autocast():
    net, x = tiny(10), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        shot = cc.capture(net, x, "6", 1)
    expected = cc.capture(net, x, "6", 1)
    assert torch.allclose(shot.gradients["6"].float(), expected.gradients["6"], atol=0.02)


def test_output_object_with_logits():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny(11)

        def forward(self, x):
            return types.SimpleNamespace(logits=self.net(x))

    shot = cc.capture(Wrapped(), images(2), "net.6", 0)
    assert torch.equal(shot.gradients["net.6"], cc.capture(tiny(11), images(2), "6", 0).gradients["6"])


def test_parametrised_weights():
    """torch.nn.utils.parametrize computes a weight anew in every pass; the captured gradients are the same."""
    net, x = tiny(12), images(2)
    expected = cc.capture(net, x, "2", 0).gradients["2"]
    nn.utils.parametrizations.weight_norm(net[4])
    before = state(net)
    assert torch.allclose(cc.capture(net, x, "2", 0).gradients["2"], expected, atol=1e-6)
    assert state(net) == before


# ------------------------------------------------------------------------------------ the model afterwards: untouched


def peculiar(seed: int = 0) -> nn.Sequential:
    """A model in a state nobody would tidy up: mixed modes, mixed flags, kept gradients, a hook of the user's own."""
    net = tiny(seed)
    net(images(2)).sum().backward()  # leaves .grad
    net[9].weight.grad = None
    for part, mode in ((net, True), (net[1], False), (net[5], True), (net[9], False)):
        part.training = mode
    net[0].weight.requires_grad_(False)
    net[11].bias.requires_grad_(False)
    net[3].register_forward_hook(lambda module, args, output: None)
    net[4].register_full_backward_pre_hook(lambda module, grad: None)
    return net


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken on purpose")


def _bad_calls() -> dict:
    def broken_forward(net):
        net.insert(8, Breaks())
        return net, dict(layers="6")

    def user_hook_raises(net):
        def hook(module, args, output):
            raise KeyError("hook")

        net[6].register_forward_hook(hook)
        return net, dict(layers=["1", "4"])

    def nan_weights(net):
        net[11].weight.data[0, 0] = float("nan")
        return net, dict(layers="6")

    def interrupted(net):
        def hook(module, args, output):
            raise KeyboardInterrupt

        net[6].register_forward_hook(hook)
        return net, dict(layers="4")

    return {
        "unknown layer": (lambda net: (net, dict(layers=["4", "nonsense"])), ValueError),
        "target out of range": (lambda net: (net, dict(layers="4", target=99)), ValueError),
        "target of wrong type": (lambda net: (net, dict(layers="4", target=1.5)), ValueError),
        "no spatial output": (lambda net: (net, dict(layers=["4", "9"])), ValueError),
        "wrong input": (lambda net: (net, dict(layers="4", x=torch.randn(2, 7, 12, 10))), ValueError),
        "forward raises": (broken_forward, RuntimeError),
        "a hook raises": (user_hook_raises, KeyError),
        "interrupted": (interrupted, KeyboardInterrupt),
        "logits are NaN": (nan_weights, ValueError),
    }


@pytest.mark.parametrize("layers", [["4"], ["1", "6"]])
def test_model_untouched_after_success(layers):
    net = peculiar()
    before = state(net)
    cc.capture(net, images(2), layers, 1)
    assert state(net) == before


@pytest.mark.parametrize("case", list(_bad_calls()))
def test_model_untouched_after_an_exception(case):
    prepare, error = _bad_calls()[case]
    net, call = prepare(peculiar())
    before = state(net)
    with pytest.raises(error):
        cc.capture(net, call.pop("x", images(2)), **call)
    assert state(net) == before


def test_model_untouched_when_the_score_does_not_depend_on_the_layer():
    net = SideBranch().train()
    before = state(net)
    with pytest.raises(ValueError, match="depend on layer"):
        cc.capture(net, images(2), "side")
    assert state(net) == before


def test_model_untouched_by_default_layers():
    net = peculiar()
    before = state(net)
    cc.default_layers(net, images(2))
    assert state(net) == before
    net.insert(8, Breaks())
    before = state(net)
    with pytest.raises(RuntimeError, match="on purpose"):
        cc.default_layers(net, images(2))
    assert state(net) == before


def test_no_hook_stays_when_a_layer_refuses_hooks():
    """As a scripted submodule (torch.jit.script) does: those already placed on other layers have to go."""

    class Refuses(nn.Conv2d):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Refuses(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = state(net)
    with pytest.raises(RuntimeError, match="no hooks"):
        cc.capture(net, images(1), ["0", "1"])
    assert state(net) == before


def test_training_goes_on_as_if_nothing_had_happened():
    """Two optimiser steps with and without a capture in between end in the same weights, bit by bit."""
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


# ------------------------------------------------------------------------------------------------------------- errors


class SideBranch(nn.Module):
    """`side` runs but its output is thrown away, `unused` never runs, `twice` runs two times, `pair` returns two."""

    def __init__(self):
        super().__init__()
        self.main, self.side, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.twice, self.pair = nn.Conv2d(4, 4, 3, padding=1), Pair()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        self.side(x)
        y, _ = self.pair(self.twice(self.twice(self.main(x))))
        return self.head(y.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("side", "does not depend|do not depend"),
        (["main", "side"], "does not depend on layer='side'"),
        ("unused", "layer='unused' did not run"),
        ("twice", "layer='twice' runs more than once"),
        ("pair", "layer='pair' has no spatial output: got tuple"),
        ("head", r"layer='head' has no spatial output: got \(2, 3\)"),
        ("mian", "Nearest: main"),
        ("", "layer='' is not in this SideBranch"),
        ([], "layers is empty"),
    ],
)
def test_layer_errors_say_what_is_wrong(layers, says):
    with pytest.raises(ValueError, match=says):
        cc.capture(SideBranch(), images(2), layers)


@pytest.mark.parametrize("layers", [lambda net: net.main, lambda net: [net.main], lambda net: None])
def test_layers_given_as_modules_are_refused_clearly(layers):
    """captum and pytorch-grad-cam take the module itself, so people will try."""
    net = SideBranch()
    with pytest.raises(ValueError, match="layer"):
        cc.capture(net, images(2), layers(net))


def test_a_one_pixel_map_is_no_map():
    with pytest.raises(ValueError, match="h\\*w > 1"):
        cc.capture(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten()), images(1), "1")


@pytest.mark.parametrize(
    "target", [4, -1, 1.0, True, [0], [0, 1, 2], [[0, 1]], [0, 9], "cat", [0, None], {"a": 1}, [0.5, 1.5]]
)
def test_target_errors(target):
    with pytest.raises(ValueError, match="target"):
        cc.capture(tiny(classes=4), images(2), "6", target)


@pytest.mark.parametrize(
    "x",
    [
        images(2)[0],
        images(2)[:0],
        images(2).byte(),
        images(2).long(),
        images(2).numpy(),
        images(2)[None],
        None,
    ],
    ids=["3-D", "empty", "uint8", "int64", "numpy", "5-D", "None"],
)
def test_input_errors(x):
    with pytest.raises(ValueError, match="x must be a float tensor"):
        cc.capture(tiny(), x, "6")


def test_a_wrong_device_is_named():
    with pytest.raises(ValueError, match="x is on meta and the model on cpu"):
        cc.capture(tiny(), images(2).to("meta"), "6")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    x = images(2)
    x[1, 0, 3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        cc.capture(tiny(), x, "6")


@pytest.mark.parametrize(
    ("output", "says"),
    [(lambda y: (y, y), "tuple"), (lambda y: y[:, :, None], r"\(2, 4, 1\)"), (lambda y: {"out": y}, "dict")],
)
def test_output_that_is_no_logits(output, says):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny()

        def forward(self, x):
            return output(self.net(x))

    with pytest.raises(ValueError, match=f"output must be logits.*{says}"):
        cc.capture(Odd(), images(2), "net.6")


def test_model_made_under_inference_mode():
    with torch.inference_mode():
        net = tiny()
    with pytest.raises(ValueError, match="created under torch.inference_mode"):
        cc.capture(net, images(2), "6")


# ----------------------------------------------------------------------------------------------------------- wrappers


def test_data_parallel_is_unwrapped_and_says_so():
    net, x = tiny(14), images(2)
    with pytest.warns(UserWarning, match="DataParallel is unwrapped") as caught:
        shot = cc.capture(nn.DataParallel(net), x, "6", 0)
    assert torch.equal(shot.gradients["6"], cc.capture(net, x, "6", 0).gradients["6"])
    assert caught[0].filename == __file__  # the warning points at the caller's line, not into cam_core


def test_compiled_model_is_unwrapped_without_compiling():
    net, x = tiny(14), images(2)
    before = torch._dynamo.utils.counters["stats"].copy()
    with pytest.warns(UserWarning, match="OptimizedModule is unwrapped"):
        shot = cc.capture(torch.compile(net), x, "6", 0)
    assert torch.equal(shot.gradients["6"], cc.capture(net, x, "6", 0).gradients["6"])
    assert torch._dynamo.utils.counters["stats"] == before


def test_nested_wrappers_and_plain_models():
    net, x = tiny(14), images(1)
    for model, times in ((torch.compile(nn.DataParallel(net)), 2), (net, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cc.capture(model, x, "6")
        assert sum("is unwrapped" in str(w.message) for w in caught) == times


# ------------------------------------------------------------------------------------------------------------- memory


def _saved_bytes(action) -> int:
    seen: dict[int, int] = {}

    def pack(t):
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        action()
    return sum(seen.values())


def test_nothing_is_kept_for_backward_in_front_of_the_captured_layer():
    net, x = network("resnet18"), images(2, (96, 96)).requires_grad_()  # not even for the input's sake
    deep = _saved_bytes(lambda: cc.capture(net, x, "layer4", 0))
    shallow = _saved_bytes(lambda: cc.capture(net, x, "layer3", 0))
    net.requires_grad_(True)
    ordinary = _saved_bytes(lambda: net(x)[:, 0].sum().backward())
    head = net.fc.weight.numel() * 4 + 2 * 512 * 3 * 3 * 4  # classifier and layer4's map: all that lies behind layer4
    assert 0 < deep <= head + 4096, (deep, head)
    assert deep < shallow / 50 < ordinary / 50


def test_parameters_get_no_gradient_even_for_a_moment():
    """A frozen graph is cheaper; a tensor hook on a parameter would see a gradient pass."""
    net, passed = tiny(), []
    for p in net.parameters():
        p.requires_grad_(True).register_hook(passed.append)
    cc.capture(net, images(2), "0")
    assert not passed


def _tensors() -> int:
    gc.collect()
    return sum(type(o) is torch.Tensor for o in gc.get_objects())


def test_thousand_captures_leave_nothing_behind():
    net, x = tiny(), images(2)
    for _ in range(20):  # caches of torch fill up first
        cc.capture(net, x, ["2", "6"])
    before, tensors, hooks = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _tensors(), state(net)
    for k in range(1000):
        shot = cc.capture(net, x, ["2", "6"], k % 4)
        if k % 50 == 0:
            with pytest.raises(ValueError, match="no spatial output"):
                cc.capture(net, x, ["2", "9"])
    del shot
    assert state(net) == hooks and _tensors() <= tensors
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 8e6, f"{grown} bytes for 1,000 captures"


@pytest.mark.parametrize("fails", [False, True])
def test_input_and_capture_die_with_their_last_reference(fails):
    """No reference cycle: freed at once, without the garbage collector, which matters for memory on a GPU."""
    net, x = tiny(), images(2)
    gc.collect()
    gc.disable()
    try:
        if fails:
            try:
                cc.capture(net, x, ["4", "9"])
            except ValueError:
                pass
            refs = [weakref.ref(x)]
        else:
            shot = cc.capture(net, x, "4")
            refs = [weakref.ref(x), weakref.ref(shot.activations["4"]), weakref.ref(shot.gradients["4"])]
            del shot
        del x
        assert [r() for r in refs] == [None] * len(refs)
    finally:
        gc.enable()


# ----------------------------------------------------------------------------------------------------- default_layers


@pytest.mark.parametrize(
    ("arch", "size", "deep", "shallow", "grids"),
    [
        ("resnet18", 128, "layer4", "layer2", (4, 16)),
        ("vgg11", 128, "features.19", "features.9", (8, 32)),
        ("alexnet", 224, "features.11", "features.1", (13, 55)),
        ("squeezenet1_1", 128, "features", "features.4", (7, 31)),
        ("mobilenet_v2", 128, "features", "features.7.conv.0", (4, 16)),
        ("densenet121", 128, "features", "features.transition2.conv", (4, 16)),
        ("googlenet", 128, "inception5b", "inception3b", (4, 16)),
        ("inception_v3", 139, "Mixed_7c", "Mixed_5d", (3, 15)),
        ("efficientnet_b0", 128, "features", "features.4.0.block.0", (4, 16)),
        ("shufflenet_v2_x0_5", 128, "conv5", "stage2", (4, 16)),
        ("mnasnet0_5", 128, "layers", "layers.10.0.layers.2", (4, 16)),
        ("regnet_x_400mf", 128, "trunk_output", "trunk_output.block2", (4, 16)),
        ("convnext_tiny", 128, "features", "features.4.0", (4, 16)),
    ],
)
def test_default_layers_of_torchvision(arch, size, deep, shallow, grids):
    """deep = the last map in front of the pooling, shallow = the last one about four times finer; both capturable."""
    net, x = network(arch).train(), images(1, (size, size))
    before = state(net, tensors=False)
    assert cc.default_layers(net, x) == (deep, shallow)
    assert state(net, tensors=False) == before
    found = [deep, shallow]
    shot = cc.capture(net, x, found, 0)
    assert tuple(shot.activations[n].shape[2] for n in found) == grids
    assert all(shot.gradients[n].any() for n in found)


def test_default_layers_are_maps_of_the_image():
    """Swin's blocks put out (B, h, w, C): read as (B, C, h, w) that is a map of 28 x 192 for a square image."""
    net, x = network("swin_t"), images(1, (112, 112))
    shot = cc.capture(net, x, cc.default_layers(net, x), 0)
    assert all(a.shape[2] == a.shape[3] for a in shot.activations.values())


class Functional(nn.Module):
    """ReLU and pooling as functions: no module of their own."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), Block()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(F.relu(self.body(x)), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1))


class Block(nn.Module):
    """A residual block: its branch is not what everything passes through."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(x)))


def test_default_layers_with_functional_relu_and_pooling():
    assert cc.default_layers(Functional(), images(1, (32, 32))) == ("last", "stem")


def test_default_layers_of_a_model_with_one_resolution():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    assert cc.default_layers(net, images(1)) == ("3", "3")


def test_default_layers_of_a_model_without_maps():
    with pytest.raises(ValueError, match="Sequential has no layer with a spatial output"):
        cc.default_layers(nn.Sequential(nn.Flatten(), nn.Linear(360, 4)), images(1))


def test_default_layers_of_a_network_that_works_in_place_on_its_input():
    net = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    x = images(1)
    before = x.clone()
    assert cc.default_layers(net, x)[0] == "2"
    assert torch.equal(x, before)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_default_layers_without_autograd_and_in_a_wrapper(guard):
    net = network("resnet18")
    with guard(), pytest.warns(UserWarning, match="unwrapped"):
        assert cc.default_layers(nn.DataParallel(net), images(2, (64, 64))) == ("layer4", "layer2")


def test_default_layers_skips_what_runs_twice_and_branches():
    """ResNet's `relu` runs twice in a block and `bn2` is one branch of it: neither may be chosen."""
    found = cc.default_layers(network("resnet18"), images(1, (96, 96)))
    assert not any(re.search(r"relu|bn|conv|downsample", name) for name in found)


class SharedRelu(nn.Module):
    """The usual shorthand: one ReLU module for the whole network."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))


def test_default_layers_can_be_captured_where_one_relu_serves_all():
    net, x = SharedRelu(), images(1)
    found = cc.default_layers(net, x)
    assert found == ("b", "b") and cc.capture(net, x, found).gradients["b"].any()


def test_resolve_layers_keeps_names_and_fills_in_auto():
    net, x = network("resnet18"), images(1, (64, 64))
    assert cc.resolve_layers(net, x) == ("layer4", "layer2")
    assert cc.resolve_layers(net, x, "layer3") == ("layer3", "layer2")
    assert cc.resolve_layers(net, x, "auto", "layer1") == ("layer4", "layer1")
    assert cc.resolve_layers(net, x, "a", "b") == ("a", "b")  # capture says what is wrong with a name


def test_shared_module_has_one_name():
    """One module under two names runs twice; and settle() keeps the statistics of every batch norm off the default."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    net = settle(nn.Sequential(conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 0)
    with pytest.raises(ValueError, match="runs more than once"):
        cc.capture(net, images(1), "0")
