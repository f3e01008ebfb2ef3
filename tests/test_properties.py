"""Properties over generated input: real captures on tiny networks, and the pure functions behind them.

What goes in is drawn: networks, shapes, types, layouts of memory, NaN and infinity, calls that are wrong. What comes
out is either right in form, with the network left as it was, or a ValueError that names what was wrong.

A short profile runs with the other tests. The long one: HYPOTHESIS_PROFILE=long pytest tests/test_properties.py
--hypothesis-show-statistics
"""

from __future__ import annotations

import contextlib
import copy
import math
import types
import warnings
from fractions import Fraction
from numbers import Real

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from nets import LAYOUTS, Small, images, laid_out, state
from torch import nn

import cam_core as cc

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}
NOT_FINITE = (math.nan, math.inf, -math.inf)
GUARDS = {"none": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


NOTHING = st.none()


def in_an_object(logits):
    return types.SimpleNamespace(logits=logits, loss=None)


@st.composite
def networks(draw, answers=(None, in_an_object), dtypes=DTYPES, extra=NOTHING) -> Small:
    """A network in any state that a caller may have left it in: modes, frozen parameters and gradients are drawn."""
    net = Small(
        seed=draw(st.integers(0, 2**16)), classes=draw(st.integers(1, 5)), in_place=draw(st.booleans()),
        reused=draw(st.booleans()), norm=draw(st.booleans()), kind=draw(st.sampled_from(("maps", "tokens", "last"))),
        answer=draw(st.sampled_from(answers)), extra=draw(extra),
    ).to(draw(st.sampled_from(dtypes)))  # fmt: skip
    training, frozen, grads = (draw(st.integers(0, 2**20 - 1)) for _ in range(3))  # a bit for each module or parameter
    for k, module in enumerate(net.modules()):
        module.training = bool(training >> k & 1)
    for k, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, 0.5) if grads >> k & 1 else None
        p.requires_grad_(not frozen >> k & 1)
    return net


@st.composite
def inputs(draw, net: nn.Module, most=4) -> torch.Tensor:
    """Images for a network, in its type and in any layout."""
    count, height, width = draw(st.integers(1, most)), draw(st.integers(4, 9)), draw(st.integers(4, 9))
    x = images(count, (height, width), draw(st.integers(0, 99)), dtype=net.head.weight.dtype)
    x = draw(st.sampled_from((0.0, 1.0, 30.0))) * x + draw(st.sampled_from((0.0, 1.0)))  # constant ones among them
    return laid_out(x, draw(st.sampled_from(LAYOUTS))).requires_grad_(draw(st.booleans()))


@st.composite
def targets(draw, count: int, classes: int):
    """None, or a class for all images or for each, as a number of Python, NumPy or torch."""
    one = st.integers(0, classes - 1)
    several = draw(st.lists(one, min_size=count, max_size=count))
    kinds = (None, several[0], np.int64(several[0]), torch.tensor(several[0]), np.uint8(several[0]), several)
    kinds += (tuple(several), np.array(several, np.int32), torch.tensor(several), torch.tensor(several).byte())
    return draw(st.sampled_from(kinds))


def refused(call, *names: str) -> str:
    """The message of the ValueError, just that and no other error, that the call ends in; it holds one of the names."""
    with pytest.raises(ValueError) as caught:
        call()
    assert caught.type is ValueError, repr(caught.value)
    message = str(caught.value)
    assert any(name in message for name in names), message
    return message


