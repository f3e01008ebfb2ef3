"""Properties over drawn input: real captures on small networks, and the pure functions behind them.

What goes in is drawn: networks, shapes, types, layouts of memory, NaN and infinity, calls that are
wrong. What comes out is right in form, with the network left as it was, or a ValueError that names
what was wrong. A short profile runs with the other tests; the long one is

    HYPOTHESIS_PROFILE=long pytest tests/test_properties.py --hypothesis-show-statistics
"""

from __future__ import annotations

import contextlib
import math
import types
import warnings
from fractions import Fraction
from numbers import Real

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from nets import LAYOUTS, Small, images, laid_out, state
from torch import nn

import cam_core as cc

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}
NOT_FINITE = (math.nan, math.inf, -math.inf)
GUARDS = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
RULES = sorted(cc.FUSIONS)


def in_an_object(logits):
    return types.SimpleNamespace(logits=logits, loss=None)


NOTHING = st.none()


@st.composite
def networks(draw, answers=(None, in_an_object), dtypes=DTYPES, extra=NOTHING) -> Small:
    """A network in any state that a caller may have left it in."""
    net = Small(
        seed=draw(st.integers(0, 2**16)),
        classes=draw(st.integers(1, 5)),
        in_place=draw(st.booleans()),
        reused=draw(st.booleans()),
        norm=draw(st.booleans()),
        kind=draw(st.sampled_from(("maps", "tokens", "last"))),
        answer=draw(st.sampled_from(answers)),
        extra=draw(extra),
    ).to(draw(st.sampled_from(dtypes)))
    training, frozen, grads = (draw(st.integers(0, 2**20 - 1)) for _ in range(3))  # a bit for each
    for k, module in enumerate(net.modules()):
        module.training = bool(training >> k & 1)
    for k, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, 0.5) if grads >> k & 1 else None
        p.requires_grad_(not frozen >> k & 1)
    return net


def classes_of(net: Small) -> int:
    """One output is the logit of the second of two classes."""
    return max(2, net.head.out_features)


@st.composite
def inputs(draw, net: nn.Module, most=4) -> torch.Tensor:
    """Images for a network, in its type and in any layout; constant ones among them."""
    count = draw(st.integers(1, most))
    height, width = draw(st.integers(4, 9)), draw(st.integers(4, 9))
    x = images(count, (height, width), draw(st.integers(0, 99)), dtype=net.head.weight.dtype)
    x = draw(st.sampled_from((0.0, 1.0, 30.0))) * x + draw(st.sampled_from((0.0, 1.0)))
    return laid_out(x, draw(st.sampled_from(LAYOUTS))).requires_grad_(draw(st.booleans()))


@st.composite
def targets(draw, count: int, classes: int):
    """None, or a class for all images or for each, as a number of Python, NumPy or torch."""
    several = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    one = several[0]
    kinds = [None, one, np.int64(one), torch.tensor(one), np.uint8(one), several, tuple(several)]
    kinds += [np.array(several, np.int32), torch.tensor(several), torch.tensor(several).byte()]
    return draw(st.sampled_from(kinds))


def refused(call, *names: str) -> str:
    """The message of the ValueError, and no other error, in which a call ends; it holds a name."""
    with pytest.raises(ValueError) as caught:
        call()
    assert caught.type is ValueError, repr(caught.value)
    message = str(caught.value)
    assert any(name in message for name in names), message
    return message


def is_normalised(m: torch.Tensor, *shape: int) -> bool:
    """Finite, in [0, 1], and each map zero or with the maximum 1."""
    in_range = bool(m.isfinite().all() and (m >= 0).all() and (m <= 1).all())
    return m.shape == shape and in_range and all(p in (0, 1) for p in m.amax((1, 2)).tolist())


# ---- real captures


