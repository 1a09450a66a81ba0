"""The page on primitives: its steps, followed to the letter on a copy of the sources, give a primitive that trains."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from composer_megatron.shape import PRESETS, Shape

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "primitives.md"
STEP = re.compile(r"In (a new file\s+)?`([\w/.]+)`(?:, after `([^`]+)`)?:\n\n```python\n(.*?)```", re.DOTALL)

PROGRAM = """
import torch
from composer_megatron.architecture import Architecture
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_search.candidate import Candidate, Widths

torch.set_num_threads(1)
architecture = Architecture(CompositeSequence.parse("(TM)x2"), PRESETS["tiny"])
model = build_model(architecture, max_sequence_length=16, dtype=torch.float64)
assert sum(parameter.numel() for parameter in model.parameters()) == architecture.params_total
tokens = torch.randint(512, (2, 17))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = model(tokens[:, :-1], torch.arange(16).expand(2, 16), None, labels=tokens[:, 1:]).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.1, losses
assert model.decoder.unfused_because is None
candidate = Candidate(CompositeSequence("TM"), 8, Widths(hidden_size=16, num_heads=2, ffn_hidden_size=24))
first, second = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 0]])
moved = (candidate(first) - candidate(second)).abs().amax((0, 2)) > 0
assert moved.tolist() == [False, True, True, False]
"""


def test_the_widths_are_a_shapes():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    shape = Shape.from_dict(PRESETS["1b"].as_dict() | json.loads(block))
    assert (shape.window, shape.expert_widths.num_experts, shape.latent_widths.q_rank) == (4096, 64, 1536)
    known = {field.name for field in dataclasses.fields(Shape) if "|" in str(field.type)}
    assert json.loads(block).keys() == known | {"window"}


def test_the_example_runs(capsys):
    _, after = PAGE.read_text(encoding="utf-8").split("From Python:\n\n```python\n")
    exec(after.partition("```")[0], {})
    assert capsys.readouterr().out.startswith("(GEGEGEAE)x3 ")


def test_the_steps_make_a_primitive(tmp_path):
    for package in ("composer_megatron", "kernels", "search"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    steps = STEP.findall(PAGE.read_text(encoding="utf-8"))
    assert len(steps) == 7
    for new, name, anchor, code in steps:
        path = tmp_path / name
        if new:
            assert not path.exists()
            path.write_text(code)
            continue
        text = path.read_text(encoding="utf-8")
        assert text.count(anchor) == 1, (name, anchor)
        path.write_text(text.replace(anchor, f"{anchor}\n{code.rstrip()}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(str(tmp_path / part) for part in (".", "kernels", "search"))}
        | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
