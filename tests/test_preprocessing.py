"""How a picture becomes a network's input: whose word counts, and what comes out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_heads import Net
from torch import nn
from torchvision.transforms import v2

import cam_core as cc

networks = cc.networks


@pytest.fixture
def picture():
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (9, 13, 3), np.uint8)
    return Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)


# ---- the packaged networks


@pytest.mark.parametrize("arch, side", [("efficientnet_lite0", 224), ("efficientnet_lite2", 260)])
def test_a_packaged_network_needs_no_download_and_has_its_own_scaling(arch, side, picture):
    """(255 x - 127) / 128, at its own size."""
    model, info = networks.load(arch)
    assert info["size"] == side and len(info["class_names"]) == 1000
    x = networks.preprocess(picture, info["preprocessing"])
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    assert np.allclose(x[0].permute(1, 2, 0).numpy(), (pixels - 127) / 128, atol=1e-5)


def test_a_packaged_network_recognises_photographs():
    """Chelsea is a cat, and the cup of coffee an espresso, among the five likeliest classes."""
    from skimage import data

    model, info = networks.load("auto", "imagenet")
    assert info["arch"] == "efficientnet_lite0"
    x = networks.preprocess(
        [Image.fromarray(data.chelsea()), Image.fromarray(data.coffee())], info["preprocessing"]
    )
    top = cc.probabilities(model, x).topk(5).indices.tolist()
    names = [[info["class_names"][k] for k in row] for row in top]
    assert {"tabby", "tiger cat", "Egyptian cat"} & set(names[0])
    assert "espresso" in names[1]


# ---- whose word counts


def test_torchvisions_weights_bring_their_own():
    for arch in ("resnet18", "efficientnet_b7", "swin_v2_t"):
        entry = networks.torchvision.models.get_model_weights(arch).DEFAULT
        found = networks._of_torchvision(entry)
        transforms = entry.transforms()
        assert found.size == (transforms.crop_size[0],) * 2
        assert list(found.mean) == transforms.mean and list(found.std) == transforms.std
        assert found.interpolation == transforms.interpolation.value
        assert found.shorter == transforms.resize_size[0]


def test_a_networks_attributes_count():
    net = Net()
    net.image_size, net.mean, net.std = (64, 128), [0.1, 0.2, 0.3], 0.5
    found = networks.preprocessing_of(net)
    assert found.size == (64, 128)
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.5, 0.5, 0.5)
    assert found.source == "the network's"


def test_timms_and_hugging_faces_words_count():
    net = Net()
    net.pretrained_cfg = {
        "input_size": (3, 288, 288),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "crop_pct": 0.9,
    }
    found = networks.preprocessing_of(net)
    assert (found.size, found.mean, found.interpolation) == ((288, 288), (0.5,) * 3, "bilinear")
    assert found.shorter == 320 and found.source == "timm's"
    net = Net()
    net.config = SimpleNamespace(image_size=48)
    assert networks.preprocessing_of(net).size == (48, 48)
    assert networks.load(net)[1]["size"] == 48


def test_a_vit_of_timm_made_for_another_size_is_fed_that_size():
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, depth=2)
    _, info = networks.load(net)
    assert info["size"] == 64
    with pytest.raises(ValueError, match="does not fit this VisionTransformer.*Input height"):
        cc.capture(net, torch.zeros(1, 3, 32, 32), "blocks.0")


def test_a_timm_network_loads_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    trained = timm.create_model("resnet18", num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "r.bin")
    model, info = networks.load("timm:resnet18", tmp_path / "r.bin")
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(x), trained.eval()(x), atol=1e-5)
    assert len(info["class_names"]) == 7 and info["preprocessing"].source == "timm's"
    with pytest.raises(ValueError, match="Nearest: resnet"):
        networks.load("timm:resnet81", tmp_path / "r.bin")


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        networks.load("timm:resnet18")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("image_size", "big", "image_size='big'"),
        ("image_size", (64,), "height, width"),
        ("image_size", 0, "from 1 on"),
        ("std", [0.5, 0.0, 0.5], "std above 0"),
        ("interpolation", "cubic", "bicubic"),
    ],
)
def test_attributes_that_cannot_be_are_named(name, value, message):
    net = Net()
    setattr(net, name, value)
    with pytest.raises(ValueError, match=message):
        networks.load(net)


# ---- what comes out


def test_a_network_of_one_channel_gets_the_picture_in_grey(picture):
    net = Net(channels=1)
    net.image_size, net.mean, net.std = 32, 0.5, 0.25
    x = networks.preprocess(picture, networks.preprocessing_of(net))
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BICUBIC), np.float32)
    assert x.shape == (1, 1, 32, 32)
    assert np.allclose(x[0, 0].numpy(), (grey / 255 - 0.5) / 0.25, atol=1e-6)
    found = cc.explain(net, picture.convert("L"), layer="body", shallow_layer="body")
    assert found.cam.shape == (32, 32)


def test_five_channels_are_explained_from_a_tensor_and_a_picture_is_refused(picture):
    model, _ = networks.load(Net(channels=5))
    assert cc.explain(model, torch.rand(5, 24, 32), layer="body", method="grad_cam").cam.shape == (
        24,
        32,
    )
    with pytest.raises(ValueError, match=r"takes 5 channels.*preprocessed tensor \(5, H, W\)"):
        cc.explain(model, picture)


def test_a_wide_input_has_a_wide_map_masks_and_boxes(tmp_path, picture):
    net = Net()
    net.image_size = (16, 48)
    model, info = networks.load(net)
    assert info["size"] == (16, 48)
    assert cc.explain(model, picture, layer="body", shallow_layer="body").cam.shape == (16, 48)
    picture.save(tmp_path / "a.png")
    row = {"id": "a", "file": str(tmp_path / "a.png"), "mask": "", "truth": "boxes"}
    row["boxes"] = json.dumps([[0, 0, 65, 45]])  # the upper left quarter of 130 x 90
    frame = pd.DataFrame([row])
    assert cc.datasets.load_boxes(frame, info["preprocessing"]) == [[[0, 0, 24, 8]]]
    mask = cc.datasets.load_masks(frame, size=info["preprocessing"])[0]
    assert mask.shape == (16, 48) and mask[:8, :24].all() and mask.sum() == 8 * 24


def test_black_is_black_for_every_preprocessing():
    for how in (
        networks.IMAGENET,
        networks.Preprocessing(mean=(0.5,), std=(0.25,)),
        networks.Preprocessing(mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    ):
        x = torch.zeros(2, len(how.mean), 4, 5)
        black, _ = cc.baselines(x, "black", how=how)
        expected = [-m / s for m, s in zip(how.mean, how.std, strict=True)]
        assert torch.allclose(black[0, :, 0, 0], torch.tensor(expected))
    with pytest.raises(ValueError, match="x has 2 channels and the preprocessing 3"):
        cc.baselines(torch.zeros(1, 2, 4, 4), "black")


# ---- squash or crop


def test_a_crop_equals_torchvisions(picture):
    how = networks.Preprocessing(size=(40, 40), fit="crop", shorter=46, interpolation="bilinear")
    x = networks.preprocess(picture, how)
    theirs = v2.Compose(
        [
            v2.Resize(46, v2.InterpolationMode.BILINEAR),
            v2.CenterCrop(40),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(networks.MEAN, networks.STD),
        ]
    )(picture)
    assert (x[0] - theirs).abs().max() < 1.5 / 255 / 0.22


def test_what_is_cropped_away_is_gone_from_picture_mask_and_boxes(tmp_path):
    """A white square in the centre third of a wide black picture, cropped to that third."""
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    how = networks.Preprocessing(size=(10, 10), fit="crop", shorter=10)
    seen = networks.framed(Image.fromarray(pixels), how)
    assert seen.size == (30, 30) and np.asarray(seen).min() == 255
    row = {"id": "a", "file": str(tmp_path / "a.png"), "mask": str(tmp_path / "a.png")}
    frame = pd.DataFrame([row | {"truth": "boxes", "boxes": json.dumps([[30, 0, 45, 30]])}])
    assert cc.datasets.load_masks(frame, size=how).all()
    assert cc.datasets.load_boxes(frame, how) == [[[0, 0, 5, 10]]]


def test_mean_and_std_may_be_numbers_and_arrays(picture):
    """(x - 0.5) / 0.25 and x itself, in as many channels as the network takes."""
    for channels, mode in ((3, "RGB"), (1, "L")):
        squashed = picture.convert(mode).resize((16, 16), Image.Resampling.BICUBIC)
        pixels = np.asarray(squashed, np.float32).reshape(16, 16, channels)
        for mean, std in ((0.5, 0.25), (0, 1), (np.full(channels, 0.5), np.full(channels, 0.25))):
            net = Net(channels=channels)
            net.image_size, net.mean, net.std = 16, mean, std
            x = networks.preprocess(picture, networks.preprocessing_of(net))
            expected = (pixels / 255 - mean) / std
            assert np.allclose(x[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    net = Net(channels=1)
    net.mean = 0.5
    assert networks.preprocessing_of(net).mean == (0.5,)


class FromThree(nn.Module):
    """A network of five channels that makes them of three."""

    image_size = 16
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self):
        super().__init__()
        self.net = Net(channels=5)

    def forward(self, x):
        return self.net(torch.cat([x, x[:, :2]], 1))


def test_the_way_out_for_five_channels_works(picture):
    with pytest.raises(ValueError, match="makes its input of three channels and has .* mean"):
        cc.explain(Net(channels=5), picture)
    net = FromThree()
    found = cc.explain(net, picture, 1, layer="net.body", shallow_layer="net.body")
    pixels = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), np.float32)
    x = torch.from_numpy(pixels / 255).permute(2, 0, 1)[None] * 2 - 1
    assert found.score == pytest.approx(float(net(x)[0, 1].detach()), abs=1e-5)


def test_modules_need_not_be_in_the_order_of_the_pass(picture):
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.head(self.body(x).relu()).mean((2, 3))

    assert len(networks.preprocessing_of(Reversed()).mean) == 3


def test_a_part_of_timms_entries_will_do():
    net = Net()
    net.pretrained_cfg = {"input_size": (3, 32, 48)}
    how = networks.preprocessing_of(net)
    assert (how.size, how.mean) == ((32, 48), networks.MEAN)


# ---- networks that do not take a batch of images


class Functional(nn.Module):
    """All its weights are parameters, so torch's complaints come from its own forward."""

    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(4, 8))
        self.maps = nn.Identity()

    def forward(self, x):
        if x.shape[2] == 17:
            raise RuntimeError("17 is my own affair")
        return self.maps(nn.functional.conv2d(x, self.w).relu()).mean((2, 3)) @ self.v.T


