"""Similarity of maps and the randomisation cascade (Adebayo et al., NeurIPS 2018)."""

from __future__ import annotations

import oracle
import pytest
import torch
from nets import images, network, resnet18, state, tiny
from torch import nn

import cam_core as cc


def maps(count=3, size=(11, 9), seed=0):
    """With plateaus, so that ranks are shared."""
    m = torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))
    return (8 * m).round() / 8


# ---- similarity


def test_similarity_equals_the_oracle():
    a, b = maps(), maps(seed=10)
    b[1] = (a[1] + 0.2 * b[1]).clamp(max=1)
    found = cc.similarity(a, b)
    pairs = list(zip(a.numpy(), b.numpy(), strict=True))
    assert found["spearman"].tolist() == pytest.approx([oracle.spearman(p, q) for p, q in pairs])
    assert found["ssim"].tolist() == pytest.approx([oracle.ssim(p, q) for p, q in pairs])
    assert found["spearman"][1] > 0.8 > found["spearman"][0]


def test_similarity_with_itself_its_opposite_and_another_scale():
    m = maps()
    same, opposite, cubed = (cc.similarity(m, other) for other in (m, 1 - m, m**3))
    assert same["spearman"].tolist() == same["ssim"].tolist() == pytest.approx([1] * 3)
    assert opposite["spearman"].tolist() == pytest.approx([-1] * 3)
    assert (opposite["ssim"] < 0.1).all()
    assert cubed["spearman"].tolist() == pytest.approx([1] * 3)  # only order counts
    assert (cubed["ssim"] < 0.99).all()


def test_constant_maps_count_as_no_correlation_and_are_counted():
    m, flat = maps(3), torch.zeros(3, 11, 9)
    m[1] = 0.5
    flat[1:] = maps(3)[1:]
    found = cc.similarity(m, flat)
    assert found["constant"].tolist() == [True, True, False]
    assert found["spearman"].tolist() == pytest.approx([0, 0, 1])
    both = cc.similarity(flat[:1], flat[:1])
    assert both["spearman"][0] == 0 and both["ssim"][0] == 1


# ---- the cascade

RESNET = ["fc", *(f"layer{k}.{i}" for k in (4, 3, 2, 1) for i in (1, 0)), "conv1"]
STAGES = {  # the stages, and which modules belong to the last one besides itself
    "tiny": (["11", "9", "4", "0"], {"4": ["5"], "0": ["1"]}),
    "resnet18": (RESNET, {"conv1": ["bn1"]}),
}


def moved(net):
    """A copy of a network with no parameter at an initial value."""
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return net


def changed(a, b):
    """Names of tensors that differ, counters of batches aside."""
    a, b = a.state_dict(), b.state_dict()
    differ = {name for name in a if not torch.equal(a[name], b[name])}
    return {name for name in differ if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("arch", STAGES)
def test_each_stage_randomises_exactly_itself_and_all_behind(arch):
    net = moved(tiny(3) if arch == "tiny" else network("resnet18"))
    names, besides = STAGES[arch]
    before, expected, found = state(net), set(), []
    everything = [k for k in net.state_dict() if not k.endswith("num_batches_tracked")]
    for name, copy in cc.randomise_cascade(net, seed=1):
        found.append(name)
        own = [name, *besides.get(name, [])]
        expected |= {k for k in everything if any(k.startswith(f"{m}.") for m in own)}
        assert changed(net, copy) == expected
    assert found == names and expected == set(everything)
    assert state(net) == before


def test_the_cascade_is_reproducible_and_its_seed_counts():
    net = moved(tiny(3))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = [copy for _, copy in cc.randomise_cascade(net, seed=1)]
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers are not used up
    two = [copy for _, copy in cc.randomise_cascade(net, seed=1)]
    assert not any(changed(a, b) for a, b in zip(one, two, strict=True))
    for a, b in zip(one, one[1:], strict=False):  # what has been randomised stays as it is
        assert not changed(net, a) & changed(a, b)
    other = [copy for _, copy in cc.randomise_cascade(net, seed=2)][-1]
    weights = {k for k, p in net.named_parameters() if p.ndim > 1}
    assert weights <= changed(one[-1], other)
    shifted = [copy for _, copy in cc.randomise_cascade(moved(net), seed=1)][-1]
    assert not changed(one[-1], shifted)  # nothing of the original is left


def test_every_layer_has_a_seed_of_its_own():
    """Two layers of one shape never get the same values, nor the same draws at another scale."""
    *_, (_, last) = cc.randomise_cascade(resnet18())
    starts = [p.detach().flatten()[:8] for p in last.parameters() if p.ndim > 1]
    ratios = {tuple((start / start[0]).round(decimals=3).tolist()) for start in starts}
    assert len(ratios) == len(starts)


def test_frozen_parameters_modes_and_layout_stay_and_batch_norm_forgets():
    net = tiny(1).to(memory_format=torch.channels_last).requires_grad_(False)
    net[9].weight.requires_grad_(True)
    net[1].train()
    for _, copy in cc.randomise_cascade(net):
        for name, p in net.named_parameters():
            assert copy.get_parameter(name).requires_grad == p.requires_grad
        assert [m.training for m in copy.modules()] == [m.training for m in net.modules()]
        assert copy[4].weight.is_contiguous(memory_format=torch.channels_last)
    for layer in (copy[1], copy[5]):
        assert not layer.running_mean.any() and (layer.running_var == 1).all()


def test_bare_parameters_and_attention_are_randomised_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1))
            self.attention = nn.MultiheadAttention(4, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 4))
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p += 7
    steps = list(cc.randomise_cascade(net))
    assert [name for name, _ in steps] == ["head", "blocks.1", "blocks.0"]
    assert changed(net, steps[-1][1]) == set(net.state_dict())
    assert "token" not in changed(net, steps[1][1]) and "norm.weight" in changed(net, steps[1][1])
    assert steps[-1][1].token.abs().max() < 0.2


@pytest.mark.parametrize("arch", ["squeezenet1_1", "small_densenet", "small_convnext", "small_vit"])
def test_other_kinds_are_fully_randomised(arch):
    net = moved(network(arch))
    names, copies = zip(*cc.randomise_cascade(net), strict=True)
    assert {name for name, _ in net.named_parameters()} <= changed(net, copies[-1])
    assert len(set(names)) == len(names)
    x = images(1, (32, 32))
    assert not torch.allclose(copies[-1](x), net(x))
