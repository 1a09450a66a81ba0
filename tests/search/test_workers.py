"""Workers on a machine with several GPUs, which here are made up: who takes which, and how many there are."""

import sys
import types

import pytest
import torch

from composer_search.evaluation import runs_on_gpu
from composer_search.evaluators import EVALUATORS, GPU_PRESETS, MadEvaluator, preset
from composer_search.evaluators.presets import PRESETS
from composer_search.fidelity import HalvingEvaluator
from composer_search.strategies import SearchSettings, search
from composer_search.workers import default_workers, take_gpu

MODULE = '''
import os, time

from composer_search.evaluation import Evaluation


class OnGpu:
    """Finds two GPUs in its worker, and tells which it was given."""

    device = "auto"

    def describe(self):
        return {"name": "on gpu"}

    def __reduce__(self):
        return awake, ()

    def evaluate(self, sequence):
        time.sleep(0.3)
        return Evaluation(0.5, details={"gpu": own[-1], "worker": os.getpid()})


own = []


def awake():
    import torch

    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = own.append
    return OnGpu()
'''


def test_workers_share_the_gpus_out_and_keep_theirs(tmp_path, monkeypatch):
    (tmp_path / "on_gpu.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import on_gpu

    settings = SearchSettings(length=3, budget=8)
    study = search(settings, tmp_path / "study", workers=2, evaluator=on_gpu.OnGpu())
    sys.modules.pop("on_gpu")
    pairs = {(trial.details["worker"], trial.details["gpu"]) for trial in study.completed}
    assert len(study.completed) == 8
    assert sorted(gpu for _, gpu in pairs) == [0, 1] and len({worker for worker, _ in pairs}) == 2


@pytest.mark.parametrize(("gpus", "place", "taken"), [(4, 5, [1]), (2, 0, [0]), (1, 3, []), (0, 1, [])])
def test_one_gpu_or_none_leaves_no_choice(gpus, place, taken, monkeypatch):
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    take_gpu(place)
    assert found == taken


@pytest.mark.parametrize(
    ("gpus", "cores", "on_gpu", "workers"),
    [(2, 64, True, 2), (0, 64, True, 8), (0, 3, True, 3), (2, 64, False, 8), (2, 1, False, 1)],
)
def test_a_worker_for_each_gpu_or_core(gpus, cores, on_gpu, workers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert default_workers(on_gpu) == workers


def test_evaluators_say_where_they_train():
    small, mad = MadEvaluator(preset("smoke")), MadEvaluator(preset("baseline", device="cuda"))
    assert not runs_on_gpu(small) and runs_on_gpu(mad)
    assert runs_on_gpu(HalvingEvaluator(mad)) and not runs_on_gpu(HalvingEvaluator(small))
    assert not runs_on_gpu(types.SimpleNamespace())
    assert {name for name in PRESETS if PRESETS[name]().train.device == "auto"} == set(GPU_PRESETS) - {"large-text"}
    assert set(GPU_PRESETS) <= set(EVALUATORS)
