"""Where a network is asked, `default_layers` and `stages`: found by what its graph does.

Expected layers were read from the networks' code; timm's and Hugging Face's module names are real.
"""

from __future__ import annotations

import nets
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

import cam_core as cc


def picture(height: int, width: int | None = None, channels: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, height, width or height, generator=draw)


# name: (side of the input, deep, shallow)
TIMM = {
    "resnet10t": (64, "layer4", "layer2"),
    "convnext_atto": (64, "stages", "stages.1"),
    "poolformer_s12": (64, "stages", "stages.1"),
    "tiny_vit_5m_224": (224, "stages", "stages.2.downsample.act1"),  # tokens turned into maps
    "mixer_s32_224": (224, "norm", "blocks.3"),  # one resolution, no class token
    "vit_tiny_patch16_224": (224, "blocks.11.norm1", "blocks.5.norm1"),
    "deit_tiny_distilled_patch16_224": (224, "blocks.11.norm1", "blocks.5.norm1"),
    "cait_xxs24_224": (224, "blocks", "blocks.11"),  # two layers read the same patches at the end
    "pit_ti_224": (224, "transformers.2.blocks.3.norm1", "transformers.0.blocks"),
    "sequencer2d_s": (224, "norm", "stages.0"),  # channels last
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    side, deep, shallow = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for p in model.parameters():
        if p.ndim == 2 and len(p) == 5:  # the head, which may start at 0
            nn.init.normal_(p, std=0.2)
    assert cc.default_layers(model, picture(side)) == (deep, shallow)


def test_one_relu_for_a_whole_network_and_padding_by_modules():
    """No activation of EfficientNet-Lite can be captured: its blocks' ends can."""
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    found = cc.stages(model, picture(224))
    assert found == {
        "_blocks.0": 112,
        "_blocks.2": 56,
        "_blocks.4": 28,
        "_blocks.10": 14,
        "_blocks.15": 7,
    }
    assert cc.default_layers(model, picture(224)) == ("_blocks.15", "_blocks.4")


# ---- ViT: the same weights under other names


def as_timm(ours: nn.Module) -> nn.Module:
    """torchvision's small ViT as timm writes it."""
    theirs = timm.models.VisionTransformer(
        32, 8, num_classes=4, embed_dim=16, depth=12, num_heads=2, mlp_ratio=2
    ).eval()
    state = {
        "cls_token": ours.class_token,
        "pos_embed": ours.encoder.pos_embedding,
        "patch_embed.proj.weight": ours.conv_proj.weight,
        "patch_embed.proj.bias": ours.conv_proj.bias,
    }
    for name, tensor in ours.encoder.ln.state_dict().items():
        state[f"norm.{name}"] = tensor
    for name, tensor in ours.heads.head.state_dict().items():
        state[f"head.{name}"] = tensor
    renamed = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    for k, block in enumerate(ours.encoder.layers):
        for name, tensor in block.state_dict().items():
            for old, new in renamed.items():
                name = name.replace(old, new)
            state[f"blocks.{k}.{name}"] = tensor
    theirs.load_state_dict(state)
    return theirs


def test_the_same_vit_in_torchvision_and_in_timm_gives_the_same_hybrid():
    ours = nets.network("small_vit", seed=1, classes=4)
    theirs, x = as_timm(ours), picture(32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert cc.default_layers(theirs, x) == ("blocks.11.norm1", "blocks.5.norm1")
    maps = [torch.from_numpy(cc.explain(model, x[0], target=1).cam) for model in (ours, theirs)]
    assert maps[0].std() > 0
    assert torch.corrcoef(torch.stack([m.flatten() for m in maps]))[0, 1] > 0.999


class Layer(nn.Module):
    """A layer of Hugging Face's ViT: query, key and value one by one."""

    def __init__(self, in_tuples, width=16):
        super().__init__()
        self.in_tuples = in_tuples
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.dense = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x):
        y = self.layernorm_before(x)
        heads = [m(y).unflatten(2, (2, -1)).mT.mT for m in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in heads))
        x = x + self.dense(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.layernorm_after(x))
        return (x, None) if self.in_tuples else x


class HuggingFaceViT(nn.Module):
    def __init__(self, in_tuples=False, zero=False):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.layer = nn.ModuleList(Layer(in_tuples) for _ in range(8))
        self.layernorm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 3)
        if zero:
            nn.init.zeros_(self.classifier.weight)

    def forward(self, x):
        x = torch.cat([self.token, self.patches(x).flatten(2).mT], 1)
        for layer in self.layer:
            x = layer(x)[0] if layer.in_tuples else layer(x)
        return self.classifier(self.layernorm(x)[:, 0])


@pytest.mark.parametrize("in_tuples", [False, True])
def test_query_key_and_value_by_three_modules(in_tuples):
    expected = ("layer.7.layernorm_before", "layer.3.layernorm_before")
    assert cc.default_layers(HuggingFaceViT(in_tuples).eval(), picture(32)) == expected


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (lambda: nets.models.VisionTransformer(32, 8, 12, 2, 16, 32), "heads.head"),
        (lambda: timm.create_model("mixer_s32_224"), "head"),
        (lambda: HuggingFaceViT(zero=True), "classifier"),
    ],
)
def test_a_head_of_zeros_is_named(model, head):
    model = model().eval()
    x = picture(224 if head == "head" else 32)
    with pytest.raises(ValueError, match=f"'{head}' are all zero.*load trained weights"):
        cc.default_layers(model, x)