def short(value) -> str:
    """What a message has to show of a value: its shape if it is a tensor, else itself."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


# ------------------------------------------------------------------------------------------------------ real captures


@given(st.data())
def test_captures_and_maps_of_any_network(data):
    """Shapes, types, finite maps in [0, 1]; the network and the input are as before; so is the mode of autograd."""
    net = data.draw(networks())
    x = data.draw(inputs(net))
    there = net.layers(*x.shape[2:])
    names = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1, max_size=3, unique=True))
    target = data.draw(targets(len(x), net.head.out_features))
    guard = data.draw(st.sampled_from(sorted(GUARDS)))
    event(f"{net.kind}, {str(x.dtype)[6:]}, {guard}")
    before, pixels = state(net), x.detach().clone()
    with GUARDS[guard]():
        made = x.clone() if data.draw(st.booleans()) else x  # under inference_mode one that autograd refuses
        shot = cc.capture(net, made, names, target)
        maps = [{n: cam(shot.activations[k], shot.gradients[k]) for n, cam in cc.CAMS.items()} for k in names]
    assert state(net) == before and torch.equal(x.detach(), pixels) and x.grad is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    assert list(shot.activations) == list(shot.gradients) == [n for n in there if n in names]
    for name in names:
        assert shot.activations[name].shape == shot.gradients[name].shape == (len(x), *there[name]), name
        assert shot.activations[name].dtype == shot.gradients[name].dtype == x.dtype
    assert shot.logits.shape == (len(x), net.head.out_features) and shot.target.shape == (len(x),)
    assert shot.target.dtype == torch.int64
    expected = shot.logits.argmax(1) if target is None else torch.as_tensor(target).expand(len(x)).long()
    assert torch.equal(shot.target, expected)
    size = tuple(x.shape[2:])
    for cams in maps:
        for m in cams.values():
            assert m.dtype == torch.float32 and m.isfinite().all() and (m >= 0).all()
    alpha, rule = data.draw(st.floats(0, 1)), data.draw(st.sampled_from(sorted(cc.FUSIONS)))
    found = cc.hybrid(maps[0]["grad_cam"], maps[-1]["layer_cam"], alpha, size, rule)
    fused = cc.fuse_layers([m["layer_cam"] for m in maps], size, data.draw(st.sampled_from(sorted(cc.LAYER_FUSIONS))))
    for m in (found, fused):
        assert m.shape == (len(x), *size) and m.isfinite().all() and (m >= 0).all() and (m <= 1).all()
        assert all(p in (0, 1) for p in m.amax((1, 2)).tolist())


@given(st.data())
def test_permuting_the_batch_permutes_the_maps(data):
    net = data.draw(networks())
    x = data.draw(inputs(net))
    order = data.draw(st.permutations(range(len(x))))
    name = data.draw(st.sampled_from(sorted(net.layers(*x.shape[2:]))))
    target = data.draw(st.lists(st.integers(0, net.head.out_features - 1), min_size=len(x), max_size=len(x)))
    first = cc.capture(net, x, name, target)
    second = cc.capture(net, x[order], name, [target[k] for k in order])
    A, G = first.activations[name], first.gradients[name]
    assert close(second.logits, first.logits[order]) and close(second.activations[name], A[order])
    assert close(second.gradients[name], G[order])
    for n, cam in cc.CAMS.items():  # of the same numbers: in rounding a gradient's sign may turn, and with it a map
        a, b = cam(A[order], G[order]), cam(A, G)[order]
        scale = float((A.float().abs().amax((2, 3)) * G.float().abs().sum((2, 3))).sum(1).max())
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale), n
    m = cc.enlarge(cc.layer_cam(A, G), (7, 5))
    assert torch.equal(cc.enlarge(cc.layer_cam(A, G)[order], (7, 5)), m[order])


def close(a, b) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=CLOSE[a.dtype], atol=CLOSE[a.dtype] * float(b.abs().max()))


@given(st.data())
def test_layers_that_are_found_can_be_captured(data):
    """What layer_shapes lists has the shape it says, and default_layers and explain work with it, wherever they do."""
    net = data.draw(networks())
    x = data.draw(inputs(net, most=2))
    before = state(net)
    shapes, (deep, shallow) = cc.layer_shapes(net, x), cc.default_layers(net, x)
    assert shapes == {n: s for n, s in net.layers(*x.shape[2:]).items()}
    assert {deep, shallow} <= set(cc.stages(net, x)) <= set(shapes)
    shot = cc.capture(net, x, [deep, shallow])
    assert {n: tuple(a.shape[1:]) for n, a in shot.activations.items()} == {n: shapes[n] for n in (deep, shallow)}
    found = cc.explain(net, x[0], method=data.draw(st.sampled_from(["hybrid", *cc.CAMS])))
    assert found.cam.shape == tuple(x.shape[2:]) and found.cam.min() >= 0 and found.cam.max() in (0, 1)
    assert found.layer == deep and 0 <= found.probability <= 1 and 0 <= found.target < net.head.out_features
    assert state(net) == before


@given(st.data())
def test_gradients_of_the_pixels(data):
    net = data.draw(networks())
    x, guided = data.draw(inputs(net)), data.draw(st.booleans())
    target, before = data.draw(targets(len(x), net.head.out_features)), state(net)
    with GUARDS[data.draw(st.sampled_from(sorted(GUARDS)))]():
        found = cc.input_gradient(net, x, target, guided)
    assert found.shape == x.shape and found.dtype == torch.float32 and found.isfinite().all()
    assert state(net) == before and x.grad is None


# --------------------------------------------------------------------------------------------------- NaN and infinity


class Plant(nn.Module):
    """Puts a value into one place of one image's activations; `hide` is what runs behind it."""

    def __init__(self, value, image, place, hide):
        super().__init__()
        self.value, self.image, self.place, self.hide = value, image, place, hide
        self.here = nn.Identity()

    def forward(self, y):
        y = y.clone()
        y[(self.image, *np.unravel_index(self.place % y[0].numel(), y.shape[1:]))] = self.value
        return self.hide(self.here(y))


