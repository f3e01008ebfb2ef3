"""What a run leaves open becomes what the machine can do, and the run says what it became."""

import json
from types import SimpleNamespace

import joblib
import nets
import pytest
import torch

from lab import ledger, machine, networks, runs
from runner import progress

CPU = torch.device("cpu")
GPU = SimpleNamespace(type="cuda")


@pytest.mark.parametrize(
    ("asked", "native", "found", "said"),
    [
        ("auto", True, "bf16", False),
        ("auto", False, "float32", False),
        ("float32", True, "float32", False),
        ("float32", False, "float32", False),
        ("bf16", True, "bf16", False),
        ("bf16", False, "float32", True),
        ("bf16!", True, "bf16", False),
        ("bf16!", False, "bf16", False),
    ],
)
def test_bfloat16_is_taken_where_it_is_native_and_emulated_only_for_who_insists(
    monkeypatch, asked, native, found, said
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    precision, note = machine.precision(asked, CPU)
    assert precision == found and bool(note) == said
    assert not said or "bf16!" in note


def test_a_processor_whose_torch_has_no_onednn_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not networks.native_bf16("cpu")


def test_batches_are_small_on_a_cpu_and_large_on_a_gpu_unless_asked_for():
    found = [machine.batch_size(asked, device) for asked in (0, 5) for device in (CPU, GPU)]
    assert found == [8, 64, 5, 5]


def test_threads_are_the_cores_that_this_process_may_use(monkeypatch):
    for of_torch, lent in ((16, 2), (1, 8), (4, 4)):  # a container's limit; OMP_NUM_THREADS
        machine.cores.cache_clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda n=of_torch: n)
        monkeypatch.setattr(joblib, "cpu_count", lambda n=lent: n)
        assert machine.threads(0) == min(of_torch, lent)
        assert machine.threads(3) == 3
    machine.cores.cache_clear()


def test_a_run_has_nothing_open_and_records_what_it_became(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    run = runs.open(4, precision="bf16", device="cpu", results_dir=str(tmp_path))
    assert (run.settings.precision, run.settings.batch_size) == ("float32", 8)
    assert run.settings.threads == torch.get_num_threads() >= 1
    assert capsys.readouterr().out.count("bf16!") == 1
    run.save_resolved()
    saved = json.loads((tmp_path / "resolved.json").read_text())
    assert (saved["precision"], saved["batch_size"]) == ("float32", 8)
    assert saved["threads"] == run.settings.threads


def test_the_speed_is_that_of_a_bare_forward_pass():
    how = networks.as_preprocessing(24)
    seconds = machine.seconds_per_picture(nets.tiny(), how, 4)
    x = torch.rand(4, 3, 24, 24)
    alone = min(machine.seconds_of(lambda: nets.tiny()(x)) for _ in range(3)) / 4
    assert 0 < seconds < 100 * alone


def test_a_kernel_tells_the_runner_what_it_counts(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("HYBRID_CAM_PROGRESS", str(file))
    ledger.forward(5)
    first = progress.counts(file)
    ledger.backward(3)
    ledger.add({"forward": 7, "backward": 1, "asked": 9})
    assert progress.counts(file) == ledger.counts()
    assert ledger.since(first) == {"forward": 7, "backward": 4, "asked": 9}
