"""``bench training``: what reaches the script, and what becomes of a script that fails or is not there."""

import json
from pathlib import Path

import pytest

from composer_megatron.bench.training import TrainingBenchmark, run_training
from composer_megatron.errors import ComposerError, UsageError

SCRIPT = """
import json, sys
from pathlib import Path
import composer_megatron
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.write_text(json.dumps(sys.argv[1:]))
sys.exit(3 if "broken" in sys.argv else 2 if "unknown" in sys.argv else 0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/bench_training.py").write_text(SCRIPT)
    return tmp_path / "benchmarks"


def test_options_reach_the_script(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    output = tmp_path / "out.json"
    asked = TrainingBenchmark(shapes=("tiny",), backends=("local", "compile"), lengths=(16, 32), step_tokens=64)
    run_training(asked, output, folder)
    got = json.loads(output.read_text())
    wanted = "--shapes tiny --backends local compile --lengths 16 32 --step-tokens 64"
    assert wanted in " ".join(got)
    assert "--quick" not in got
    assert TrainingBenchmark(quick=True, budget=5.0).arguments() == ["--quick", "--budget", "5.0"]


def test_a_script_that_fails_or_is_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with pytest.raises(ComposerError, match="status 3"):
        run_training(TrainingBenchmark(models=("broken",)), tmp_path / "out.json", folder)
    with pytest.raises(SystemExit) as ended:  # the script has said what was wrong
        run_training(TrainingBenchmark(models=("unknown",)), tmp_path / "out.json", folder)
    assert ended.value.code == 2
    with pytest.raises(ComposerError, match="checkout"):
        run_training(TrainingBenchmark(), tmp_path / "out.json", tmp_path / "nowhere")


@pytest.mark.parametrize("changes", [{"lengths": (0,)}, {"step_tokens": -1}, {"budget": 0.0}])
def test_numbers_that_measure_nothing(changes: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        TrainingBenchmark(**changes)
