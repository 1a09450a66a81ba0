"""Trials on Ray: with two real local workers where Ray is installed, and with a stand-in that loses workers at will."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections import Counter

import pytest

from composer_megatron.errors import ComposerError
from composer_search.evaluation import Evaluation
from composer_search.ray_pool import ray_pool
from composer_search.strategies import SearchSettings, search
from composer_search.study import Study

PROGRAM = '''
import os, signal, sys, time
from pathlib import Path

from composer_search.evaluation import Evaluation
from composer_search.strategies import SearchSettings, search


class Deadly:
    """AMM kills its worker once, MMM whenever it is tried."""

    def __init__(self, folder):
        self.folder = folder

    def describe(self):
        return {"name": "deadly"}

    def evaluate(self, sequence):
        (Path(self.folder) / f"{sequence.letters}.{os.getpid()}.{time.time_ns()}").touch()
        times = len(list(Path(self.folder).glob(f"{sequence.letters}.*")))
        if sequence.letters == "MMM" or (sequence.letters == "AMM" and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return Evaluation(sequence.count("A") / 3)


if __name__ == "__main__":
    study, folder, batch = sys.argv[1:]
    settings = SearchSettings(length=3, budget=8, batch=int(batch))
    search(settings, study, workers=2, executor="ray", evaluator=Deadly(folder))
'''


class Lost(BaseException):
    """What an evaluator raises where a real one would take its worker with it."""


class FakeRay(types.ModuleType):
    """The calls of Ray that the pool makes: tasks run when they are waited for, in the order of their start."""

    def __init__(self):
        super().__init__("ray")
        self.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        self.exceptions = types.SimpleNamespace(RayError=type("WorkerCrashedError", (Exception,), {}))
        self.tasks, self.cancelled, self.up, self.options = {}, [], False, None

    def is_initialized(self):
        return self.up

    def init(self, **_):
        self.up = True

    def shutdown(self):
        self.up = False

    def put(self, value):
        return value

    def remote(self, **options):
        self.options = options

        def wrap(function):
            def start(*arguments):
                handle = f"task {len(self.tasks)}"
                self.tasks[handle] = (function, arguments)
                return handle

            return types.SimpleNamespace(remote=start)

        return wrap

    def wait(self, handles, num_returns):
        return handles[:num_returns], handles[num_returns:]

    def get(self, handle):
        function, arguments = self.tasks[handle]
        try:
            return function(*arguments)
        except Lost:
            raise self.exceptions.RayError("The worker died unexpectedly.\nSee its log.") from None

    def cancel(self, handle, force):
        assert force
        self.cancelled.append(handle)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


class Toy:
    """Loses its worker at AMM once and at MMM always; stops at `stop_at`, as Ctrl-C would."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = Counter(), stop_at

    def describe(self):
        return {"name": "toy"}

    def evaluate(self, sequence):
        self.seen[sequence.letters] += 1
        if self.seen.total() == self.stop_at:
            raise KeyboardInterrupt
        if sequence.letters == "MMM" or (sequence.letters == "AMM" and self.seen["AMM"] == 1):
            raise Lost
        return Evaluation(sequence.count("A") / 3)


def check(study):
    errors = {trial.sequence.letters: trial.error for trial in study.trials if not trial.completed}
    assert sorted(trial.trial for trial in study.trials) == list(range(8))
    assert list(errors) == ["MMM"]
    assert errors["MMM"].startswith("lost 3 Ray workers, the last by WorkerCrashedError: The worker died unexpectedly")
    assert "\n" not in errors["MMM"]


def test_a_lost_worker_repeats_its_trial_alone(ray, tmp_path, caplog):
    evaluator = Toy()
    study = search(SearchSettings(length=3, budget=8), tmp_path, workers=2, executor="ray", evaluator=evaluator)
    check(study)
    assert evaluator.seen == {"AMM": 2, "MMM": 3} | dict.fromkeys(("AAA", "AAM", "AMA", "MAA", "MAM", "MMA"), 1)
    repeated = sorted(message.split()[-1] for message in caplog.messages)
    assert repeated == ["1A2M", "3M", "3M"]
    assert ray.options["max_retries"] == 0  # or Ray would repeat whole batches by itself
    assert not ray.up


def test_a_lost_batch_runs_again_trial_by_trial(ray, tmp_path):
    settings = SearchSettings(length=3, budget=8, batch=4)
    study = search(settings, tmp_path, workers=2, executor="ray", evaluator=Toy())
    check(study)
    assert [each for _, arguments in list(ray.tasks.values())[:2] for each in [len(arguments[1])]] == [4, 4]
    assert all(len(arguments[1]) == 1 for _, arguments in list(ray.tasks.values())[2:])


def test_an_interrupted_search_cancels_what_runs_and_goes_on_later(ray, tmp_path):
    settings = SearchSettings(length=3, budget=8)
    with pytest.raises(KeyboardInterrupt):
        search(settings, tmp_path, workers=2, executor="ray", evaluator=Toy(stop_at=6))
    kept = len(Study.load(tmp_path).trials)
    assert kept < 8
    assert ray.cancelled
    assert not ray.up
    check(search(settings, tmp_path, workers=2, executor="ray", evaluator=Toy()))


@pytest.mark.parametrize(
    ("device", "in_cluster", "wanted"), [("auto", 8.0, 1), ("cuda", 8.0, 1), ("auto", 0.0, 0), ("cpu", 8.0, 0)]
)
def test_a_batch_that_trains_on_a_gpu_asks_ray_for_one(ray, device, in_cluster, wanted):
    """A Ray task without GPUs of its own sees none."""
    ray.cluster_resources = lambda: {"CPU": 64.0, "GPU": in_cluster}
    with ray_pool(types.SimpleNamespace(device=device), 2):
        assert ray.options["num_gpus"] == wanted


def test_a_ray_that_is_connected_already_is_left_running(ray, tmp_path):
    ray.up = True
    with ray_pool(Toy(), 2) as pool:
        assert pool.free == 2
    assert ray.up


def test_a_cluster_that_is_not_there_is_one_error(ray, monkeypatch, tmp_path):
    def unreachable(**_):
        raise ConnectionError("no cluster at 192.0.2.1")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(ComposerError, match=r"cannot reach or start Ray: no cluster at 192.0.2.1; see .* RAY_ADDRESS"):
        search(SearchSettings(length=3, budget=8), tmp_path, workers=2, executor="ray", evaluator=Toy())


def test_without_ray_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ComposerError, match=r'pip install "composer-megatron\[ray\]"'):
        search(SearchSettings(length=3, budget=8), tmp_path, workers=2, executor="ray", evaluator=Toy())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("batch", [1, 4])
def test_two_real_workers_of_which_some_are_killed(batch, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "tried").mkdir()
    command = [
        sys.executable,
        str(tmp_path / "program.py"),
        str(tmp_path / "study"),
        str(tmp_path / "tried"),
        str(batch),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check(Study.load(tmp_path / "study"))
    tried = Counter(path.name[:3] for path in (tmp_path / "tried").iterdir())
    if batch == 1:
        assert tried == {"AMM": 2, "MMM": 3} | dict.fromkeys(("AAA", "AAM", "AMA", "MAA", "MAM", "MMA"), 1)
    assert json.loads((tmp_path / "study" / "study.json").read_text())["proposer"]["batch"] == batch
