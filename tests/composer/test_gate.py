"""The gate: medians, spread, what counts as worse; two folders and two revisions."""

import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from composer_megatron.errors import FileError, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gate(load) -> ModuleType:
    return load("gate")


def training(path: Path, seconds: list[float], gpu: str = "H100", **more) -> Path:
    row = {"shape": "1b", "model": "llama", "backend": "composer", "seq_len": 4096, "seconds": seconds, "note": ""}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": gpu, "rows": [row | more]}))
    return path


def kernel(path: Path, graph: float | None) -> Path:
    rows = [{"case": "forward", "name": "composer", "graph": graph, "peak": 100, "note": "" if graph else "failed"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": "H100", "op": "swiglu", "rows": rows}))
    return path


def test_a_slower_median_is_worse(gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = training(tmp_path / "a/training.json", [1.0, 1.01, 1.02, 5.0])
    same = training(tmp_path / "b/training.json", [1.0, 1.03, 1.04, 1.04])
    slower = training(tmp_path / "c/training.json", [1.1, 1.11, 1.12])
    assert gate.main([str(before), str(same), "--threshold", "0.05"]) == 0
    steady = training(tmp_path / "d/training.json", [1.0, 1.01, 1.02])
    assert gate.main([str(steady), str(slower)]) == 1
    assert "WORSE  training | 1b | llama | composer | 4096 | seconds: 1.01 -> 1.11" in capsys.readouterr().out
    assert gate.main([str(slower), str(steady)]) == 0
    assert "better" in capsys.readouterr().out


def test_noise_is_not_worse(gate, tmp_path: Path) -> None:
    noisy = training(tmp_path / "a.json", [0.8, 0.9, 1.0, 1.1, 1.2])
    later = training(tmp_path / "b.json", [0.9, 1.0, 1.08, 1.2, 1.3])
    assert gate.main([str(noisy), str(later)]) == 0
    (change,) = gate.compare(gate.figures(noisy)[0], gate.figures(later)[0])
    assert change.growth == pytest.approx(0.08)
    assert change.spread == pytest.approx(0.2)


def test_folders_of_several_runs(gate, tmp_path: Path) -> None:
    for number, graph in enumerate((1.0, 1.02, 0.98)):
        kernel(tmp_path / f"old/{number}.json", graph)
        kernel(tmp_path / f"new/{number}.json", graph * 1.2)
    assert gate.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    found, gpus = gate.figures(tmp_path / "old")
    assert found["swiglu", "forward", "composer", "graph"] == [1.0, 1.02, 0.98]
    assert gpus == {"H100"}


def test_more_memory_is_worse_and_so_is_a_failure(gate, tmp_path: Path) -> None:
    small = training(tmp_path / "a.json", [1.0], peak_bytes=100)
    big = training(tmp_path / "b.json", [1.0], peak_bytes=110)
    assert gate.main([str(small), str(big)]) == 1
    works, fails = kernel(tmp_path / "c.json", 1.0), kernel(tmp_path / "d.json", None)
    assert gate.main([str(works), str(fails)]) == 1
    assert gate.main([str(fails), str(works)]) == 0


def test_refusals(gate, tmp_path: Path) -> None:
    one = training(tmp_path / "a.json", [1.0])
    other = training(tmp_path / "b.json", [1.0], gpu="H200")
    with pytest.raises(UsageError, match="H100 and on H200"):
        gate.main([str(one), str(other)])
    assert gate.main([str(one), str(other), "--any-gpu"]) == 0
    with pytest.raises(UsageError, match="give two"):
        gate.main([str(one)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no benchmark's result"):
        gate.main([str(one), str(tmp_path / "empty")])


def test_revisions_take_turns(gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import json, sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
output.parent.mkdir(parents=True, exist_ok=True)
rows = [{"case": "c", "name": "n", "graph": SECONDS}]
output.write_text(json.dumps({"gpu": "H100", "op": "x", "rows": rows}))
"""
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    git("init")
    for seconds in ("1.0", "1.3"):
        Path("bench.py").write_text(script.replace("SECONDS", seconds))
        git("add", "bench.py")
        git("commit", "-m", seconds)
    asked = ["--rounds", "2", "--revisions"]
    assert gate.main([*asked, "HEAD~1", "HEAD", "--", "bench.py"]) == 1
    assert gate.main([*asked, "HEAD", "HEAD~1", "--", "bench.py"]) == 0
    with pytest.raises(UsageError, match="nowhere"):
        gate.main([*asked, "nowhere", "HEAD", "--", "bench.py"])
    with pytest.raises(UsageError, match="name a script"):
        gate.main([*asked, "HEAD", "HEAD"])
    listed = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1