HIDE = {
    "nothing": lambda y: y,
    "relu": lambda y: y.relu(),
    "where": lambda y: torch.where(y.abs() < 1e4, y, 0),
    "fmax": lambda y: torch.fmax(y, torch.zeros_like(y)).clamp(max=10),
    "nan_to_num": lambda y: y.nan_to_num(0, 0, 0),
    "tanh": lambda y: y.tanh(),
    "sigmoid": lambda y: y.sigmoid(),
    "clamp": lambda y: y.clamp(-1, 1),
    "masked": lambda y: y.masked_fill(~y.isfinite(), 0),
    "reciprocal": lambda y: 1 / (1 + y.abs()),
}


@given(st.data(), st.sampled_from(NOT_FINITE), st.sampled_from(sorted(HIDE)), st.integers(0, 200))
def test_nan_in_activations_is_reported_even_if_the_logits_hide_it(data, value, hide, place):
    net = data.draw(networks(dtypes=(torch.float32, torch.bfloat16)))
    x = data.draw(inputs(net))
    image = data.draw(st.integers(0, len(x) - 1))
    net.extra = Plant(value, image, place, HIDE[hide])
    net.extra.here.training = data.draw(st.booleans())
    before = state(net)
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(x)
    hidden = getattr(logits, "logits", logits).isfinite().all()
    event(f"{hide}: {'hidden from' if hidden else 'seen in'} the logits")
    message = refused(lambda: cc.capture(net, x, ["extra.here"]), "NaN or infinity")
    what = "activations of layer='extra.here'" if hidden else "logits"
    assert f"The model's {what} contain NaN or infinity in images [{image}] of x (x is finite)" in message
    assert state(net) == before
    found = None  # at a layer behind it: reported as well, or there is nothing left of it
    try:
        found = cc.capture(net, x, "body", 0)
    except ValueError as error:
        assert "NaN or infinity" in str(error)
    if found is not None:
        assert all(t.isfinite().all() for t in (found.logits, *found.activations.values(), *found.gradients.values()))
    assert state(net) == before


class Steep(nn.Module):
    """sqrt, whose slope at 0 is infinite: the gradients in front of it are not finite though the logits are."""

    def forward(self, y):
        return y.abs().sqrt()


@given(st.data())
def test_gradients_that_are_not_finite_are_reported(data):
    net = data.draw(networks(dtypes=(torch.float32, torch.float64), extra=st.just(Steep())))
    x = data.draw(inputs(net))
    before = state(net)
    name = data.draw(st.sampled_from(("first", "stem")[net.second is None :]))
    shot = None
    try:
        shot = cc.capture(net, x, name, 0)
    except ValueError as error:
        event("refused")
        assert type(error) is ValueError and f"gradients of layer={name!r} contain NaN or infinity" in str(error)
    assert state(net) == before
    assert shot is None or shot.gradients[name].isfinite().all()


@given(st.data(), st.sampled_from(NOT_FINITE), st.integers(0, 10_000))
def test_pixels_and_weights_that_are_not_finite(data, value, place):
    """Where they come through they are reported; where they do not, nothing of them is left in what is handed back."""
    net = data.draw(networks(dtypes=(torch.float32, torch.float64, torch.bfloat16)))
    x = data.draw(inputs(net)).detach().contiguous()
    where = data.draw(st.sampled_from(["x", *(n for n, _ in net.named_parameters())]))
    tensor = x if where == "x" else dict(net.named_parameters())[where].data
    tensor.view(-1)[place % tensor.numel()] = value
    before = state(net)
    name = data.draw(st.sampled_from(sorted(net.layers(*x.shape[2:]))))
    shot = None
    try:
        shot = cc.capture(net, x, name)
    except ValueError as error:
        event("reported")
        assert type(error) is ValueError and "contain NaN or infinity in images" in str(error)
        assert ("x contains them too" in str(error)) == (where == "x")
    if shot is not None:
        event("nothing left of it")
        for t in (shot.logits, shot.activations[name], shot.gradients[name]):
            assert t.isfinite().all()
        for cam in cc.CAMS.values():
            cc.normalise(cam(shot.activations[name], shot.gradients[name]))
    assert state(net) == before