@given(st.data())
def test_captures_and_maps_of_any_network(data):
    net = data.draw(networks())
    x = data.draw(inputs(net))
    there = net.layers(*x.shape[2:])
    some = st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=3, unique=True)
    names = data.draw(some)
    target = data.draw(targets(len(x), classes_of(net)))
    guard = data.draw(st.sampled_from(sorted(GUARDS)))
    event(f"{net.kind}, {str(x.dtype)[6:]}, {guard}")
    before, pixels = state(net), x.detach().clone()
    with GUARDS[guard]():
        given_x = x.clone() if data.draw(st.booleans()) else x  # autograd may refuse the clone
        captured = cc.capture(net, given_x, names, target)
    assert state(net) == before and torch.equal(x.detach(), pixels) and x.grad is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    assert list(captured.activations) == [name for name in there if name in names]
    for name in names:
        A, G = captured.activations[name], captured.gradients[name]
        assert A.shape == G.shape == (len(x), *there[name]) and A.dtype == G.dtype == x.dtype
        assert not (A.requires_grad or G.requires_grad or A.is_inference() or G.is_inference())
    logits = captured.logits
    assert logits.shape == (len(x), net.head.out_features) and not logits.requires_grad
    likeliest = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    expected = likeliest if target is None else torch.as_tensor(target).expand(len(x)).long()
    assert torch.equal(captured.target, expected) and captured.target.dtype == torch.int64

    A, G = captured.activations[names[0]], captured.gradients[names[0]]
    maps = [cam(A, G) for cam in cc.CAMS.values()]
    assert all(m.dtype == torch.float32 and m.isfinite().all() and (m >= 0).all() for m in maps)
    size = tuple(x.shape[2:])
    alpha, rule = data.draw(st.floats(0, 1)), data.draw(st.sampled_from(RULES))
    fused = cc.hybrid(maps[0], maps[1], alpha, size, rule)
    assert is_normalised(fused, len(x), *size)


@given(st.data())
def test_permuting_the_batch_permutes_the_maps(data):
    net = data.draw(networks())
    x = data.draw(inputs(net))
    order = data.draw(st.permutations(range(len(x))))
    name = data.draw(st.sampled_from(sorted(net.layers(*x.shape[2:]))))
    one = st.integers(0, classes_of(net) - 1)
    target = data.draw(st.lists(one, min_size=len(x), max_size=len(x)))
    first = cc.capture(net, x, name, target)
    second = cc.capture(net, x[order], name, [target[k] for k in order])
    assert close(second.logits, first.logits[order])
    assert close(second.activations[name], first.activations[name][order])
    assert close(second.gradients[name], first.gradients[name][order])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    share = CLOSE[a.dtype]
    return torch.allclose(a.float(), b.float(), rtol=share, atol=share * float(b.abs().max()))


@given(st.data())
def test_layers_that_are_found_can_be_captured(data):
    net = data.draw(networks())
    x = data.draw(inputs(net, most=2))
    before = state(net)
    shapes, (deep, shallow) = cc.layer_shapes(net, x), cc.default_layers(net, x)
    assert shapes == net.layers(*x.shape[2:])
    assert {deep, shallow} <= set(cc.stages(net, x)) <= set(shapes)
    for name, A in cc.capture(net, x, [deep, shallow]).activations.items():
        assert A.shape[1:] == shapes[name]
    found = cc.explain(net, x[0], method=data.draw(st.sampled_from(["hybrid", *cc.CAMS])))
    assert is_normalised(torch.from_numpy(found.cam)[None], 1, *x.shape[2:])
    assert found.layer == deep and 0 <= found.probability <= 1
    assert 0 <= found.target < classes_of(net)
    assert state(net) == before


@given(st.data())
def test_gradients_of_the_pixels(data):
    net = data.draw(networks())
    x, guided = data.draw(inputs(net)), data.draw(st.booleans())
    target, before = data.draw(targets(len(x), classes_of(net))), state(net)
    with GUARDS[data.draw(st.sampled_from(sorted(GUARDS)))]():
        found = cc.input_gradient(net, x, target, guided)
    assert found.shape == x.shape and found.dtype == torch.float32 and found.isfinite().all()
    assert state(net) == before and x.grad is None


# ---- NaN and infinity


class Plant(nn.Module):
    """Puts a value into one place of one image's activations; `hide` is what runs behind it."""

    def __init__(self, value, image, place, hide):
        super().__init__()
        self.value, self.image, self.place, self.hide = value, image, place, hide
        self.here = nn.Identity()

    def forward(self, y):
        y = y.clone()
        place = np.unravel_index(self.place % y[0].numel(), y.shape[1:])
        y[(self.image, *place)] = self.value
        return self.hide(self.here(y))


