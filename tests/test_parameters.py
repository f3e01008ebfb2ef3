"""What the user asked for becomes checked values, and every notebook gets those that it reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from fake import make_notebook

from lab import settings
from runner import parameters
from runner.parameters import Given

NOTEBOOKS = sorted((parameters.HOME / "notebooks").glob("[0-9][0-9]_*.ipynb"))
STEMS = [path.stem for path in NOTEBOOKS]
PARAMETER_FILES = sorted(
    path for path in (parameters.HOME / "params").glob("*.yaml") if path.stem != "default"
)


def refusal(capsys, function, *arguments):
    """What a function says when it ends the run before it begins."""
    with pytest.raises(SystemExit) as ended:
        function(*arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("run_all.sh: ") and len(message.splitlines()) == 1
    return message


# ---- params/default.yaml is the only place


@pytest.mark.parametrize("path", NOTEBOOKS, ids=STEMS)
def test_a_notebook_declares_settings_that_it_reads_with_their_defaults(path):
    declared = parameters.declared_in(path)
    defaults = settings.defaults(parameters.number_of(path.stem))
    assert declared == {name: defaults.get(name, "not read here") for name in declared}


@pytest.mark.parametrize("name", settings.declared())
def test_a_default_is_allowed(name):
    default = settings.declared()[name]["default"]
    assert parameters.value_of(name, Given(default, "default.yaml")) == default
    assert parameters.value_of(name, Given(settings.as_word(default), "-p")) == default


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_the_shipped_parameter_files_are_allowed_and_name_their_own_results_folder(path):
    values = parameters.check_given(parameters.read_given(str(path), []), STEMS)
    assert values["results_dir"] == f"results/{path.stem}"


def test_the_page_of_parameters_is_what_the_code_makes():
    assert parameters.PAGE.read_text("utf-8") == parameters.page(), "python -m runner.parameters"
    assert all(f"| `{name}` |" in parameters.page() for name in settings.declared())


# ---- words into values


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("n_images", "40", 40),
        ("n_images", 40, 40),
        ("alpha", "0.5", 0.5),
        ("alpha", ".5", 0.5),
        ("alpha", 1, 1.0),
        ("alpha", "auto", "auto"),
        ("shortcut", "true", True),
        ("shortcut", "False", False),
        ("shortcut", True, True),
        ("targets", 3, "3"),
        ("targets", ["ring", 0], "ring,0"),
        ("classes", ["a", "b"], "a,b"),
        ("layer", "true", "true"),
        ("device", "cuda:1", "cuda:1"),
        ("scheduler", "tls://10.0.0.1:1", "tls://10.0.0.1:1"),
        ("n_images", "5.0", 5),
        ("n_images", 5.0, 5),
        ("n_images", " 5 ", 5),
        ("n_images", np.int64(5), 5),
        ("seed", "9007199254740993", 9007199254740993),
        ("threads", 2.0, 2),
        ("alpha", "5E-1", 0.5),
        ("alpha", np.float32(0.5), 0.5),
        ("alpha", "Auto", "auto"),
        ("shortcut", " TRUE ", True),
        ("targets", 3.0, "3"),
        ("targets", "3, ring ,", "3,ring"),
        ("targets", "[3, 'ring']", "3,ring"),
        ("targets", (3, "ring"), "3,ring"),
        ("classes", ["golden retriever", "cat"], "golden retriever,cat"),
        ("classes", [], ""),
        ("baseline", "rise, zero", "rise,zero"),
        ("baseline", "rise zero", "rise,zero"),
        ("baseline", ["Rise", "zero"], "rise,zero"),
        ("baseline", "[rise, zero]", "rise,zero"),
        ("layer", 3, "3"),
        ("layer", " layer3 ", "layer3"),
        ("device", "CPU", "cpu"),
        ("weights", "ImageNet", "imagenet"),
        ("weights", "IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("method", "All", "all"),
        ("dataset", Path("synthetic"), "synthetic"),
    ],
)
def test_a_value_has_the_type_of_its_setting(name, given, value):
    """However it is written, and in a notebook as on the command line."""
    for result in (parameters.value_of(name, Given(given, "-p")), settings.check(name, given)):
        assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("n_images", "1.5"),
        ("n_images", "-1"),
        ("n_images", True),
        ("n_images", "1_000"),
        ("n_images", None),
        ("alpha", "2"),
        ("alpha", "nan"),
        ("alpha", True),
        ("shortcut", "yes"),
        ("shortcut", 1),
        ("classes", ["yes", False]),
        ("classes", None),
        ("layer", {"a": 1}),
        ("baseline", "twin,grey"),
        ("device", "tpu"),
        ("scheduler", "http://a:1"),
        ("weights", "nowhere.pth"),
        ("dataset", "nowhere"),
        ("arch", "nowhere.py:Net"),
        ("colormap", "rainbows"),
        ("n_images", 5.5),
        ("n_images", float("inf")),
        ("n_images", [5]),
        ("threads", "two"),
        ("alpha", [0.5]),
        ("alpha", "0,5"),
        ("layer", ["layer3", "layer4"]),
        ("layer", True),
        ("classes", ["a,b", "c"]),
        ("classes", ["a", None]),
        ("classes", {"a": 1}),
        ("baseline", []),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(capsys, name, given):
    message = refusal(capsys, parameters.value_of, name, Given(given, "-f x.yaml"))
    assert f"-f x.yaml: {name} cannot be " in message
    assert f" Allowed: {settings.allowed(name)}." in message
    with pytest.raises(ValueError, match=f"{name} cannot be .* Allowed: "):
        settings.check(name, given)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("n_images", "many", "Allowed: a whole number, 0 or more."),
        ("classes", None, 'Allowed: names or numbers, "a,b,c" or a list [a, b, c].'),
        ("baseline", "grey", "twin, rise, zero, black, joined by commas or as a list."),
        ("data_dir", ["a", "b"], "Allowed: one text."),
        ("classes", ["a", False], "YAML takes yes and no for true and false: put them into quotes"),
    ],
)
def test_what_is_allowed_is_said_in_words(capsys, name, given, said):
    assert said in refusal(capsys, parameters.value_of, name, Given(given, "-p"))


def test_files_are_seen_from_the_user_then_from_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def value(name, word):
        return parameters.value_of(name, Given(word, "-p"))

    home = parameters.HOME
    assert value("dataset", "data") == str(home / "data")
    for folder in ("data", "synthetic"):
        (tmp_path / folder).mkdir()
    (tmp_path / "net.py").write_text("")
    assert value("dataset", "data") == str(tmp_path / "data")
    assert value("dataset", "synthetic") == "synthetic"
    assert value("arch", "net.py:Net") == f"{tmp_path}/net.py:Net"
    shipped = "data/checkpoints/resnet18.pth"
    assert value("weights", shipped) == str(home / shipped)


# ---- the command line and the file


def test_the_command_line_wins_over_the_file_and_its_last_word_over_the_first(tmp_path):
    file = tmp_path / "few.yaml"
    file.write_text("n_images: 7\nsteps: 3\n")
    given = parameters.read_given(str(file), [("n_images", "8"), ("n_images", "9")])
    assert parameters.check_given(given, STEMS) == {"n_images": 9, "steps": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- alpha\n", "lines of the form `name: value`"),
        ("alpha: [1\n", "while parsing"),
        ("alhpa: 1\n", "there is no setting 'alhpa'. Nearest: alpha"),
        ("n_images: !!python/object/apply:os.system ['touch sprung']\n", "could not determine"),
    ],
)
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        parameters.check_given(parameters.read_given("x.yaml", []), STEMS)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not Path("sprung").exists()


def test_a_name_that_no_chosen_notebook_reads_is_refused_unless_a_file_gives_it(capsys):
    for name, value, chosen in (("alpha", "0.5", STEMS[:1]), ("scheduler", "tcp://a:1", STEMS[:4])):
        given = {name: Given(value, "-p")}
        assert "no effect" in refusal(capsys, parameters.check_given, given, chosen)
        parameters.check_given({name: Given(value, "-f x.yaml")}, chosen)
        parameters.check_given(given, STEMS)


# ---- what a notebook is started with


def test_a_notebook_gets_what_it_reads_and_undeclared_names_in_its_settings(tmp_path):
    path = tmp_path / "04_choice.ipynb"
    make_notebook(path, "alpha: float = 1.0")
    values = {"alpha": 0.5, "steps": 3, "n_train": 40, "results_dir": "elsewhere"}
    started = parameters.for_papermill(path, values, tmp_path)
    assert started == {"alpha": 0.5, "settings": {"steps": 3, "results_dir": str(tmp_path)}}
    recorded = parameters.parameters_of(path.stem, values)
    assert recorded["alpha"] == 0.5 and recorded["steps"] == 3 and recorded["seed"] == 0
    assert not {"n_train", "results_dir", "scheduler"} & set(recorded)


@pytest.mark.parametrize(
    "source", ["n = 3", "n: int", "import os", "n: int = len('a')", "n: int ="]
)
def test_a_parameters_cell_of_another_form_is_an_error(tmp_path, source):
    make_notebook(tmp_path / "01_x.ipynb", source)
    with pytest.raises((ValueError, SyntaxError)):
        parameters.declared_in(tmp_path / "01_x.ipynb")


@pytest.mark.parametrize("tags", [[], ["parameters"]])
def test_there_is_exactly_one_parameters_cell(tmp_path, tags):
    path = tmp_path / "01_x.ipynb"
    make_notebook(path, "n: int = 1", "m = 1")
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        cell["metadata"]["tags"] = tags
    path.write_text(json.dumps(book))
    with pytest.raises(ValueError, match=r"\d cells are tagged 'parameters'"):
        parameters.declared_in(path)
