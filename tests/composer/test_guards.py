"""What is refused before anything starts, and that it would go wrong in silence otherwise."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from composer_megatron import guards
from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

SHAPE = dataclasses.replace(PRESETS["tiny"], num_query_groups=2)
ARCHITECTURE = Architecture(CompositeSequence.parse("2A4M"), SHAPE)


def layout(world_size: int = 8, *, virtual_stages: int = 1, **given):
    return guards.check_layout(ARCHITECTURE, given, virtual_stages=virtual_stages, seq_len=64, world_size=world_size)


def test_a_layout_that_fits():
    found = layout(
        8,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        micro_batch_size=2,
        global_batch_size=16,
        sequence_parallel=True,
    )
    assert (found.data_parallel, found.ranks, found.schedule.micro_batches) == (2, 8, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"world_size": 1, "tensor_model_parallel_size": 2},
            "x context 1 = 2 ranks do not divide 1 process; start",
        ),
        (
            {"world_size": 6, "tensor_model_parallel_size": 2, "context_parallel_size": 2},
            "= 4 ranks do not divide 6",
        ),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size 0; expected at least 1"),
        ({"tensor_model_parallel_size": 4}, "tensor_parallel=4 does not divide num_query_groups=2"),
        ({"pipeline_model_parallel_size": 8}, "8 pipeline stages for the 6 blocks"),
        (
            {"pipeline_model_parallel_size": 4, "virtual_stages": 2, "global_batch_size": 8},
            "8 pipeline stages",
        ),
        (
            {"pipeline_model_parallel_size": 2, "virtual_stages": 3, "global_batch_size": 12},
            "3 micro-batches on 2",
        ),
        ({"world_size": 6, "context_parallel_size": 3}, "seq_len=64 is no multiple of 6"),
        ({"global_batch_size": 12}, "--global-batch-size 12 is no multiple of 8"),
        ({"global_batch_size": 0}, "--global-batch-size 0 is no multiple of 8"),
        ({"micro_batch_size": 0}, "micro_batch_size=0; expected at least 1"),
        ({"pipeline_model_parallel_size": 2, "hybrid_layer_pattern": "**|--|--"}, "has 3 stages for 2 pipeline ranks"),
    ],
)
def test_layouts_that_do_not_fit(given, message):
    with pytest.raises(UsageError, match=message):
        layout(**given)


def test_stages_cut_by_hand_may_be_empty():
    found = layout(2, pipeline_model_parallel_size=2, hybrid_layer_pattern="**----|||||||", global_batch_size=4)
    assert (found.pipeline_parallel, found.virtual_stages) == (2, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_layers": 6}, r"^--num-layers does not go with an architecture file: --architecture says how many"),
        ({"pipeline_model_parallel_layout": "Et*6L"}, "--pipeline-model-parallel-layout .* --hybrid-layer-pattern"),
        ({"use_rope_scaling": True}, "--use-rope-scaling .*: give its shape a rope_scaling_factor instead"),
        ({"window_size": (4, 0)}, "--window-size does not go"),
        ({"num_experts": 4}, "--num-experts .*: no block of the architecture has experts"),
        ({"hybrid_layer_pattern": "MMMM"}, r"'MMMM': 'M' is no block of an architecture file; expected \* and -"),
    ],
)
def test_flags_of_other_models(given, message):
    """Megatron's hybrid model takes no notice of the first four and trains; the last would be Mamba."""
    with pytest.raises(UsageError, match=message):
        guards.check_flags(given)


def test_every_refused_flag_is_one_of_megatrons_and_off_by_default():
    from composer_megatron.arguments import _megatron_parser, flag_of

    parser, _ = _megatron_parser()
    defaults = vars(parser.parse_args([]))
    for name in guards._NOT_IN_A_COMPOSITE:
        assert flag_of(name).startswith("--")
        assert defaults[name] in (None, False, *guards._HARMLESS.get(name, ()))
    guards.check_flags(defaults)
    guards.check_flags({"hybrid_layer_pattern": "**|--|--"})