@given(st.data(), st.sampled_from(NOT_FINITE))
def test_logits_that_are_not_finite_are_no_probability(data, value):
    """Comparisons hide NaN (NaN > 0.5 is false), so what measures faithfulness refuses it."""
    net = data.draw(networks(dtypes=(torch.float32,)))
    x = data.draw(inputs(net)).detach().contiguous()
    net.head.bias.data[data.draw(st.integers(0, net.head.out_features - 1))] = value
    assume(not (value == -math.inf and net.head.out_features > 1))  # a class that never is, with probability 0
    before, ids, target = state(net), [str(k) for k in range(len(x))], torch.zeros(len(x), dtype=torch.long)
    maps = images(len(x), x.shape[2:], 1).abs().amax(1)
    ranks = cc.pixel_rank(maps, ids)[:, None]
    refused(lambda: cc.perturbation_curves(net, 0 * x, x, ranks, target, 3), "probabilities are NaN")
    refused(lambda: cc.confidence_change(net, x, cc.normalise(maps), target, np.full(len(x), 0.5)), "are NaN")
    assert state(net) == before


# --------------------------------------------------------------------------------------------------------- bad calls

SCALARS = (True, False, None, "x", "", b"1", 1.5, math.nan, math.inf, 2 + 1j, object(), np.bool_(1), np.float32(1.5))
SCALARS += (np.datetime64(0, "s"), Fraction(3, 2), Ellipsis, int, range, lambda: 0)
junk = st.sampled_from(SCALARS)
junk |= st.lists(st.sampled_from((None, "a", 0.5, (), [1])), min_size=1, max_size=3) | st.just({}) | st.just({"a": 1})


def bad_inputs(net: nn.Module):
    """Everything that is no batch of images for this network."""
    good = images(2, (6, 5), dtype=net.head.weight.dtype)
    other = [d for d in (*DTYPES, torch.float8_e5m2) if d != good.dtype]
    shapes = st.lists(st.integers(0, 3), max_size=6).filter(lambda s: len(s) != 4 or 0 in s).map(torch.zeros)
    return st.one_of(
        junk, shapes, st.sampled_from((good.numpy() if good.dtype == torch.float32 else None, good.tolist())),
        st.sampled_from((torch.uint8, torch.int64, torch.bool, torch.complex64, *other)).map(good.to),
        st.integers(1, 9).filter(lambda c: c != 3).map(lambda c: torch.ones(1, c, 6, 6, dtype=good.dtype)),
        st.sampled_from(((1, 1), (1, 8), (8, 1))).map(lambda s: torch.ones(2, 3, *s, dtype=good.dtype)),
        st.sampled_from((good.to_sparse(), good.to("meta"))),
    )  # fmt: skip


@given(st.data())
def test_bad_inputs(data):
    net = data.draw(networks())
    x, before = data.draw(bad_inputs(net)), state(net)
    message = refused(
        lambda: cc.capture(net, x, data.draw(st.sampled_from(("body", "nonsense")))), "x must", "x=", "x is"
    )
    if isinstance(x, torch.Tensor) and not x.is_meta:
        assert short(x) in message or short(x[:1]) in message  # an unknown layer is looked for with one image
    refused(lambda: cc.input_gradient(net, x), "x must", "x=", "x is")
    refused(lambda: cc.default_layers(net, x), "x must", "x=", "x is")
    assert state(net) == before


@given(st.data())
def test_bad_targets(data):
    net = data.draw(networks())
    x = data.draw(inputs(net))
    count, classes, before = len(x), net.head.out_features, state(net)
    outside = st.integers(-(2**66), -1) | st.integers(classes, 2**66)
    wrong_count = st.lists(st.integers(0, classes - 1), max_size=6).filter(lambda t: len(t) != count)
    one_wrong = st.tuples(st.integers(0, count - 1), outside).map(
        lambda t: [0] * t[0] + [t[1]] + [0] * (count - t[0] - 1)
    )
    target = data.draw(
        st.one_of(
            junk.filter(lambda t: t is not None), outside, wrong_count, wrong_count.map(np.array), one_wrong,
            st.sampled_from((torch.zeros(count), torch.zeros(count) > 0, torch.zeros(count, 1).long())),
            st.just(torch.zeros(count, dtype=torch.complex64)), st.just(torch.zeros(count).long().to_sparse()),
            st.just(torch.zeros(count, device="meta").long()),
        )
    )  # fmt: skip
    message = refused(lambda: cc.capture(net, x, "body", target), "target")
    assert repr(target) in message or f"target has {len(target)} entries for {count} images" in message
    refused(lambda: cc.input_gradient(net, x, target), "target")
    assert state(net) == before


