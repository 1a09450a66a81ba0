"""The flags that ``composer-megatron flags`` prints are Megatron's own, and make the architecture."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from composer_megatron import cli
from composer_megatron.architecture import Architecture
from composer_megatron.arguments import given_flags
from composer_megatron.errors import UsageError
from composer_megatron.pattern import hybrid_pattern
from composer_megatron.pipeline import cut_sequence
from composer_megatron.script_flags import as_arguments, as_shell_text, gpt_layout, script_flags
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

ARCHITECTURE = Architecture(CompositeSequence.parse("2M5A2M3A"), PRESETS["tiny"])


def parsed(script: str, **layout: int) -> dict:
    """What Megatron's own parser makes of the line, with no flag unknown."""
    return given_flags(shlex.split(as_shell_text(script_flags(ARCHITECTURE, script, **layout))))


def test_one_stage():
    hybrid, gpt = parsed("hybrid"), parsed("gpt")
    assert hybrid["spec"] == ["composer_megatron.specs", "composite_stack_spec"]
    assert gpt["spec"] == ["composer_megatron.gpt_spec", "gpt_spec"]
    assert hybrid["hybrid_layer_pattern"] == "--*****--***"
    assert (gpt["num_layers"], gpt.get("hybrid_layer_pattern")) == (12, None)
    for found in (hybrid, gpt):
        assert (found["attention_dropout"], found["hidden_dropout"], found["padded_vocab_size"]) == (0.0, 0.0, 512)
        assert "pipeline_model_parallel_size" not in found
        assert "untie_embeddings_and_output_weights" not in found
    assert {k: v for k, v in hybrid.items() if k not in ("spec", "hybrid_layer_pattern")} == {
        k: v for k, v in gpt.items() if k not in ("spec", "num_layers")
    }


@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_both_scripts_cut_alike(virtual_stages):
    layout = {"pipeline": 2, "virtual_stages": virtual_stages, "seq_len": 64}
    cut = cut_sequence(ARCHITECTURE, 2, virtual_stages=virtual_stages, seq_len=64)
    assert len(cut) == 2 * virtual_stages
    hybrid, gpt = parsed("hybrid", **layout), parsed("gpt", **layout)
    assert hybrid["hybrid_layer_pattern"] == hybrid_pattern(ARCHITECTURE.sequence, cut)
    assert gpt["pipeline_model_parallel_layout"] == gpt_layout(cut)
    assert hybrid["pipeline_model_parallel_size"] == gpt["pipeline_model_parallel_size"] == 2


def test_a_layout_says_stages_and_empty_ones():
    assert gpt_layout([5, 3]) == "Et*5|t*3L"
    assert gpt_layout([4, 0, 1, 5]) == "Et*4||t*1|t*5L"


def test_untied_embeddings_are_said():
    untied = dataclasses.replace(ARCHITECTURE, shape=dataclasses.replace(ARCHITECTURE.shape, tied_embeddings=False))
    assert "--untie-embeddings-and-output-weights" in as_arguments(script_flags(untied, "hybrid"))


def test_more_stages_than_can_be():
    with pytest.raises(UsageError, match="2 virtual stages on one pipeline rank"):
        script_flags(ARCHITECTURE, "hybrid", virtual_stages=2)
    with pytest.raises(UsageError, match="13 pipeline"):
        script_flags(ARCHITECTURE, "hybrid", pipeline=13)


def test_the_command_prints_them_for_a_shell_and_for_programs(tmp_path, capsys):
    ARCHITECTURE.save(tmp_path / "architecture.json")
    command = ["flags", str(tmp_path / "architecture.json"), "--script", "gpt", "--pp", "2", "--seq-len", "64"]
    wanted = as_arguments(script_flags(ARCHITECTURE, "gpt", pipeline=2, seq_len=64))
    cli.main(command)
    assert shlex.split(capsys.readouterr().out) == wanted
    cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out) == wanted


def test_the_page_names_flags_that_exist():
    """Of Megatron's, of torchrun's or of ours."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_megatron_arguments(parser)
    page = (Path(__file__).parents[2] / "docs/pipelines.md").read_text(encoding="utf-8")
    ours = {"--pp", "--vpp", "--script", "--architecture", "--run-dir", "--nproc-per-node"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page))
    assert named - ours <= set(parser._option_string_actions)
    assert named & ours