HIDE = {
    "nothing": lambda y: y,
    "relu": lambda y: y.relu(),
    "where": lambda y: torch.where(y.abs() < 1e4, y, 0),
    "nan_to_num": lambda y: y.nan_to_num(0, 0, 0),
    "reciprocal": lambda y: 1 / (1 + y.abs()),
}


@given(st.data(), st.sampled_from(NOT_FINITE), st.sampled_from(sorted(HIDE)), st.integers(0, 200))
def test_nan_in_activations_is_reported_even_if_the_logits_hide_it(data, value, hide, place):
    net = data.draw(networks(dtypes=(torch.float32, torch.bfloat16)))
    x = data.draw(inputs(net))
    image = data.draw(st.integers(0, len(x) - 1))
    net.extra = Plant(value, image, place, HIDE[hide])
    before = state(net)
    message = refused(lambda: cc.capture(net, x, "extra.here"), "NaN or infinity")
    event("hidden from the logits" if "extra.here" in message else "seen in the logits")
    assert f"[{image}]" in message
    with contextlib.suppress(ValueError):  # a layer behind it: reported, or nothing is left of it
        captured = cc.capture(net, x, "body", 0)
        assert captured.logits.isfinite().all() and captured.gradients["body"].isfinite().all()
    assert state(net) == before


class Steep(nn.Module):
    """sqrt, whose slope at 0 is infinite: gradients in front of it may not be finite."""

    def forward(self, y):
        return y.abs().sqrt()


@given(st.data())
def test_gradients_that_are_not_finite_are_reported(data):
    net = data.draw(networks(dtypes=(torch.float32, torch.float64), extra=st.just(Steep())))
    x = data.draw(inputs(net))
    before = state(net)
    name = "stem" if net.second is None else "first"
    try:
        assert cc.capture(net, x, name, 0).gradients[name].isfinite().all()
    except ValueError as error:
        event("refused")
        assert f"gradients of layer={name!r}" in str(error)
    assert state(net) == before


@given(st.data(), st.sampled_from(NOT_FINITE), st.integers(0, 10_000))
def test_pixels_and_weights_that_are_not_finite(data, value, place):
    """Where they come through they are reported; else nothing of them is in what is handed back."""
    net = data.draw(networks(dtypes=(torch.float32, torch.bfloat16)))
    x = data.draw(inputs(net)).detach().contiguous()
    parameters = dict(net.named_parameters())
    where = data.draw(st.sampled_from(["x", *parameters]))
    tensor = x if where == "x" else parameters[where].data
    tensor.view(-1)[place % tensor.numel()] = value
    before = state(net)
    name = data.draw(st.sampled_from(sorted(net.layers(*x.shape[2:]))))
    try:
        captured = cc.capture(net, x, name)
        for t in (captured.logits, captured.activations[name], captured.gradients[name]):
            assert t.isfinite().all()
    except ValueError as error:
        event("reported")
        assert "NaN or infinity" in str(error)
    assert state(net) == before


@given(st.data())
def test_logits_that_are_not_finite_are_no_probability(data):
    """Comparisons hide NaN (NaN > 0.5 is false), so what measures faithfulness refuses it."""
    net = data.draw(networks(dtypes=(torch.float32,)))
    x = data.draw(inputs(net)).detach().contiguous()
    net.head.bias.data[data.draw(st.integers(0, net.head.out_features - 1))] = math.nan
    ids, target = [str(k) for k in range(len(x))], torch.zeros(len(x), dtype=torch.long)
    maps = cc.normalise(images(len(x), x.shape[2:], 1).abs().amax(1))
    ranks = cc.pixel_rank(maps, ids)[:, None]
    refused(lambda: cc.perturbation_curves(net, 0 * x, x, ranks, target, 3), "NaN")
    clean = np.full(len(x), 0.5)
    refused(lambda: cc.confidence_change(net, x, maps, target, clean), "NaN")


# ---- calls that are wrong

SCALARS = (True, None, "x", "", b"1", 1.5, math.nan, math.inf, 2 + 1j, object(), np.float32(1.5))
SCALARS += (np.datetime64(0, "s"), Fraction(3, 2), Ellipsis, int, lambda: 0)
words = st.text("abody.1é ", max_size=8)
wrong_items = st.lists(st.sampled_from((None, "a", 0.5, (), [1])), min_size=1, max_size=3)
junk = st.sampled_from(SCALARS) | wrong_items | st.just({}) | st.just({"a": 1})


