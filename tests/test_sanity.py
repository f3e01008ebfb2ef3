"""Similarity of maps and the randomisation cascade (Adebayo et al., NeurIPS 2018)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from nets import images, network, settle, state, tiny
from torch import nn

import cam_core as cc


def maps(count=3, size=(11, 9), seed=0):
    """With plateaus, so that ranks are shared."""
    return (8 * torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))).round() / 8


# ---------------------------------------------------------------------------------------------------------- similarity


@pytest.mark.parametrize("seed", range(3))
def test_similarity_equals_the_oracle(seed):
    a, b = maps(seed=seed), maps(seed=seed + 10)
    b[1] = (a[1] + 0.2 * b[1]).clamp(max=1)
    found = cc.similarity(a, b)
    pairs = list(zip(a.numpy(), b.numpy(), strict=True))
    assert found["spearman"].tolist() == pytest.approx([oracle.spearman(p, q) for p, q in pairs])
    assert found["ssim"].tolist() == pytest.approx([oracle.ssim(p, q) for p, q in pairs])
    assert not found["constant"].any() and found["spearman"][1] > 0.8 > found["spearman"][0]


def test_similarity_with_itself_and_with_its_opposite():
    m = maps()
    same, opposite = cc.similarity(m, m), cc.similarity(m, 1 - m)
    assert same["spearman"].tolist() == pytest.approx([1] * 3) and same["ssim"].tolist() == pytest.approx([1] * 3)
    assert opposite["spearman"].tolist() == pytest.approx([-1] * 3) and (opposite["ssim"] < 0.1).all()
    assert cc.similarity(m, m**3)["spearman"].tolist() == pytest.approx([1] * 3)  # only order counts
    assert (cc.similarity(m, m**3)["ssim"] < 0.99).all()


def test_constant_maps_count_as_no_correlation_and_are_counted():
    m, flat = maps(4), torch.zeros(4, 11, 9)
    flat[1] = 0.7
    flat[2:] = m[2:]
    m[2] = 0.5
    with np.errstate(all="raise"):
        found = cc.similarity(m, flat)
    assert found["constant"].tolist() == [True, True, True, False]
    assert found["spearman"].tolist() == pytest.approx([0, 0, 0, 1])
    both = cc.similarity(flat[:1], flat[:1])
    assert both["spearman"].tolist() == [0] and both["constant"].tolist() == [True] and both["ssim"].tolist() == [1]


def test_similarity_errors():
    m = maps()
    for other in (m[:2], maps(size=(9, 11)), 2 * m, m - 0.5, torch.full_like(m, torch.nan)):
        for pair in ((m, other), (other, m)):
            with pytest.raises(ValueError):
                cc.similarity(*pair)
    with pytest.raises(ValueError, match="maps must have shape"):
        cc.similarity(m, m[:2])


# ------------------------------------------------------------------------------------------------------------- cascade

RESNET = ["fc", *(f"layer{k}.{i}" for k in (4, 3, 2, 1) for i in (1, 0)), "conv1"]
SQUEEZENET = ["classifier.1", *(f"features.{k}" for k in (12, 11, 10, 9, 7, 6, 4, 3)), "features.0"]
STAGES = {"resnet18": RESNET, "squeezenet1_1": SQUEEZENET}


@pytest.fixture(scope="module", params=[*STAGES, "tiny"])
def case(request):
    """A network with weights and statistics away from any initial value, its stages, and which parameters each has."""
    net = tiny(3) if request.param == "tiny" else network(request.param, seed=3)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    if request.param == "tiny":
        return net, ["11", "9", "4", "0"], {"0": ["0", "1"], "4": ["4", "5"], "9": ["9"], "11": ["11"]}
    if request.param == "resnet18":
        return net, RESNET, {s: [s, "bn1"] if s == "conv1" else [s] for s in RESNET}
    return net, SQUEEZENET, {s: [s] for s in SQUEEZENET}


def changed(a, b):
    """Names of tensors that differ, counters of batches aside."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return {k for k in a if not torch.equal(a[k], b[k]) and not k.endswith("num_batches_tracked")}


def test_each_stage_randomises_exactly_itself_and_all_behind(case):
    net, names, members = case
    before, expected = state(net), set()
    everything = {k for k in net.state_dict() if not k.endswith("num_batches_tracked")}
    found = []
    for name, copy in cc.randomise_cascade(net, seed=1):
        found.append(name)
        expected |= {k for k in everything if any(k.startswith(f"{m}.") for m in members[name])}
        assert changed(net, copy) == expected
        assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in copy.parameters()}
    assert found == names and expected == everything
    assert state(net) == before


