"""Apple's GPUs have no float64: nothing may ask for it before a tensor has come to the CPU.

`OnDevice` plays such a GPU. A tensor of this class hands its class on to all that is computed from
it. It refuses to become float64, and to be read by NumPy before `.cpu()`, as a tensor there does.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from nets import images, tiny

import cam_core as cc

IDS = ["a", "b", "c"]
LAYERS = {"deep": "6", "coarse": "4+6", "shallow": "2", "finer": "0"}


class OnDevice(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return out.as_subclass(torch.Tensor)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert a device's tensor to numpy: use .cpu() first")
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, OnDevice) and tensor.dtype == torch.float64:
                raise TypeError("this device has no float64")
        return out


def on_device(tensor):
    return tensor.as_subclass(OnDevice)


def test_the_stub_refuses_what_the_device_would_refuse():
    x = on_device(torch.rand(3))
    for refused in (
        x.double,
        x.numpy,
        lambda: np.asarray(x),
        lambda: (x + 1).sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError):
            refused()
    with pytest.raises(TypeError, match="float64"):
        torch.cat([x, torch.rand(2)]).to(torch.float64)
    assert x.cpu().double().numpy().shape == (3,)


@pytest.fixture(scope="module")
def x():
    return on_device(images(3, (24, 20), seed=7))


@pytest.fixture(scope="module")
def maps(x):
    captured = cc.capture(tiny(3), x, ["0", "2", "4", "6"], 1)
    donor = cc.cam_at(captured, cc.layer_cam, "2", (24, 20)).roll(1, 0)
    found = cc.method_maps(captured, x, LAYERS, 0.3, "product", IDS, 0, donor)
    assert all(isinstance(found[name], OnDevice) for name in ("grad_cam", "hybrid", "times_sobel"))
    return found


@pytest.mark.parametrize("block", [0, 4])
def test_insertion_and_deletion(x, maps, block):
    two = {name: maps[name] for name in ("hybrid", "noise")}
    for baseline in ("rise", "black"):
        start, end = cc.baselines(x, baseline)
        target = torch.tensor([0, 1, 2])
        found = cc.faithfulness(tiny(3), x, two, target, IDS, start, end, 0, 5, block=block)
        plain = {name: m.cpu() for name, m in two.items()}
        ends = (start.cpu(), end.cpu())
        expected = cc.faithfulness(tiny(3), x.cpu(), plain, target, IDS, *ends, 0, 5, block=block)
        assert torch.allclose(found["deletion"]["hybrid"].cpu(), expected["deletion"]["hybrid"])


def test_what_a_map_leaves_of_the_probability(x, maps):
    clean = cc.probabilities(tiny(3), x)[:, 1]
    found = cc.confidence_change(tiny(3), x, maps["hybrid"], 1, clean)
    expected = cc.confidence_change(tiny(3), x.cpu(), maps["hybrid"].cpu(), 1, clean.cpu())
    for name, values in found.items():
        assert np.allclose(values, expected[name], atol=1e-6)


def test_localisation_and_similarity(maps):
    masks = torch.zeros(3, 24, 20, dtype=torch.bool)
    masks[:, 5:12, 4:15] = True
    m = maps["hybrid"]
    for metric in (cc.energy_in_mask, cc.average_precision, cc.pointing_game):
        assert np.allclose(metric(m, masks), metric(m.cpu(), masks), atol=1e-6)
    assert np.allclose(cc.iou(m, masks, 0.3), cc.iou(m.cpu(), masks, 0.3))
    cc.box_iou(m, [[[4, 5, 15, 12]]] * 3, 0.3)
    cc.similarity(m, maps["grad_cam"])
    cc.tie_fraction(m)


def test_rise(x):
    found = cc.rise(tiny(3), x, 1, IDS, masks=9)
    assert torch.allclose(found.cpu(), cc.rise(tiny(3), x.cpu(), 1, IDS, masks=9), atol=1e-6)


def test_a_whole_group_of_images(tmp_path, monkeypatch):
    """`measure` and `measurable` as notebook 05 calls them, every picture on the device."""
    from studies import seen_by, study_of, toy_images

    rows = toy_images(tmp_path, 3)
    load = cc.datasets.load_batch
    monkeypatch.setattr(
        cc.datasets, "load_batch", lambda *given, **how: on_device(load(*given, **how))
    )
    cc.measurable(tiny(3), rows, size=24)
    rows = seen_by(tiny(3), rows)
    study = study_of(tiny(3), baselines=("twin", "rise"), fine_steps=6, rise_masks=5, n_extra=1)
    records = pd.DataFrame(cc.measure(study, rows, 2, 1))
    assert {"energy", "deletion_fine", "insertion_blocks", "drop"} <= set(records["metric"])