@st.composite
def no_images(draw, net: nn.Module):
    """What is no batch of images for this network."""
    good = images(2, (6, 5), dtype=net.head.weight.dtype)
    other = [d for d in (*DTYPES, torch.float8_e5m2) if d != good.dtype]
    other += [torch.uint8, torch.int64, torch.bool, torch.complex64]
    shapes = st.lists(st.integers(0, 3), max_size=6).filter(lambda s: len(s) != 4 or 0 in s)
    channels = st.integers(1, 9).filter(lambda c: c != 3)
    return draw(
        junk
        | shapes.map(torch.zeros)
        | st.sampled_from(other).map(good.to)
        | channels.map(lambda c: torch.ones(1, c, 6, 6, dtype=good.dtype))
        | st.sampled_from((good.tolist(), good[0], good.to_sparse(), good.to("meta")))
    )


@given(st.data())
def test_an_input_that_is_no_batch_of_images(data):
    net = data.draw(networks())
    x, before = data.draw(no_images(net)), state(net)
    for call in (
        lambda: cc.capture(net, x, data.draw(st.sampled_from(("body", "nonsense")))),
        lambda: cc.input_gradient(net, x),
        lambda: cc.default_layers(net, x),
    ):
        refused(call, "x must", "x=", "x is")
    assert state(net) == before


@given(st.data())
def test_a_target_that_is_none(data):
    net = data.draw(networks())
    x = data.draw(inputs(net))
    count, classes, before = len(x), classes_of(net), state(net)
    outside = st.integers(-(2**66), -1) | st.integers(classes, 2**66)
    right = st.lists(st.integers(0, classes - 1), max_size=6)
    wrong_count = right.filter(lambda t: len(t) != count)
    wrong_tensors = (
        torch.zeros(count),
        torch.zeros(count) > 0,
        torch.zeros(count, 1).long(),
        torch.zeros(count).long().to_sparse(),
        torch.zeros(count, device="meta").long(),
    )
    target = data.draw(
        junk.filter(lambda t: t is not None)
        | outside
        | wrong_count
        | wrong_count.map(np.array)
        | outside.map(lambda k: [0] * (count - 1) + [k])
        | st.sampled_from(wrong_tensors)
    )
    message = refused(lambda: cc.capture(net, x, "body", target), "target")
    assert repr(target) in message or f"{len(target)} entries for {count} images" in message
    refused(lambda: cc.input_gradient(net, x, target), "target")
    assert state(net) == before


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


class Odd(nn.Module):
    """A module that is no map in itself: its part `inner` puts out truth values, or two maps."""

    def __init__(self, two):
        super().__init__()
        self.two = two
        self.inner = Applied(lambda y: (y, -y) if two else y > 0)

    def forward(self, y):
        return self.inner(y)[0] if self.two else y * self.inner(y)


@given(st.data())
def test_a_layer_without_a_map(data):
    net = data.draw(networks(extra=st.sampled_from((None, Odd(False), Odd(True)))))
    x = data.draw(inputs(net))
    there, modules = net.layers(*x.shape[2:]), dict(net.named_modules())
    candidates = ("head", "first", "extra.inner")
    no_maps = st.sampled_from([n for n in candidates if n in modules and n not in there])
    unknown = words.filter(lambda n: n not in modules or not n)
    layers = data.draw(
        no_maps
        | no_maps.map(lambda n: ["body", n])
        | unknown
        | unknown.map(lambda n: [n, "stem"])
        | st.sampled_from(([], net.body, [net.body], {"body"}))
        | junk.filter(lambda v: not isinstance(v, str))
    )
    before = state(net)
    message = refused(lambda: cc.capture(net, x, layers), "layer")
    if isinstance(layers, str):
        assert repr(layers) in message
    assert state(net) == before


ANSWERS = {
    "an object without": lambda y: types.SimpleNamespace(logits=None, loss=y.sum()),
    "maps": lambda y: y[:, :, None, None].expand(-1, -1, 2, 3),
    "text": lambda y: "a label",
    "no class": lambda y: y[:, :0],
    "other batch": lambda y: torch.cat([y, y]),
    "integers": lambda y: y.long(),
}