@given(st.data())
def test_bad_layers(data):
    net = data.draw(networks(extra=st.sampled_from((None, BoolMask(), Two()))))
    x = data.draw(inputs(net))
    there = net.layers(*x.shape[2:])
    modules = dict(net.named_modules())
    no_maps = st.sampled_from(
        [n for n in ("head", "first", "extra.mask", "extra.two") if n in modules and n not in there]
    )
    unknown = st.text(max_size=8).filter(lambda n: n not in modules or not n)
    layers = data.draw(
        st.one_of(
            no_maps, no_maps.map(lambda n: ["body", n]), unknown, unknown.map(lambda n: [n, "stem"]), st.just([]),
            st.sampled_from((net.body, [net.body], {"body"})), junk.filter(lambda v: not isinstance(v, str)),
        )
    )  # fmt: skip
    before = state(net)
    message = refused(lambda: cc.capture(net, x, layers), "layer")
    if isinstance(layers, str):
        assert repr(layers) in message
    assert state(net) == before


class BoolMask(nn.Module):
    """A layer whose output is true and false: a map in form, but nothing has a gradient there."""

    def __init__(self):
        super().__init__()
        self.mask = Positive()

    def forward(self, y):
        return y * self.mask(y)


class Positive(nn.Module):
    def forward(self, y):
        return y > 0


class Two(nn.Module):
    """A layer that hands back two maps."""

    def __init__(self):
        super().__init__()
        self.two = Both()

    def forward(self, y):
        return self.two(y)[0]


class Both(nn.Module):
    def forward(self, y):
        return y, -y


ANSWERS = {
    "tuple": lambda y: (y, y),
    "list": lambda y: [y],
    "dict": lambda y: {"logits": y},
    "object without": lambda y: types.SimpleNamespace(logits=None, out=y),
    "a number": lambda y: float(y.detach().sum()),
    "one dimension": lambda y: y[:, 0],
    "three dimensions": lambda y: y[:, :, None],
    "no class": lambda y: y[:, :0],
    "other batch": lambda y: torch.cat([y, y]),
    "one for all": lambda y: y.mean(0),
    "integers": lambda y: y.long(),
    "complex": lambda y: y.float().to(torch.complex64),
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
        assert "must be logits of shape (B, K)" in refused(call, "output")
    assert state(net) == before


@given(junk, st.sampled_from(("capture", "input_gradient", "layer_shapes", "stages", "explain")))
def test_what_is_no_model(model, function):
    calls = {"capture": ("body",), "explain": ()}
    x = images(1, (6, 6))
    assert repr(model) in refused(lambda: getattr(cc, function)(model, x, *calls.get(function, ())), "model=")


@given(st.data())
def test_bad_arguments_of_explain(data):
    net = data.draw(networks())
    x = images(1, (6, 6), dtype=net.head.weight.dtype)
    not_text = junk.filter(lambda v: v is not None and not isinstance(v, str)) | st.just(net.body)
    name, value = data.draw(
        st.one_of(
            st.tuples(st.just("method"), not_text | st.sampled_from(("", "gradcam", None))),
            st.tuples(st.just("layer"), not_text | st.sampled_from(("nonsense", "body+", "+", "head"))),
            st.tuples(st.just("shallow_layer"), not_text | st.just("nonsense")),
            st.tuples(st.just("alpha"), junk | st.floats(1, exclude_min=True) | st.floats(-9, 0, exclude_max=True)),
            st.tuples(st.just("rule"), not_text | st.just("sum")),
            st.tuples(st.just("fuse"), not_text | st.just("sum")),
            st.tuples(st.just("target"), st.integers(5) | not_text),
            st.tuples(st.just("image"), st.sampled_from((x[0, 0], x[None], torch.cat([x, x]), (x * 9).byte(), None))),
        )
    )  # fmt: skip
    before = state(net)
    call = {"image": x} | {name: value}
    message = refused(lambda: cc.explain(net, **call), f"{name}=", f"{name}:", f"{name} must", f"{name}s=", "layer=")
    assert name in ("image", "layer", "target") or repr(value) in message
    assert state(net) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_layer_is_refused_and_not_looked_into():
    """torch.jit's modules take no hooks; those around one do."""
    net, x = Small(), images(1, (6, 6))
    net.body = torch.jit.script(net.body)
    before = state(net)
    assert "scripted" in refused(lambda: cc.capture(net, x, "body"), "layer='body'")
    assert "Known: stem" in refused(lambda: cc.capture(net, x, "bodi"), "layer='bodi'")
    assert list(cc.layer_shapes(net, x)) == ["stem", "first", "pool", "second"]
    assert cc.capture(net, x, "second").gradients["second"].any()
    assert state(net) == before


# ------------------------------------------------------------------------------------------------------ pure functions

ANY_DTYPE = (*DTYPES, torch.uint8, torch.int32, torch.int64, torch.bool)


@st.composite
def tensors(draw, *shape: int, dtypes=ANY_DTYPE, low=-8.0, high=8.0) -> torch.Tensor:
    """Numbers from low to high in any type and layout; constant ones and zeros among them, and single spots."""
    kind, dtype = draw(st.sampled_from(("any", "any", "zero", "constant", "spot"))), draw(st.sampled_from(dtypes))
    value = draw(st.floats(low, high, width=16))
    t = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) * (high - low) + low
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
    A, G = (data.draw(tensors(count, channels, height, width)) for _ in range(2))
    a, g = A.clone(), G.clone()
    order = data.draw(st.permutations(range(count)))
    for name, cam in cc.CAMS.items():
        found = cam(A, G)
        assert found.shape == (count, height, width) and found.dtype == torch.float32, name
        assert found.isfinite().all() and (found >= 0).all(), name
        plain = cam(A.float().contiguous(), G.float().contiguous())  # neither layout nor type matter
        assert torch.allclose(found, plain, rtol=1e-3, atol=1e-3), name
        assert torch.allclose(cam(A[order], G[order]), found[order], rtol=1e-3, atol=1e-3), name
        unit = cc.normalise(found)
        assert all(p in (0, 1) for p in unit.amax((1, 2)).tolist())
    assert torch.equal(A, a) and torch.equal(G, g)