def test_the_cascade_is_reproducible_and_its_seed_counts(case):
    net = case[0]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = [c for _, c in cc.randomise_cascade(net, seed=1)]
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers go on as they would have
    two = [c for _, c in cc.randomise_cascade(net, seed=1)]
    assert not any(changed(a, b) for a, b in zip(one, two, strict=True))
    other = [c for _, c in cc.randomise_cascade(net, seed=2)][-1]
    weights = {k for k, p in net.named_parameters() if p.ndim > 1}
    assert weights <= changed(one[-1], other)
    for a, b in zip(one, one[1:], strict=False):  # what has been randomised stays as it is from then on
        assert not changed(net, a) & changed(a, b)


def test_every_layer_has_a_seed_of_its_own(case):
    """Two layers of one shape never get the same values."""
    last = [c for _, c in cc.randomise_cascade(case[0], seed=0)][-1]
    weights = [p.detach().flatten() for p in last.parameters() if p.ndim > 1]
    same_size = [(a, b) for k, a in enumerate(weights) for b in weights[:k] if a.shape == b.shape]
    assert not any(torch.equal(a, b) for a, b in same_size)
    starts = [tuple(w[:8].tolist()) for w in weights]  # nor the same draws at another scale
    ratios = {tuple(round(v / s[0], 3) for v in s) for s in starts}
    assert len(ratios) == len(starts)


def test_a_fully_randomised_network_knows_nothing_of_the_original(case):
    net, x = case[0], images(2, (64, 64))
    last = [c for _, c in cc.randomise_cascade(net, seed=4)][-1]
    with torch.no_grad():
        saved = {k: v.clone() for k, v in net.state_dict().items()}
        for p in net.parameters():
            p += 1
        again = [c for _, c in cc.randomise_cascade(net, seed=4)][-1]
        net.load_state_dict(saved)
        assert torch.equal(last(x), again(x)) and not torch.allclose(last(x), net(x))


def test_frozen_parameters_modes_and_layout_stay():
    net = settle(tiny(1), 1).to(memory_format=torch.channels_last).requires_grad_(False)
    net[9].weight.requires_grad_(True)
    net[1].train()
    for _, copy in cc.randomise_cascade(net):
        assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in net.parameters()]
        assert [m.training for m in copy.modules()] == [m.training for m in net.modules()]
        assert copy[4].weight.is_contiguous(memory_format=torch.channels_last)
        assert not any(p.grad_fn for p in copy.parameters())


def test_batch_norm_forgets_its_statistics():
    copy = [c for _, c in cc.randomise_cascade(tiny(1))][-1]
    for layer in (copy[1], copy[5]):
        assert not layer.running_mean.any() and (layer.running_var == 1).all() and not layer.bias.any()


def test_bare_parameters_and_attention_are_randomised_too():
    """A class token of the network itself, a scale in a block, packed attention weights, and a layer norm."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4, 1), 3.0))
            self.attention = nn.MultiheadAttention(4, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.full((1, 4), 5.0))
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p += 7
    steps = list(cc.randomise_cascade(net))
    assert [name for name, _ in steps] == ["head", "blocks.1", "blocks.0"]
    assert changed(net, steps[-1][1]) == set(net.state_dict())
    assert "token" not in changed(net, steps[1][1]) and "norm.weight" in changed(net, steps[1][1])
    assert steps[-1][1].token.abs().max() < 0.2
    assert not steps[-1][1].blocks[0].attention.in_proj_bias.any()  # attention's own initialisation, not the bare one


@pytest.mark.parametrize("arch", ["googlenet", "mobilenet_v2", "densenet121", "convnext_tiny"])
def test_other_architectures_are_fully_randomised(arch):
    net = network(arch)
    with torch.no_grad():
        for p in net.parameters():
            p += 1
    names, last = [], net
    for name, copy in cc.randomise_cascade(net):
        names.append(name)
        last = copy
    assert {k for k, _ in net.named_parameters()} <= changed(net, last)
    assert (
        len(set(names)) == len(names)
        and 8 <= len(names) <= 25
        and names[0] in ("fc", "classifier.1", "classifier", "classifier.2")
    )


def test_maps_of_a_randomised_network_are_other_maps():
    """What the notebook does with it, in small."""
    net, x = tiny(2), images(2, (24, 20))
    shot = cc.capture(net, x, "4")
    original = cc.enlarge(cc.grad_cam(shot.activations["4"], shot.gradients["4"]), (24, 20))
    for _, copy in cc.randomise_cascade(net):
        again = cc.capture(copy, x, "4", shot.target)
        m = cc.enlarge(cc.grad_cam(again.activations["4"], again.gradients["4"]), (24, 20))
        found = cc.similarity(original, m)
        assert (found["spearman"] < 0.999).all() and np.isfinite(found["ssim"]).all()