def test_a_networks_own_complaint_is_told_from_torchs():
    for x in (torch.zeros(2, 2, 16, 16), torch.zeros(2, 3, 16, 16).double()):
        with pytest.raises(ValueError, match="does not fit this Functional"):
            cc.capture(Functional(), x, "maps", 1)
    with pytest.raises(RuntimeError, match="my own affair"):
        cc.capture(Functional(), torch.zeros(1, 3, 17, 16), "maps", 1)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_network_says_that_it_takes_no_hooks():
    scripted = torch.jit.trace(Net().eval(), torch.zeros(1, 3, 16, 16))
    for call in (networks.load, lambda net: cc.explain(net, torch.zeros(3, 16, 16))):
        with pytest.raises(ValueError, match="scripted or traced network takes no hooks"):
            call(scripted)


class Takes(nn.Module):
    """Its forward wants something else beside the images."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, lengths):
        return self.net(x)


def test_a_forward_that_wants_more_says_what_to_wrap():
    with pytest.raises(ValueError, match="lengths.*wrap it in a module"):
        networks.load(Takes())
    with pytest.raises(ValueError, match="lengths.*wrap it in a module"):
        cc.capture(Takes(), torch.zeros(1, 3, 16, 16), "net.body")


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_say_that_they_have_no_gradient():
    quantised = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})
    assert networks.load(quantised)[1]["sha256"]
    with pytest.raises(ValueError, match="Quantised operations have no gradients"):
        cc.capture(quantised, torch.zeros(1, 3, 16, 16), "body")


def test_a_network_whose_forward_fails_is_named_with_its_error():
    class Broken(Net):
        def forward(self, x):
            raise KeyError("no such thing")

    with pytest.raises(ValueError, match="arch=Broken does not take.*KeyError.*no such thing"):
        networks.load(Broken())


def test_the_packages_bring_their_weights():
    for package in networks.PACKAGED.values():
        spec = importlib.util.find_spec(package)
        assert list(Path(spec.origin).parent.glob("models/*.pth"))