@given(st.data(), st.integers(1, 3), st.integers(1, 4), sides, sides, st.booleans())
def test_cams_hand_nan_on(data, count, channels, height, width, in_gradients):
    """NaN in either is NaN in the map of that image, which `normalise` refuses; other images are as before."""
    A, G = (data.draw(tensors(count, channels, height, width, dtypes=DTYPES)) for _ in range(2))
    place = data.draw(st.integers(0, A.numel() - 1))
    image = place // A[0].numel()
    spoilt = (G if in_gradients else A).clone(memory_format=torch.contiguous_format)
    spoilt.view(-1)[place] = math.nan
    for name, cam in cc.CAMS.items():
        found = cam(A, spoilt) if in_gradients else cam(spoilt, G)
        assert found[image].isnan().any(), name
        others = [k for k in range(count) if k != image]
        assert torch.allclose(found[others], cam(A, G)[others], rtol=1e-3, atol=1e-3), name
        refused(lambda m=found: cc.normalise(m), "maps must be finite")
        refused(lambda m=found: cc.hybrid(m, torch.ones_like(m), 0.0), "maps must be finite")


@given(st.data())
def test_what_is_no_pair_of_activations_and_gradients(data):
    good = torch.ones(2, 3, 4, 4)
    shapes = st.lists(st.integers(1, 4), max_size=5).map(torch.ones).filter(lambda t: t.shape != good.shape)
    bad = data.draw(junk | shapes | st.just(good.to(torch.complex64)) | st.just(good.numpy()))
    pair = data.draw(st.sampled_from([(good, bad), (bad, good)]))
    for cam in cc.CAMS.values():
        message = refused(lambda cam=cam: cam(*pair), "A must be", "G must be")
        assert not isinstance(bad, torch.Tensor) or short(bad) in message or short(good) in message


