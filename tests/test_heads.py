"""What a network's output means: heads, outputs of every shape, and target functions."""

from __future__ import annotations

import warnings
from collections import deque, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cam_core as cc

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two convolutions, a mean and one linear layer; `hand_out(y, maps)` makes the output."""

    def __init__(self, outputs=4, hand_out=lambda y, maps: y, channels=3):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.fc = nn.Linear(8, outputs)
        self.hand_out = hand_out

    def forward(self, x):
        maps = self.body(x)
        return self.hand_out(self.fc(maps.mean((2, 3))), maps)


def gradient(net, score):
    """d score(y) / d body, where y is what the linear layer gives: by hand, past the hand_out."""
    maps = net.body(X).detach().requires_grad_()
    y = net.fc(maps.mean((2, 3)))
    return torch.autograd.grad(score(y).sum(), maps)[0], y.detach()


def same_gradient(captured, expected):
    return torch.allclose(captured.gradients["body"], expected, atol=1e-6) and expected.any()


# ---- heads


def sigmoid(y):
    return 1 / (1 + np.exp(-y.numpy().astype(float)))


def softmax(y):
    e = np.exp(y.numpy().astype(float))
    return e / e.sum(1, keepdims=True)


def as_column(y, maps):
    return y


def as_vector(y, maps):
    return y[:, 0]


@pytest.mark.parametrize("hand_out", [as_column, as_vector])
@pytest.mark.parametrize("target, sign", [(0, -1), (1, 1)])
def test_one_logit_is_two_classes(hand_out, target, sign):
    """1 explains +y with probability sigmoid(y), 0 explains -y with sigmoid(-y)."""
    net = Net(1, hand_out)
    captured = cc.capture(net, X, "body", target)
    expected, y = gradient(net, lambda y: sign * y[:, 0])
    assert same_gradient(captured, expected)
    p = sigmoid(y)
    assert np.allclose(captured.probabilities.numpy(), np.hstack([1 - p, p]), atol=1e-6)
    assert np.allclose(cc.probabilities(net, X).numpy(), np.hstack([1 - p, p]), atol=1e-6)


def test_the_predicted_class_of_one_logit_is_its_sign():
    net = Net(1)
    _, y = gradient(net, lambda y: y)
    assert cc.capture(net, X, "body").target.tolist() == (y[:, 0] > 0).long().tolist()


def test_labels_have_probabilities_of_their_own():
    """Two labels at once: each by its own sigmoid, its logit explained."""
    net = Net(4)
    captured = cc.capture(net, X, "body", 2, head="sigmoid")
    expected, y = gradient(net, lambda y: y[:, 2])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities.numpy(), sigmoid(y), atol=1e-6)


def own_softmax(y, maps):
    return y.exp() / y.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("make", [lambda y, maps: y.softmax(1), own_softmax])
def test_a_softmax_inside_is_seen_and_not_taken_twice(make):
    net = Net(4, make)
    captured = cc.capture(net, X, "body", 2)
    expected, y = gradient(net, lambda y: y.log_softmax(1)[:, 2])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities.numpy(), softmax(y), atol=1e-6)
    assert np.allclose(cc.probabilities(net, X).numpy(), softmax(y), atol=1e-6)


def test_a_softmax_inside_as_a_last_module():
    inner = Net(4)
    net = nn.Sequential(inner, nn.Softmax(1))
    captured = cc.capture(net, X, "0.body", 2)
    expected, y = gradient(inner, lambda y: y.log_softmax(1)[:, 2])
    assert torch.allclose(captured.gradients["0.body"], expected, atol=1e-6)
    assert np.allclose(captured.probabilities.numpy(), softmax(y), atol=1e-6)


def test_log_probabilities_are_logits():
    net = Net(4, lambda y, maps: y.log_softmax(1))
    captured = cc.capture(net, X, "body", 2)
    expected, y = gradient(net, lambda y: y.log_softmax(1)[:, 2])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities.numpy(), softmax(y), atol=1e-6)


@pytest.mark.parametrize(
    "outputs, target, column, sign", [(4, 2, 2, 1), (1, 1, 0, 1), (1, 0, 0, -1)]
)
def test_a_sigmoid_inside_explains_log_odds(outputs, target, column, sign):
    """The log-odds of sigmoid(y) are y."""
    net = Net(outputs, lambda y, maps: y.sigmoid())
    captured = cc.capture(net, X, "body", target)
    expected, y = gradient(net, lambda y: sign * y[:, column])
    assert same_gradient(captured, expected)
    p = sigmoid(y)
    p = np.hstack([1 - p, p]) if outputs == 1 else p
    assert np.allclose(captured.probabilities.numpy(), p, atol=1e-6)


@pytest.mark.parametrize(
    "hand_out",
    [
        lambda y, maps: y.sigmoid().clamp(1e-6, 1 - 1e-6),
        lambda y, maps: 1 / (1 + torch.exp(-y)),
        lambda y, maps: torch.cat([y[:, :1].sigmoid(), y[:, 1:].sigmoid()], 1),
        lambda y, maps: y.sigmoid()[:, :, None, None],
    ],
)
def test_a_sigmoid_is_seen_behind_what_only_hands_it_on(hand_out):
    net = Net(4, hand_out)
    captured = cc.capture(net, X, "body", 2)
    expected, y = gradient(net, lambda y: y[:, 2])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities.numpy(), sigmoid(y), atol=1e-6)
    assert np.allclose(cc.probabilities(net, X).numpy(), sigmoid(y), atol=1e-6)


def test_a_softmax_over_groups_of_outputs():
    """Two questions of two classes each: the log-odds of a class are the difference to its rival's
    logit.
    """
    net = Net(4, lambda y, maps: y.view(-1, 2, 2).softmax(2).flatten(1))
    captured = cc.capture(net, X, "body", 2)
    expected, y = gradient(net, lambda y: y[:, 2] - y[:, 3])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities[:, 2:].numpy(), softmax(y[:, 2:]), atol=1e-6)
    one = Net(2, lambda y, maps: y.softmax(1)[:, 1])
    captured = cc.capture(one, X, "body", 1)
    expected, y = gradient(one, lambda y: y[:, 1] - y[:, 0])
    assert same_gradient(captured, expected)
    assert np.allclose(captured.probabilities.numpy(), softmax(y), atol=1e-6)


@pytest.mark.parametrize(
    "outputs, hand_out, message",
    [
        (1, lambda y, maps: y.softmax(1), "softmax over one output.*return the logit"),
        (4, lambda y, maps: y.sigmoid().log(), None),
        (4, lambda y, maps: torch.nn.functional.logsigmoid(y), "log-sigmoid.*return the logits"),
    ],
)
def test_a_last_operation_without_a_head_is_refused(outputs, hand_out, message):
    net = Net(outputs, hand_out)
    if message is None:  # a logarithm says nothing: taken for logits
        assert cc.capture(net, X, "body", 0).probabilities.shape == (3, 4)
        return
    with pytest.raises(ValueError, match=message):
        cc.capture(net, X, "body")
    assert cc.capture(net, X, "body", 0, head="none").probabilities is None


def test_values_between_0_and_1_are_taken_for_logits_with_a_word():
    with pytest.warns(UserWarning, match="All 12 outputs lie in .0, 1.*sigmoid_inside"):
        cc.capture(Net(4, lambda y, maps: (torch.tanh(y / 2) + 1) / 2), X, "body", 2)


@pytest.mark.parametrize("factor", [60, 1000])
def test_a_probability_that_rounds_to_one_has_its_map(factor):
    """d log p / d y = 1 - p comes from the other classes, where 1 - p rounds to 0."""
    net = Net(4, lambda y, maps: (factor * y).softmax(1))
    captured = cc.capture(net, X[:2], "body")
    maps = net.body(X[:2]).detach().double().requires_grad_()
    y = factor * net.double().fc(maps.mean((2, 3)))
    score = y.log_softmax(1).gather(1, captured.target[:, None]).sum()
    expected = torch.autograd.grad(score, maps)[0]
    for found, right in zip(captured.gradients["body"], expected, strict=True):
        scale = right.abs().max()
        assert torch.allclose(found.double() / scale, right / scale, 0, 1e-3)


@pytest.mark.parametrize(
    "hand_out",
    [lambda y, maps: (1000 * y).sigmoid(), lambda y, maps: (1e4 * y).softmax(1)],
)
def test_a_probability_of_exactly_0_or_1_is_refused_and_says_what_to_do(hand_out):
    for target in (None, 2):
        with pytest.raises(ValueError, match="return the logits in front of its softmax"):
            cc.capture(Net(4, hand_out), X, "body", target)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapper_hides_neither_head_nor_size(wrapper):
    net = Net(4)
    net.output_head, net.image_size = "sigmoid", (16, 24)
    expected = sigmoid(net(X).detach())
    wrapped = wrapper(net)
    assert np.allclose(cc.probabilities(wrapped, X).numpy(), expected, atol=1e-6)
    grey = torch.zeros_like(X)
    curves = cc.faithfulness(wrapped, X, {"m": X.abs()[:, 0]}, 1, ["a", "b", "c"], grey, grey)
    assert np.allclose(curves["insertion"]["m"][:, -1].numpy(), expected[:, 1], atol=1e-6)
    picture = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
    with pytest.warns(UserWarning, match="is unwrapped"):
        found = cc.explain(wrapped, picture, 1, layer="body", shallow_layer="body")
    assert (found.head, found.cam.shape) == ("sigmoid", (16, 24))
    _, info = cc.networks.load(wrapper(net))
    assert (info["head"], info["size"]) == ("sigmoid", (16, 24))


def test_values_have_maps_and_no_probabilities():
    net = Net(1)
    captured = cc.capture(net, X, "body", head="none")
    expected, y = gradient(net, lambda y: y[:, 0])
    assert same_gradient(captured, expected)
    assert captured.probabilities is None
    assert torch.allclose(captured.scores, y[:, 0])
    with pytest.raises(ValueError, match="no probabilities.*cc.explain"):
        cc.probabilities(net, X, head="none")
    with pytest.raises(ValueError, match="none of them is the predicted class"):
        cc.capture(Net(4), X, "body", head="none")


def test_a_network_says_its_head():
    net = Net(4)
    net.output_head = "sigmoid"
    _, y = gradient(net, lambda y: y)
    assert np.allclose(cc.probabilities(net, X).numpy(), sigmoid(y), atol=1e-6)
    net = Net(4)
    net.config = SimpleNamespace(problem_type="multi_label_classification")
    assert np.allclose(cc.probabilities(net, X).numpy(), sigmoid(y), atol=1e-6)


@pytest.mark.parametrize(
    "head, outputs, message",
    [("softmx", 4, "softmax"), ("logit", 4, "for one output"), ("softmax", 1, "would be 1")],
)
def test_a_head_that_cannot_be_is_refused(head, outputs, message):
    with pytest.raises(ValueError, match=message):
        cc.capture(Net(outputs), X, "body", head=head)


def test_loading_says_the_head_and_names_two_classes_of_one_logit():
    model, info = cc.networks.load(Net(1), class_names=["tumour"])
    assert info["head"] == model.output_head == "logit"
    assert info["class_names"] == ["not tumour", "tumour"]
    _, info = cc.networks.load(Net(4), head="sigmoid")
    assert (info["head"], info["head_source"]) == ("sigmoid", "as given")
    _, info = cc.networks.load(Net(4, own_softmax))
    assert info["head"] == "softmax_inside"


# ---- outputs

Pair = namedtuple("Pair", "features scores")


class Slots:
    __slots__ = ("features", "y")

    def __init__(self, features, y):
        self.features, self.y = features, y


def holding_itself(y, maps):
    output = SimpleNamespace(net=nn.Linear(3, 3), y=y)
    output.me = output
    return output


@pytest.mark.parametrize(
    "hand_out",
    [
        lambda y, maps: (y, 2 * y),
        lambda y, maps: [maps, y],
        lambda y, maps: {"loss": y.sum(), "logits": y, "features": maps.mean((2, 3))},
        lambda y, maps: {"features": maps, "anything": y},
        lambda y, maps: SimpleNamespace(hidden=maps, logits=y),
        lambda y, maps: Pair(maps, y),
        lambda y, maps: y[:, :, None, None],
        lambda y, maps: {"out": (maps, {"main": y})},
        lambda y, maps: {"features": maps.mean((2, 3)), "logits": [y]},
        lambda y, maps: deque([maps, y]),
        lambda y, maps: Slots(maps, y),
        holding_itself,
    ],
)
def test_the_logits_are_found_in_what_a_network_hands_out(hand_out):
    net = Net(4, hand_out)
    captured = cc.capture(net, X, "body", 2)
    expected, y = gradient(net, lambda y: y[:, 2])
    assert same_gradient(captured, expected)
    assert torch.allclose(captured.logits, y)
    assert np.allclose(cc.probabilities(net, X).numpy(), softmax(y), atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 4])
def test_one_image_may_have_lost_its_side(outputs):
    """`.squeeze()` in a forward: () or (K,) for one image."""
    net = Net(outputs, lambda y, maps: y.squeeze())
    captured = cc.capture(net, X[:1], "body", 1)
    expected, y = gradient(net, lambda y: y[:, outputs // 4])  # the one, or the second
    assert torch.allclose(captured.gradients["body"][0], expected[0], atol=1e-6)
    assert torch.allclose(captured.logits, y[:1])
    p = sigmoid(y) if outputs == 1 else softmax(y)
    assert np.allclose(cc.probabilities(net, X[:1])[:, -1].numpy(), p[:1, -1], atol=1e-6)
    assert np.allclose(cc.probabilities(net, X)[:, -1].numpy(), p[:, -1], atol=1e-6)


def test_more_ways_to_write_one_output():
    expected = Net(4)(X)
    captured = cc.capture(Net(4, lambda y, maps: y[:, None]), X, "body", 2)
    assert torch.allclose(captured.logits, expected)
    captured = cc.capture(Net(4, lambda y, maps: (y.squeeze(), maps)), X[:1], "body", 2)
    assert torch.allclose(captured.logits, expected[:1], atol=1e-6)


@pytest.mark.parametrize(
    "hand_out",
    [lambda y, maps: {"cat": y[:, 0], "dog": y[:, 1]}, lambda y, maps: y.split(1, 1)],
)
def test_a_class_in_each_output_is_told_of(hand_out):
    with pytest.warns(UserWarning, match="several.*first is explained"):
        cc.capture(Net(4, hand_out), X, "body", 1)


def test_of_several_outputs_the_first_is_taken_with_a_word():
    net = Net(4, lambda y, maps: (y, maps.mean((2, 3))))
    with pytest.warns(UserWarning, match=r"output\[0\] \(3, 4\), output\[1\] \(3, 8\)"):
        captured = cc.capture(net, X, "body", 2)
    assert same_gradient(captured, gradient(net, lambda y: y[:, 2])[0])


@pytest.mark.parametrize(
    "hand_out, message",
    [
        (lambda y, maps: maps, r"output \(3, 8, 8, 8\).*segmentation.*target function"),
        (lambda y, maps: {"out": maps}, r"output.out \(3, 8, 8, 8\)"),
        (lambda y, maps: (y.argmax(1),), r"output\[0\] \(3,\) torch.int64"),
        (lambda y, maps: "a label", "got str"),
    ],
)
def test_an_output_without_logits_says_what_came_out(hand_out, message):
    with pytest.raises(ValueError, match=message):
        cc.capture(Net(4, hand_out), X, "body")


def test_a_segmentation_is_refused_when_it_is_loaded():
    with pytest.raises(ValueError, match="segmentation.*wrap the model"):
        cc.networks.load(Net(4, lambda y, maps: maps))


# ---- target functions


def test_a_target_function_reads_the_output():
    """The mean of one channel of a segmentation, differentiated."""
    net = Net(4, lambda y, maps: {"out": 2 * maps})
    captured = cc.capture(net, X, "body", lambda output: output["out"][:, 5].mean((1, 2)))
    expected = torch.zeros(3, 8, 8, 8)
    expected[:, 5] = 2 / 64
    assert same_gradient(captured, expected)
    assert captured.target is None and captured.logits is None and captured.probabilities is None
    assert torch.allclose(captured.scores, 2 * net.body(X)[:, 5].mean((1, 2)))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda y: y, r"returned torch.float32 \(3, 4\)"),
        (lambda y: y[:, 0].sum(), r"returned torch.float32 \(\)"),
        (lambda y: y.argmax(1), "returned torch.int64"),
        (lambda y: [1, 2, 3], "returned list"),
        (lambda y: y["masks"], "function fails on this network's output.*Tensor: output"),
        (lambda y: y[:, 9], r"IndexError: index 9.*output \("),
        (lambda y: y[:, 1].detach(), "no gradient.*detach"),
    ],
)
def test_a_target_function_returns_one_score_per_image(function, message):
    with pytest.raises(ValueError, match=message):
        cc.capture(Net(4), X, "body", function)
    with pytest.raises(ValueError, match="target: the function"):
        cc.default_layers(Net(4), X, lambda y: [1.0])


@pytest.mark.parametrize(
    "function", [lambda y: y[:, 1] - y[:, 1].mean(), lambda y: y.softmax(0)[:, 1]]
)
def test_a_target_function_may_not_mix_the_images_of_a_batch(function):
    grey = torch.zeros_like(X)
    with pytest.raises(ValueError, match="mixes the images of a batch"):
        cc.capture(Net(4), X, "body", function)
    with pytest.raises(ValueError, match="mixes the images of a batch"):
        cc.faithfulness(Net(4), X, {"m": X.abs()[:, 0]}, function, ["a", "b", "c"], grey, grey)


@pytest.mark.parametrize("target", [1, [1, 1, 1], np.int64(1), torch.tensor(1)])
def test_what_is_measured_takes_every_kind_of_class(target):
    net, grey = Net(4), torch.zeros_like(X)
    curves = cc.faithfulness(net, X, {"m": X.abs()[:, 0]}, target, ["a", "b", "c"], grey, grey)
    expected = softmax(net(X).detach())[:, 1]
    assert np.allclose(curves["insertion"]["m"][:, -1].numpy(), expected, atol=1e-6)
    for wrong, message in ((9, "out of range"), (None, "give the class"), ([1, 2], "2 entries")):
        with pytest.raises(ValueError, match=message):
            cc.faithfulness(net, X, {"m": X.abs()[:, 0]}, wrong, ["a", "b", "c"], grey, grey)


def test_a_target_function_in_every_place_that_takes_a_target():
    net = Net(4)

    def margin(output):
        return output[:, 2] - output[:, 1]

    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(margin(net(x)).sum(), x)[0]
    assert torch.allclose(cc.input_gradient(net, X, margin), expected, atol=1e-6)

    attributed = cc.integrated_gradients(net, X, margin, steps=64)
    difference = (margin(net(X)) - margin(net(torch.zeros_like(X)))).detach()
    assert torch.allclose(attributed.sum((1, 2, 3)), difference, atol=2e-2)

    ids = ["a", "b", "c"]
    maps = {"m": torch.rand(3, 16, 16)}
    grey = torch.zeros_like(X)
    curves = cc.faithfulness(net, X, maps, margin, ids, grey, grey, steps=4)
    assert torch.allclose(curves["insertion"]["m"][:, -1], margin(net(X)), atol=1e-5)
    assert torch.allclose(curves["deletion"]["m"][:, -1], margin(net(grey)), atol=1e-5)

    found = cc.explain(net, X[0], margin, layer="body", shallow_layer="body")
    assert found.target is None and found.probability is None
    assert found.score == pytest.approx(float(margin(net(X[:1]).detach())), abs=1e-5)


# ---- Finer-CAM


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_finer_cam_subtracts_the_rival(gamma):
    """y_c - gamma * y_r, for classes that are named and for the two likeliest."""
    net = Net(4)
    captured = cc.capture(net, X, "body", cc.finer_target(2, 1, gamma))
    expected, y = gradient(net, lambda y: y[:, 2] - gamma * y[:, 1])
    assert same_gradient(captured, expected)

    first, second = y.topk(2, 1).indices.T
    places = torch.arange(3)
    captured = cc.capture(net, X, "body", cc.finer_target(gamma=gamma))
    expected, _ = gradient(net, lambda y: y[places, first] - gamma * y[places, second])
    assert same_gradient(captured, expected)

    found = cc.explain(net, X[0], layer="body", shallow_layer="body", rival="auto", gamma=gamma)
    assert (found.target, found.rival) == (int(first[0]), int(second[0]))
    assert found.score == pytest.approx(float(y[0, first[0]] - gamma * y[0, second[0]]), abs=1e-5)


def test_finer_cam_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="is the target itself"):
        cc.capture(Net(4), X, "body", cc.finer_target(2, 2))
    with pytest.raises(ValueError, match="gamma=-1"):
        cc.finer_target(2, 1, gamma=-1)
    with pytest.raises(ValueError, match="rival"):
        cc.explain(Net(4), X[0], lambda y: y[:, 0], layer="body", rival=1)


# ---- whole runs


def test_what_is_measured_of_one_logit_is_the_probability_of_its_class(tmp_path):
    """With softmax over one output all curves would be constant 1."""
    net = Net(1)
    maps = {"m": torch.rand(3, 16, 16)}
    grey = torch.zeros_like(X)
    target = torch.tensor([0, 1, 0])
    curves = cc.faithfulness(net, X, maps, target, ["a", "b", "c"], grey, grey, steps=4)
    p = sigmoid(net(X).detach())[:, 0]
    expected = np.where(target.numpy() == 1, p, 1 - p)
    assert np.allclose(curves["insertion"]["m"][:, -1].numpy(), expected, atol=1e-6)
    assert np.ptp(curves["deletion"]["m"].numpy(), axis=1).max() > 1e-3


def test_explain_tells_the_probabilities_of_the_head():
    picture = Image.fromarray(np.full((20, 30, 3), 90, np.uint8))
    net = Net(4)
    net.image_size = 16
    found = cc.explain(net, picture, 1, layer="body", shallow_layer="body", head="sigmoid")
    assert found.head == "sigmoid" and len(found.probabilities) == 4
    assert found.probability == pytest.approx(1 / (1 + np.exp(-found.score)), abs=1e-6)


def test_nothing_is_warned_of_in_an_ordinary_network():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cc.capture(Net(4), X, "body")
        cc.probabilities(Net(4), X)