@given(st.data(), st.sampled_from(sorted(ANSWERS)))
def test_answers_that_are_no_logits(data, kind):
    net = data.draw(networks(answers=(ANSWERS[kind],)))
    x = data.draw(inputs(net)).detach()
    before = state(net)
    for call in (
        lambda: cc.capture(net, x, "body"),
        lambda: cc.input_gradient(net, x),
        lambda: cc.probabilities(net, x),
        lambda: cc.default_layers(net, x),
    ):
        refused(call, "must hold logits")
    assert state(net) == before


@given(junk)
def test_what_is_no_model(model):
    x = images(1, (6, 6))
    for call in (
        lambda: cc.capture(model, x, "body"),
        lambda: cc.input_gradient(model, x),
        lambda: cc.stages(model, x),
        lambda: cc.explain(model, x),
    ):
        assert repr(model) in refused(call, "model=")


@given(st.data())
def test_wrong_arguments_of_explain(data):
    net = data.draw(networks())
    x = images(1, (6, 6), dtype=net.head.weight.dtype)
    not_text = junk.filter(lambda v: v is not None and not isinstance(v, str)) | st.just(net.body)
    outside = st.floats(1, exclude_min=True) | st.floats(-9, 0, exclude_max=True)
    wrong = {
        "method": not_text | st.sampled_from(("", "gradcam", None)),
        "layer": not_text | st.sampled_from(("nonsense", "body+", "+", "head")),
        "shallow_layer": not_text | st.just("nonsense"),
        "alpha": junk | outside,
        "rule": not_text | st.just("sum"),
        "fuse": not_text | st.just("sum"),
        "target": st.integers(5) | not_text,
        "image": st.sampled_from((x[0, 0], x[None], torch.cat([x, x]), (x * 9).byte(), None)),
    }
    name = data.draw(st.sampled_from(sorted(wrong)))
    value, before = data.draw(wrong[name]), state(net)
    call = {"image": x} | {name: value}
    named = (f"{name}=", f"{name}:", f"{name} must", f"{name}s=", "layer=")
    refused(lambda: cc.explain(net, **call), *named)
    assert state(net) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_layer_is_refused_and_those_around_it_are_not():
    net, x = Small(), images(1, (6, 6))
    net.body = torch.jit.script(net.body)
    before = state(net)
    refused(lambda: cc.capture(net, x, "body"), "layer='body'")
    assert list(cc.layer_shapes(net, x)) == ["stem", "first", "pool", "second"]
    assert cc.capture(net, x, "second").gradients["second"].any()
    assert state(net) == before


# ---- pure functions


@st.composite
def tensors(draw, *shape: int, dtypes=(*DTYPES, torch.uint8, torch.int64, torch.bool), low=-8.0):
    """Numbers from low to 8 in any type and layout; constant ones, zeros, and single spots."""
    kind = draw(st.sampled_from(("any", "any", "zero", "constant", "spot")))
    dtype = draw(st.sampled_from(dtypes))
    value = draw(st.floats(low, 8, width=16))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    t = torch.rand(shape, generator=seed) * (8 - low) + low
    if kind != "any":
        t = torch.full(shape, value if kind == "constant" else 0.0)
    if kind == "spot":
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = value
    if not dtype.is_floating_point and dtype != torch.bool:
        t = t.abs()
    return laid_out(t.to(dtype), draw(st.sampled_from(LAYOUTS)))


sides = st.integers(1, 5)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), sides, sides)
def test_cams_of_any_activations_and_gradients(data, count, channels, height, width):
    """Neither layout nor type nor the images beside count; nor does the order of the channels."""
    A, G = (data.draw(tensors(count, channels, height, width)) for _ in range(2))
    a, g = A.clone(), G.clone()
    order = data.draw(st.permutations(range(count)))
    for name, cam in cc.CAMS.items():
        found = cam(A, G)
        assert found.shape == (count, height, width) and found.dtype == torch.float32, name
        assert found.isfinite().all() and (found >= 0).all(), name
        plain = cam(A.float().contiguous(), G.float().contiguous())
        assert torch.allclose(found, plain, rtol=1e-3, atol=1e-3), name
        assert torch.allclose(cam(A[order], G[order]), found[order], rtol=1e-3, atol=1e-3), name
        assert torch.allclose(cam(A.flip(1), G.flip(1)), found, rtol=1e-3, atol=1e-3), name
    assert torch.equal(A, a) and torch.equal(G, g)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), sides, sides, st.booleans())