@given(st.data(), st.integers(0, 3), sides, sides, st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_normalised_enlarged_and_fused(data, count, height, width, size):
    a = data.draw(tensors(count or 1, height, width, low=0.0))[:count]
    b = data.draw(tensors(count or 1, *data.draw(st.tuples(sides, sides)), low=0.0))[:count]
    before = a.clone(), b.clone()
    alpha = data.draw(st.floats(0, 1) | st.sampled_from((0, 1, np.float32(0.5), np.float16(0.3), Fraction(1, 3))))
    rule, fuse = data.draw(st.sampled_from(sorted(cc.FUSIONS))), data.draw(st.sampled_from(sorted(cc.LAYER_FUSIONS)))
    mode = data.draw(st.sampled_from(("nearest", "bilinear", "bicubic")))
    given_size = data.draw(st.sampled_from((tuple, list, torch.Size, np.array, torch.tensor)))(size)
    made = [cc.enlarge(a, given_size, mode), cc.hybrid(a, b, alpha, given_size, rule)]
    made.append(cc.fuse_layers([a, b], given_size, fuse))
    for m in made:
        assert m.shape == (count, *size) and m.dtype == torch.float32
        assert m.isfinite().all() and (m >= 0).all() and (m <= 1).all()
        assert all(p in (0, 1) for p in m.amax((1, 2)).tolist())
    assert cc.normalise(a).shape == a.shape
    large = cc.enlarge(a, size), cc.enlarge(b, size)
    if alpha in (0, 1):
        assert torch.equal(made[1], large[0 if alpha else 1])
    elif rule == "product" and alpha > 1e-37:  # less is 0 to float32
        assert not made[1][(large[0] == 0) | (large[1] == 0)].any()
    order = data.draw(st.permutations(range(count)))
    mixed = cc.hybrid(a[order], b[order], alpha, size, rule)
    assert torch.allclose(mixed, made[1][order], rtol=0, atol=1e-6)  # pow differs by place in a vector register
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.parametrize("alpha", [5e-324, 1e-200, 1e-46, 1e-39])
def test_an_alpha_that_float32_takes_for_0_is_0(alpha):
    """0 ** alpha was 1 in most places of a tensor then, and 0 in the last few."""
    a, b = torch.zeros(1, 1, 35), torch.ones(1, 1, 35)
    assert torch.equal(cc.hybrid(a, b, alpha), b) and not cc.hybrid(a, b, 1e-37).any()


@given(junk | st.floats() | st.integers(-2, 3) | st.just(torch.tensor(0.5)) | st.just(np.array(0.5)) | st.just([0.5]))
def test_alpha_is_a_number_from_0_to_1_or_refused(alpha):
    a = torch.tensor([[[1.0, 0.5, 0.0]]])
    right = isinstance(alpha, Real) and not isinstance(alpha, bool) and 0 <= alpha <= 1
    for rule in cc.FUSIONS:
        if right:
            m = cc.hybrid(a, a.flip(2), alpha, rule=rule)
            assert (m >= 0).all() and m.max() <= 1 and torch.equal(m, cc.hybrid(a, a.flip(2), float(alpha), rule=rule))
        else:
            message = refused(lambda rule=rule: cc.hybrid(a, a, alpha, rule=rule), "alpha=")
            assert repr(alpha) in message and "[0, 1]" in message


@given(st.data())
def test_bad_maps_sizes_and_names(data):
    good = torch.rand(2, 3, 4)
    spoilt, place = good.clone(), data.draw(st.integers(0, good.numel() - 1))
    spoilt.view(-1)[place] = data.draw(st.sampled_from((*NOT_FINITE, -1e-3)))
    shapes = st.lists(st.integers(0, 3), max_size=5).filter(lambda s: len(s) != 3 or 0 in s[1:]).map(torch.ones)
    maps = st.one_of(
        junk, shapes, st.just(spoilt), st.just(good.numpy()), st.just(good.tolist()),
        st.sampled_from((good.to(torch.complex64), good.to_sparse(), good.double() * 1e300)),
    )  # fmt: skip
    bad = data.draw(maps)
    sizes = (None, 5, (5,), (0, 5), (5, -1), (2.0, 3.0), ("4", "4"), (1, 2, 3), "44", (), object(), (None, 3), math.nan)
    size = data.draw(st.sampled_from(sizes))
    name = data.draw(junk | st.text(max_size=5))
    for call in (
        lambda: cc.normalise(bad),
        lambda: cc.enlarge(bad, (4, 4)),
        lambda: cc.hybrid(bad, good, 0.5, (4, 4)),
        lambda: cc.hybrid(good, bad, 1),  # also where it would not count
        lambda: cc.fuse_layers([good, bad], (4, 4)),
        lambda: cc.fuse_layers([bad], (4, 4)),
    ):
        refused(call, "maps")
    assert repr(size) in refused(lambda: cc.enlarge(good, size), "size=")
    assert repr(size) in refused(lambda: cc.fuse_layers([good], size), "size=")
    if size is not None:
        assert repr(size) in refused(lambda: cc.hybrid(good, good, 0.5, size), "size=")
    assert repr(name) in refused(lambda: cc.enlarge(good, (4, 4), name), "mode=")
    assert repr(name) in refused(lambda: cc.hybrid(good, good, 0.5, rule=name), "rule=")
    assert repr(name) in refused(lambda: cc.fuse_layers([good], (4, 4), name), "fuse=")
    refused(lambda: cc.fuse_layers([], (4, 4)), "maps=")


@given(st.data(), st.integers(1, 3), st.integers(7, 12), st.integers(7, 12))
def test_ranks_and_measures_of_any_maps(data, count, height, width):
    """Orders are permutations, shares lie in [0, 1], correlations in [-1, 1]; maps with NaN have neither."""
    maps = cc.normalise(data.draw(tensors(count, height, width, low=0.0)))
    ids, order = [f"image{k}" for k in range(count)], data.draw(st.permutations(range(count)))
    for rank in (cc.pixel_rank, lambda m, i: cc.block_rank(m, i, block=3)):
        ranks = rank(maps, ids)
        assert ranks.shape == maps.shape and torch.equal(rank(maps[order], [ids[k] for k in order]), ranks[order])
    ranks = cc.pixel_rank(maps, ids).flatten(1)
    assert torch.equal(ranks.sort(1).values, torch.arange(height * width).int().expand(count, -1))
    assert (maps.flatten(1).gather(1, ranks.argsort(1)).diff(dim=1) <= 0).all()
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    masks[:, top : top + 3, left : left + 3] = True
    threshold = data.draw(st.floats(0, 1, exclude_min=True))
    values = [cc.pointing_game(maps, masks, 1), cc.energy_in_mask(maps, masks), cc.average_precision(maps, masks)]
    values += [cc.iou(maps, masks, threshold), cc.box_iou(maps, [[[left, top, left + 1, top + 1]]] * count, threshold)]
    for v in [*values, cc.tie_fraction(maps)]:
        assert v.shape == (count,) and (v >= 0).all() and (v <= 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no division by zero on the way
        alike = cc.similarity(maps, maps.flip(0))
    assert (np.abs(alike["spearman"]) <= 1 + 1e-9).all() and (np.abs(alike["ssim"]) <= 1 + 1e-9).all()
    spoilt = maps.clone()
    spoilt[data.draw(st.integers(0, count - 1)), 0, 0] = math.nan
    refused(lambda: cc.pixel_rank(spoilt, ids), "maps contain NaN")
    refused(lambda: cc.similarity(maps, spoilt), "maps must")
    for measure in (cc.pointing_game, cc.energy_in_mask, cc.average_precision, lambda m, k: cc.iou(m, k, 0.5)):
        refused(lambda f=measure: f(spoilt, masks), "maps must")
        refused(lambda f=measure: f(maps, data.draw(junk | st.just(masks.int()) | st.just(masks[:, :4]))), "masks")
        refused(lambda f=measure: f(maps, masks & False), "masks")
    for t in (0, -1, 1.5, math.nan, "0.5", None):
        refused(lambda t=t: cc.iou(maps, masks, t), "threshold=")


@given(st.data(), sides, sides)
def test_pictures_of_any_map(data, height, width):
    cam = cc.normalise(data.draw(tensors(1, height, width, low=0.0)))[0]
    dtype = data.draw(st.sampled_from(DTYPES))
    photo = np.full((9, 8, 3), 40, np.uint8)
    drawn = cc.overlay(photo, data.draw(st.sampled_from((cam.to(dtype), cam.numpy(), cam.double().numpy()))), 0.25)
    assert drawn.shape == photo.shape and drawn.dtype == np.uint8
    assert cc.colours(cam, (7, 6)).shape == (7, 6, 3)
    bad = (cam[None], cam + 1.5, cam - 1.5, cam * math.nan, cam[:0], cam.numpy()[:, :0], None, "x", [[1], [1, 2]])
    refused(lambda: cc.colours(data.draw(st.sampled_from(bad))), "cam must")
    value = data.draw(junk.filter(lambda v: not isinstance(v, bool)) | st.floats(1, exclude_min=True))
    assert repr(value) in refused(lambda: cc.overlay(photo, cam, value), "opacity=")
    assert repr(value) in refused(lambda: cc.colours(cam, colormap=value), "colormap=")


@given(st.data(), st.integers(0, 6))
def test_areas_under_curves(data, points):
    curves = np.array(data.draw(st.lists(st.floats(0, 1), min_size=points, max_size=points)))
    if points < 2:
        assert str(curves.shape) in refused(lambda: cc.auc(curves), "curves must")
    else:
        assert 0 <= cc.auc(curves) <= 1 + 1e-12 and np.isclose(cc.auc(curves), np.trapezoid(curves) / (points - 1))