def config(**changes):
    """Of two ranks with two stages each."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": 6,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": "fp32",
        "overlap_p2p_comm": False,
        "batch_p2p_comm": True,
    }
    return TransformerConfig(**(fields | changes))


def test_the_schedule_that_mixes_up_tensors():
    with pytest.raises(UsageError, match=r"set overlap_p2p_comm=True and batch_p2p_comm=False"):
        guards.check_schedule(config())


def test_the_stack_refuses_it_wherever_it_is_built():
    from composer_megatron.backend import get_backend
    from composer_megatron.model import initialize_single_process
    from composer_megatron.specs import stack_spec

    initialize_single_process()
    spec = stack_spec(get_backend("local"))
    with pytest.raises(UsageError, match="exchange wrong tensors in silence"):
        spec.module(config(), spec.submodules, **spec.params)


@pytest.mark.parametrize(
    "changes",
    [
        {"overlap_p2p_comm": True, "batch_p2p_comm": False},
        {"virtual_pipeline_model_parallel_size": None},
        {"pipeline_model_parallel_size": 4},
    ],
)
def test_schedules_that_are_right(changes):
    guards.check_schedule(config(**changes))


def test_what_blocks_a_checkpoint_holds():
    names = ["embedding.word_embeddings.weight", "optimizer.state.exp_avg.decoder.layers.9.mlp.linear_fc1.weight"]
    names += [f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (0, 2, 10)]
    names += [f"decoder.layers.{layer}.self_attention.linear_qkv.weight" for layer in (1, 2)]
    assert guards.saved_blocks(names) == "MA" + "AM" + 7 * "?" + "M"
    assert guards.saved_blocks([]) == ""


@pytest.mark.parametrize(
    ("sequence", "changes", "message"),
    [
        ("1M2A2M1A2M", {}, "it has 7 blocks there and 8 here"),
        ("2M1A2M1A1M", {}, "block 2 is A there and M here"),
        (None, {"hidden_size": 64}, r"is \(300, 32\) there and \(300, 64\) here"),
        (None, {"ffn_hidden_size": 64}, r"linear_fc1.weight is \(96, 32\) there and \(128, 32\) here"),
        (None, {"tied_embeddings": True}, "its output layer is not tied"),
    ],
)
def test_checkpoints_of_another_architecture(runs, sequence, changes, message):
    known = Architecture.load(runs["plain"] / "architecture.json")
    guards.check_checkpoints(runs["plain"] / "checkpoints", known)
    other = Architecture(
        known.sequence if sequence is None else CompositeSequence.parse(sequence),
        dataclasses.replace(known.shape, **changes),
    )
    with pytest.raises(UsageError, match=message):
        guards.check_checkpoints(runs["plain"] / "checkpoints", other)
    with pytest.raises(UsageError, match="is a run of another architecture"):
        guards.check_same(known, other, runs["plain"] / "architecture.json")


@pytest.mark.parametrize(
    ("names", "saved"),
    [
        (["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight", "optimizer.state.fp32_param.x"], False),
        (["optimizer.state.exp_avg.x", "optimizer.state.param.decoder.layers.0.mlp.linear_fc1.weight"], True),
        (["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.exp_avg"], True),
        (["decoder.layers.0.mlp.linear_fc1.weight"], None),
    ],
)
def test_the_distributed_optimizer_goes_on_only_from_its_own_checkpoints(monkeypatch, names, saved):
    monkeypatch.setattr(guards, "_newest_tensors", lambda folder: dict.fromkeys(names, (1,)))
    for distributed in (False, True):
        if saved in (None, distributed):
            guards.check_optimizer(Path("checkpoints"), distributed=distributed)
            continue
        advice = "add that flag" if saved else "leave out that flag"
        with pytest.raises(UsageError, match=f"checkpoints was saved with.* --use-distributed-optimizer .*{advice}"):
            guards.check_optimizer(Path("checkpoints"), distributed=distributed)


def test_folders_that_are_nobodys(runs, tmp_path):
    guards.check_checkpoints(tmp_path / "none", ARCHITECTURE)
    folder = Path(shutil.copytree(runs["plain"] / "checkpoints", tmp_path / "torn"))
    (folder / "iter_0000007/.metadata").write_bytes(b"torn")
    guards.check_checkpoints(folder, ARCHITECTURE)


def test_saving_over_another_model_is_refused_and_leaves_it_alone(place, one_process):
    """A plain --save folder, too, has nothing but its checkpoints to be known by."""
    other = Architecture(CompositeSequence.parse("5M2A5M"), Architecture.load(place.path / "architecture.json").shape)
    other.save(place.path / "other.json")
    theirs = one_process.folder / "checkpoints"
    before = {file: file.stat().st_mtime_ns for file in theirs.rglob("*")}
    for flags in (("--save", str(theirs)), ("--load", str(theirs))):
        refused = place.run("elsewhere", "--architecture", str(place.path / "other.json"), *flags)
        assert refused.status == 2
        assert refused.errors[0].endswith("block 1 is A there and M here; choose another folder")
    refused = place.run("one", "--architecture", str(place.path / "other.json"))
    assert refused.errors[0].endswith("block 1 is A there and M here; choose another --run-dir")
    assert {file: file.stat().st_mtime_ns for file in theirs.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "processes", "message"),
    [
        (("--tensor-model-parallel-size", "2"), 1, "= 2 ranks do not divide 1 process"),
        (("--spec", "no_such_module", "spec"), 2, "--spec no_such_module spec: there is no such module"),
        (("--wandb-project", "x", "--wandb-exp-name", "y"), 1, "wandb.*install it, or leave out the flag"),
        (("--num-layers", "12"), 2, "--num-layers does not go with an architecture file"),
    ],
)
def test_all_ranks_end_with_one_message(place, flags, processes, message):
    refused = place.run("wrong", *flags, processes=processes)
    assert refused.status != 0
    assert len(refused.errors) == 1, refused.output
    assert re.search(message, refused.errors[0])
    assert "Traceback" not in refused.output
