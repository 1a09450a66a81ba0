"""The systems to compare with: their orders of blocks, their sizes, and the table whose cells are seen to run."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_megatron import cpu
from composer_megatron.architecture import Architecture
from composer_megatron.block_config import check_together
from composer_megatron.commands.systems import systems
from composer_megatron.errors import UsageError
from composer_megatron.files import read_json
from composer_megatron.model import build_model
from composer_megatron.primitives import PRIMITIVES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.systems import EVIDENCE, LAYOUTS, SYSTEMS, _jet_nemotron, table

ROOT = Path(__file__).parents[2]
ONE_B = PRESETS["1b"]


def test_the_orders_are_the_published_ones():
    letters = {name: system.sequence(ONE_B).letters for name, system in SYSTEMS.items()}
    assert letters["llama"] == "AM" * 16
    assert letters["sandwich"] == "A" * 6 + "AM" * 10 + "M" * 6
    assert letters["striped"] == "AMM" * 9
    assert letters["qwen3-next"] == "GEGEGEAE" * (len(letters["qwen3-next"]) // 8)
    share = Counter(letters["mamba2-hybrid"])
    assert [round(100 * share[letter] / share.total()) for letter in "SAM"] == [43, 7, 50]
    dense, mixed = letters["deepseek-v3"].partition("LE")[::2]
    assert dense == "LM" and set(mixed) <= {"L", "E"}
    mixers = _jet_nemotron(28)[::2]  # as deep as the published one, whose places its configuration lists
    assert [mixers.index("A"), mixers.rindex("A"), mixers.index("W"), mixers.rindex("W")] == [14, 19, 20, 21]
    assert Counter(mixers) == {"G": 24, "A": 2, "W": 2}


@given(name=st.sampled_from(list(SYSTEMS)), preset=st.sampled_from(list(PRESETS)))
def test_a_system_has_about_the_baselines_size(name, preset):
    """Within half of what one repetition more would add; Llama and Sandwich have exactly its blocks."""
    architecture = SYSTEMS[name].architecture(PRESETS[preset])
    check_together(architecture.sequence.letters)
    target, found = architecture.baseline().active_parameters, architecture.active_parameters
    unit = {"striped": "AMM", "mad-striped": "SMSMSMAM", "mamba2-hybrid": "SMSMSMAMSMSMSM", "qwen3-next": "GEGEGEAE"}
    unit |= {"star": "SMGMWMSMAMGM", "deepseek-v3": "LE", "jet-nemotron": "GM", "llama": "A", "sandwich": "A"}
    step = Architecture(CompositeSequence(unit[name]), architecture.shape).active_parameters
    assert abs(found - target) <= step / 2 or (found > target and len(architecture.sequence) <= 2 * len(unit[name]))
    if name in ("llama", "sandwich"):
        assert found == target


def test_the_table_counts(capsys):
    rows = table(ONE_B, 4096)
    assert [row["system"] for row in rows] == list(SYSTEMS)
    llama = rows[0]
    assert llama["parameters"] == 1_235_814_400
    assert llama["state_bytes"] == 16 * 4096 * 2 * 8 * 64 * 2
    systems(shape="1b", seq_len=4096, json=True)
    assert json.loads(capsys.readouterr().out) == rows
    systems()
    shown = capsys.readouterr().out
    assert "Sandwich" in shown and "active" in shown
    with pytest.raises(UsageError, match="--seq-len 0; expected at least 1"):
        systems(seq_len=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_builds_at_its_real_size(name):
    """On the meta device, at 8B, with every parameter that the counts promise."""
    architecture = SYSTEMS[name].architecture(PRESETS["8b"])
    model = build_model(architecture, max_sequence_length=4096, meta=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == architecture.params_total


def test_the_evidence_is_of_these_systems():
    evidence = read_json(EVIDENCE, "the evidence")
    assert evidence.keys() == SYSTEMS.keys()
    assert all(set(row) == {"trains", "exports", *LAYOUTS} for row in evidence.values())
    assert set("".join(system.rule(ONE_B) for system in SYSTEMS.values())) == set(PRIMITIVES)


def run_tool(name, *options):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *map(str, options)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.skipif(cpu.has_gpu(), reason="compares CPU processes")
def test_the_evidence_is_what_runs(tmp_path):
    """Every system trains, is cut in two both ways, and is exported or not, as the table says; see the tool."""
    done = run_tool("check_systems.py", "--json", tmp_path / "found.json")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == read_json(EVIDENCE, "the evidence")


@pytest.mark.skipif(cpu.has_gpu(), reason="compares CPU processes")
def test_layouts_beside_the_tables(tmp_path):
    """Experts spread over ranks; tensor parallelism alone, where it is allowed; both parallelisms; virtual stages."""
    layouts = {
        "EMAE": "DP2xEP2",
        "GWEM": "CP2",
        "LE": "CP2",
        "SM": "TP2",
        "LM": "TP2",
        "WSEG": "TP2+SPxPP2",
        "LEGM": "PP2xVPP2@1,0,2,1",
    }
    cases = [{"sequence": letters, "layout": layout} for letters, layout in layouts.items()]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run_tool("compare_layouts.py", "--cases", tmp_path / "cases.json", "--json", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["case"]["layout"] for result in results] == list(layouts.values())
    # Routers, losses over a split vocabulary and Mamba-2's decays are computed in fp32.
    assert all(result["checkpoint"] and max(result["gradient"], result["loss"]) < 1e-5 for result in results), results