# ---- steps on the way are no places


class Head(nn.Module):
    """A body, an activation that no module shows, the mean and a linear map."""

    def __init__(self, *body, width, act=F.relu):
        super().__init__()
        self.body, self.fc, self.act = nn.Sequential(*body), nn.Linear(width, 3), act

    def forward(self, x):
        return self.fc(self.act(self.body(x)).mean((2, 3)))


def conv(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, 1)


STEM = (conv(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 8, 2), nn.ReLU())


@pytest.mark.parametrize("act", [F.relu, lambda x: F.relu_(x), F.silu, lambda x: x * x.sigmoid()])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), nn.Identity])
def test_what_feeds_an_activation_is_no_place(norm, act):
    model = Head(*STEM, conv(8, 8), norm(8), width=8, act=act).eval()
    assert cc.default_layers(model, picture(32)) == ("body.4", "body.2")


def test_a_norm_that_feeds_a_downsampling_convolution_is_no_place():
    body = [*STEM, nn.GroupNorm(1, 8), conv(8, 8, 2), nn.ReLU()]
    assert list(cc.stages(Head(*body, width=8).eval(), picture(32))) == ["body.2", "body.4", "body"]


@pytest.mark.parametrize("pad", [nn.ZeroPad2d(2), nn.ReflectionPad2d(1)])
def test_padding_is_no_place(pad):
    body = [*STEM, pad, nn.Conv2d(8, 8, 3, 2), nn.ReLU()]
    found = cc.stages(Head(pad, *body, width=8).eval(), picture(32))
    assert list(found) == ["body.3", "body.5", "body"]


# ---- other shapes and ways of writing


def test_one_channel_pooled_along_one_side():
    """As many channels as rows: (64, 64, 16) has its channels first."""
    model = nn.Sequential(
        *[
            nn.Conv2d(1, 64, 3, (2, 2), 1),
            nn.ReLU(),
            nn.MaxPool2d((1, 4)),
            nn.Conv2d(64, 64, 3, 1, 1),
        ],
        *[nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)],
    ).eval()
    x = picture(128, 128, channels=1)
    assert cc.layer_shapes(model, x)["5"] == (64, 64, 16)
    assert cc.default_layers(model, x) == ("5", "1")
    assert cc.capture(model, x, "5", 0).activations["5"].shape == (1, 64, 64, 16)


class FunctionalHead(nn.Module):
    """The classifier is a parameter, and its answer comes with that of an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.body, self.weight = nn.Sequential(*STEM), nn.Parameter(torch.randn(3, 8))
        self.aux = nn.Sequential(conv(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.auxiliary = nn.Linear(8, 3)

    def forward(self, x):
        y = self.body(x)
        return F.linear(y.mean((2, 3)), self.weight), self.auxiliary(self.aux(y))


def test_a_functional_head_and_an_auxiliary_one():
    assert cc.default_layers(FunctionalHead().eval(), picture(32)) == ("body", "body.2")


class Shared(nn.Module):
    """One ReLU, handed to all blocks."""

    def __init__(self, before, after, relu):
        super().__init__()
        self.conv, self.norm, self.relu = conv(before, after, 2), nn.BatchNorm2d(after), relu

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


def test_blocks_that_end_in_one_shared_relu():
    relu = nn.ReLU(inplace=True)
    model = nn.ModuleDict({"relu": relu})
    model["blocks"] = nn.Sequential(Shared(3, 4, relu), Shared(4, 8, relu), Shared(8, 8, relu))
    model["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.forward = lambda x: model["head"](model["blocks"](x))
    assert list(cc.stages(model.eval(), picture(32))) == ["blocks.0", "blocks.1", "blocks"]


def test_no_place_without_a_word():
    class Cut(nn.Module):
        def forward(self, x):
            return x.detach()

    model = nn.Sequential(*STEM, Cut(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="do not depend on its input, as far as autograd sees"):
        cc.default_layers(model.eval(), picture(32))


def test_a_network_of_functions_says_where_a_module_helps():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = conv(3, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x).relu()).relu().mean((2, 3)))

    with pytest.raises(ValueError, match="self.maps = nn.Identity"):
        cc.default_layers(Twice(), picture(32))


def test_a_classifier_of_zeros_is_told_of():
    model = Head(*STEM, width=8).eval()
    nn.init.zeros_(model.fc.weight)
    with pytest.warns(UserWarning, match="Every gradient is zero"):
        found = cc.explain(model, picture(32), 1)
    assert not found.cam.any()


def test_one_forward_pass_finds_them():
    model, passes = nets.resnet18(), []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        cc.default_layers(model, picture(64))
    finally:
        handle.remove()
    assert len(passes) == 1
