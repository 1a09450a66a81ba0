"""The demo at its smallest: every stage runs, both models learn, a second call continues instead of starting again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def demo(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "kernels", "search"))}
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--size", "smoke", "--output", str(output), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    for model in ("composite", "baseline"):
        assert result[model]["nats_per_token"] < result["unigram"]["nats_per_token"] - 0.5
        assert result[model]["bits_per_byte"] < result["unigram"]["bits_per_byte"]
        shown = f"{result[model]['nats_per_token']:.3f}"
        assert shown in done.stdout
    counts = [
        json.loads((tmp_path / "demo" / name / "architecture.json").read_text()) for name in ("composite", "baseline")
    ]
    assert counts[0]["sequence"] != counts[1]["sequence"]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert f"{result['composite']['bits_per_byte']:.3f}" in page

    trials = (tmp_path / "demo" / "study" / "trials.jsonl").read_text()
    again = demo(tmp_path / "demo")
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-2000:]
    assert (tmp_path / "demo" / "study" / "trials.jsonl").read_text() == trials
    assert json.loads((tmp_path / "demo" / "result.json").read_text()) == result


def test_a_failing_step_stops_the_demo_with_its_own_message(tmp_path: Path) -> None:
    done = demo(tmp_path / "demo", "--text", str(tmp_path / "absent.txt"))
    assert done.returncode == 1
    assert "absent.txt" in done.stderr
    assert "the step 'text' failed" in done.stdout
    assert "Traceback" not in done.stderr