def test_cams_hand_nan_on(data, count, channels, height, width, in_gradients):
    """NaN in either is NaN in that image's map, which is refused; other images are as before."""
    A, G = (data.draw(tensors(count, channels, height, width, dtypes=DTYPES)) for _ in range(2))
    spoilt = (G if in_gradients else A).clone(memory_format=torch.contiguous_format)
    place = data.draw(st.integers(0, A.numel() - 1))
    spoilt.view(-1)[place] = math.nan
    image = place // A[0].numel()
    others = [k for k in range(count) if k != image]
    for name, cam in cc.CAMS.items():
        found = cam(A, spoilt) if in_gradients else cam(spoilt, G)
        assert found[image].isnan().any(), name
        assert torch.allclose(found[others], cam(A, G)[others], rtol=1e-3, atol=1e-3), name
        refused(lambda m=found: cc.hybrid(m, torch.ones_like(m), 0.0), "maps must be finite")


@given(st.data())
def test_what_is_no_pair_of_activations_and_gradients(data):
    good = torch.ones(2, 3, 4, 4)
    shapes = st.lists(st.integers(1, 4), max_size=5).map(torch.ones)
    shapes = shapes.filter(lambda t: t.shape != good.shape)
    bad = data.draw(junk | shapes | st.just(good.to(torch.complex64)) | st.just(good.numpy()))
    pair = data.draw(st.sampled_from([(good, bad), (bad, good)]))
    for cam in cc.CAMS.values():
        refused(lambda cam=cam: cam(*pair), "A must be", "G must be")


numbers = st.sampled_from((0, 1, np.float32(0.5), np.float16(0.3), Fraction(1, 3)))


@given(st.data(), st.integers(0, 3), sides, sides, st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_normalised_enlarged_and_fused(data, count, height, width, size):
    a = data.draw(tensors(count or 1, height, width, low=0.0))[:count]
    b = data.draw(tensors(count or 1, data.draw(sides), data.draw(sides), low=0.0))[:count]
    before = a.clone(), b.clone()
    alpha, rule = data.draw(st.floats(0, 1) | numbers), data.draw(st.sampled_from(RULES))
    fuse = data.draw(st.sampled_from(sorted(cc.LAYER_FUSIONS)))
    mode = data.draw(st.sampled_from(("nearest", "bilinear", "bicubic")))
    forms = (tuple, list, torch.Size, np.array, torch.tensor)
    given_size = data.draw(st.sampled_from(forms))(size)
    fused = cc.hybrid(a, b, alpha, given_size, rule)
    for m in (cc.enlarge(a, given_size, mode), fused, cc.fuse_layers([a, b], given_size, fuse)):
        assert is_normalised(m, count, *size) and m.dtype == torch.float32
    assert is_normalised(cc.normalise(a), *a.shape)
    large = cc.enlarge(a, size), cc.enlarge(b, size)
    if alpha in (0, 1):
        assert torch.equal(fused, large[0 if alpha else 1])
    elif rule == "product" and alpha > 1e-37:  # less is 0 to float32
        assert not fused[(large[0] == 0) | (large[1] == 0)].any()
    order = data.draw(st.permutations(range(count)))
    mixed = cc.hybrid(a[order], b[order], alpha, size, rule)
    assert torch.allclose(mixed, fused[order], rtol=0, atol=1e-6)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@given(st.data(), st.floats(0.01, 0.99), st.sampled_from(RULES))
def test_the_roles_of_the_maps_and_their_order(data, alpha, rule):
    """The roles can be swapped, and what is larger in both maps is no smaller in their fusion."""
    a, b = (data.draw(tensors(2, 3, 4, dtypes=(torch.float32,), low=0.0)) for _ in range(2))
    found = cc.hybrid(a, b, alpha, rule=rule)
    assert torch.allclose(found, cc.hybrid(b, a, 1 - alpha, rule=rule), atol=1e-4)
    p, q = cc.normalise(a).flatten(1), cc.normalise(b).flatten(1)
    f = found.flatten(1)
    above = (p[:, :, None] >= p[:, None]) & (q[:, :, None] >= q[:, None])
    assert (f[:, :, None] >= f[:, None] - 1e-5)[above].all()
    if rule != "maximum":  # a map with itself: nothing to fuse
        assert torch.allclose(cc.hybrid(a, a, alpha, rule=rule), cc.normalise(a), atol=1e-5)


numpy_and_torch = (torch.tensor(0.5), np.array(0.5), [0.5])


@given(junk | st.floats() | st.integers(-2, 3) | st.sampled_from(numpy_and_torch))
def test_alpha_is_a_number_from_0_to_1_or_refused(alpha):
    a = torch.tensor([[[1.0, 0.5, 0.0]]])
    right = isinstance(alpha, Real) and not isinstance(alpha, bool) and 0 <= alpha <= 1
    for rule in cc.FUSIONS:
        if right:
            expected = cc.hybrid(a, a.flip(2), float(alpha), rule=rule)
            assert torch.equal(cc.hybrid(a, a.flip(2), alpha, rule=rule), expected)
        else:
            refused(lambda rule=rule: cc.hybrid(a, a, alpha, rule=rule), "alpha=")


@given(st.data())
def test_wrong_maps_sizes_and_names(data):
    good = torch.rand(2, 3, 4)
    spoilt = good.clone()
    place = data.draw(st.integers(0, 23))
    spoilt.view(-1)[place] = data.draw(st.sampled_from((*NOT_FINITE, -1e-3)))
    shapes = st.lists(st.integers(0, 3), max_size=5).filter(lambda s: len(s) != 3 or 0 in s[1:])
    others = [spoilt, good.numpy(), good.tolist(), good.to(torch.complex64), good.to_sparse()]
    others.append(good.double() * 1e300)
    bad = data.draw(junk | shapes.map(torch.ones) | st.sampled_from(others))
    for call in (
        lambda: cc.normalise(bad),
        lambda: cc.enlarge(bad, (4, 4)),
        lambda: cc.hybrid(bad, good, 0.5, (4, 4)),
        lambda: cc.hybrid(good, bad, 1),  # also where it would not count
        lambda: cc.fuse_layers([good, bad], (4, 4)),
        lambda: cc.fuse_layers([], (4, 4)),
    ):
        refused(call, "maps")
    sizes = (5, (5,), (0, 5), (5, -1), (2.0, 3.0), ("4", "4"), (1, 2, 3), "44", (), (None, 3))
    size = data.draw(st.sampled_from(sizes))
    name = data.draw(junk | words)
    for call, argument in (
        (lambda: cc.enlarge(good, size), "size="),
        (lambda: cc.fuse_layers([good], size), "size="),
        (lambda: cc.hybrid(good, good, 0.5, size), "size="),
        (lambda: cc.enlarge(good, (4, 4), name), "mode="),
        (lambda: cc.hybrid(good, good, 0.5, rule=name), "rule="),
        (lambda: cc.fuse_layers([good], (4, 4), name), "fuse="),
    ):
        refused(call, argument)


MEASURES = {
    "pointing_game": cc.pointing_game,
    "energy_in_mask": cc.energy_in_mask,
    "average_precision": cc.average_precision,
    "iou": lambda maps, masks: cc.iou(maps, masks, 0.5),
    "best_threshold": cc.best_threshold,
}


@given(st.data(), st.integers(1, 3), st.integers(7, 12), st.integers(7, 12))
def test_orders_of_pixels_and_of_blocks(data, count, height, width):
    """Permutations by descending value that neither scale nor the other images change."""
    maps = cc.normalise(data.draw(tensors(count, height, width, low=0.0)))
    ids = [f"image{k}" for k in range(count)]
    order = data.draw(st.permutations(range(count)))
    for rank in (cc.pixel_rank, lambda m, i: cc.block_rank(m, i, block=3)):
        ranks = rank(maps, ids)
        assert ranks.shape == maps.shape
        assert torch.equal(rank(maps[order] / 4, [ids[k] for k in order]), ranks[order])
        spoilt = maps.clone()
        spoilt[-1, 0, 0] = math.nan
        refused(lambda rank=rank, maps=spoilt: rank(maps, ids), "NaN")
        refused(lambda rank=rank: rank(maps, ["one too", "many", *ids]), "ids")
    ranks = cc.pixel_rank(maps, ids).flatten(1)
    places = torch.arange(height * width).int().expand(count, -1)
    assert torch.equal(ranks.sort(1).values, places)
    assert (maps.flatten(1).gather(1, ranks.argsort(1)).diff(dim=1) <= 0).all()


@given(st.data(), st.integers(1, 3), st.sampled_from(sorted(MEASURES)))
def test_measures_of_localisation(data, count, name):
    """In [0, 1], image by image, whatever the scale; what makes no sense is refused."""
    measure = MEASURES[name]
    maps = cc.normalise(data.draw(tensors(count, 7, 9, low=0.0)))
    masks = torch.zeros(count, 7, 9, dtype=torch.bool)
    top, left = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 8))
    masks[:, top : top + 3, left : left + 3] = True
    found = measure(maps, masks)
    assert np.all(found >= 0) and np.all(found <= 1)
    if name != "best_threshold":
        alone = [float(measure(maps[k : k + 1] / 4, masks[k : k + 1])[0]) for k in range(count)]
        assert alone == pytest.approx(found.tolist())
    spoilt = maps.clone()
    spoilt[-1, 0, 0] = data.draw(st.sampled_from((*NOT_FINITE, -0.1)))
    refused(lambda: measure(spoilt, masks), "maps must")
    no_masks = data.draw(junk | st.sampled_from((masks.int(), masks[:, :4])))
    refused(lambda: measure(maps, no_masks), "masks")
    refused(lambda: measure(maps, masks & False), "masks")


@given(st.data(), st.integers(1, 3))
def test_similarity_of_any_maps(data, count):
    maps = cc.normalise(data.draw(tensors(count, 7, 8, low=0.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division by zero on the way
        alike = cc.similarity(maps, maps.flip(0))
    for name in ("spearman", "ssim"):
        assert alike[name].shape == (count,) and (np.abs(alike[name]) <= 1 + 1e-9).all()
    spoilt = maps.clone()
    spoilt[-1, 0, 0] = data.draw(st.sampled_from((*NOT_FINITE, -0.1, 1.1)))
    for pair in ((maps, spoilt), (spoilt, maps), (maps, maps[:, :, 1:])):
        refused(lambda pair=pair: cc.similarity(*pair), "maps must")


@given(st.data(), sides, sides)
def test_pictures_of_any_map(data, height, width):
    cam = cc.normalise(data.draw(tensors(1, height, width, low=0.0)))[0]
    dtype = data.draw(st.sampled_from(DTYPES))
    photo = np.full((9, 8, 3), 40, np.uint8)
    forms = (cam.to(dtype), cam.numpy(), cam.double().numpy())
    drawn = cc.figures.overlay(photo, data.draw(st.sampled_from(forms)), 0.25)
    assert drawn.shape == photo.shape and drawn.dtype == np.uint8
    assert cc.figures.colours(cam, (7, 6)).shape == (7, 6, 3)
    several = torch.zeros(2, 3, 4)
    outside = (cam + 1.5, cam - 1.5, cam * math.nan)
    bad = (several, *outside, cam[:0], None, "x", [[1], [1, 2]])
    refused(lambda: cc.figures.colours(data.draw(st.sampled_from(bad))), "cam must")
    not_bool = junk.filter(lambda v: not isinstance(v, bool))
    value = data.draw(not_bool | st.floats(1, exclude_min=True))
    refused(lambda: cc.figures.overlay(photo, cam, value), "opacity=")
    refused(lambda: cc.figures.colours(cam, colormap=value), "colormap=")


@given(st.lists(st.floats(0, 1), max_size=9))
def test_areas_under_curves(values):
    if len(values) < 2:
        refused(lambda: cc.auc(values), "curves must")
    else:
        assert cc.auc(values) == pytest.approx(np.trapezoid(values) / (len(values) - 1))
        assert cc.auc(values) == pytest.approx(cc.auc(values[::-1]))
