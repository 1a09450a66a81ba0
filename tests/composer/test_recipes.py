"""Recipes: each is the paper's model, builds and differentiates at its real size, is accepted by Megatron, trains."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer_megatron.architecture import Architecture
from composer_megatron.cli import main
from composer_megatron.errors import FileError, UsageError
from composer_megatron.files import read_json
from composer_megatron.pipeline import Plan
from composer_megatron.recipes.catalogue import RECIPES, find_recipe
from composer_megatron.recipes.changes import LAYOUT_FIELDS, apply
from composer_megatron.recipes.layouts import lay_out, run_flags, tokens_of
from composer_megatron.recipes.paper import PAPER
from composer_megatron.recipes.recipe import OURS, Recipe
from composer_megatron.roofline import DEVICES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS
from composer_megatron.systems import EVIDENCE, SYSTEMS
from composer_search.extrapolate import extrapolate


def name_of(recipe: Recipe) -> str:
    return recipe.name


def foreign(recipe: Recipe) -> set[str]:
    """The kinds of its blocks that are neither attention nor an MLP."""
    return set(recipe.sequence.letters) - set("AMW")


EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=name_of)
PLAIN = pytest.mark.parametrize("recipe", [each for each in RECIPES.values() if not foreign(each)], ids=name_of)
FOREIGN = pytest.mark.parametrize("recipe", [each for each in RECIPES.values() if foreign(each)], ids=name_of)
TINY = ("shape=tiny", "seq_len=32", "global_batch_size=4", "steps=8")
SMALL = find_recipe("1b-stacked")


@functools.cache
def planned(name: str, gpus: int) -> Plan:
    return lay_out(find_recipe(name), gpus, DEVICES["h100"])


class TestValues:
    @pytest.mark.parametrize("shape", ["350m", "1b", "3b", "8b"])
    def test_sequences_are_what_the_rules_give(self, shape):
        short, long = CompositeSequence.parse("2A4M"), CompositeSequence.parse("2A5M2A3M1A3M")
        stacked = extrapolate(short, PRESETS[shape])
        assert RECIPES[f"{shape}-llama"].architecture == stacked.baseline()
        assert RECIPES[f"{shape}-stacked"].architecture == stacked
        assert RECIPES[f"{shape}-stretched"].architecture == extrapolate(long, PRESETS[shape], method="stretch")

    def test_models_of_a_size_see_the_same_tokens_in_the_same_way(self):
        for recipe in RECIPES.values():
            llama = RECIPES[f"{recipe.shape.name}-llama"]
            same = {"name": llama.name, "about": llama.about, "sequence": llama.sequence}
            assert dataclasses.replace(recipe, **same) == llama

    def test_tokens_for_each_weight_are_those_of_1b(self):
        one = RECIPES["1b-llama"]
        ratio = one.tokens / one.architecture.params_non_embedding
        for recipe in PAPER:
            size = RECIPES[f"{recipe.shape.name}-llama"].architecture.params_non_embedding
            assert recipe.tokens / size == pytest.approx(ratio, rel=0.005)  # they are rounded to 0.1B

    def test_only_what_was_published_has_a_source(self):
        published = {name for name in SMALL.as_dict() if SMALL.source(name) != OURS}
        kept = {"sequence", "shape", "data", "tokenizer", "tokens", "seq_len", "global_batch_size"}
        assert published == kept | {"learning_rate", "warmup", "cooldown"}

    def test_steps_reach_the_tokens(self):
        assert SMALL.step_tokens == 2**21
        assert 0 <= SMALL.steps * SMALL.step_tokens - 37_500_000_000 < SMALL.step_tokens
        assert SMALL.flops == SMALL.steps * SMALL.step_tokens * SMALL.architecture.flops_per_token(8192)

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("tokens", 0, "at least 1"),
            ("learning_rate", 0.0, "above 0"),
            ("learning_rate", math.nan, "above 0"),
            ("weight_decay", math.inf, "at least 0"),
            ("min_learning_rate", 1.0, "between 0 and learning_rate=0.0006"),
            ("warmup", 1.0, "below 1"),
            ("cooldown", 0.8, "between 0 and 0.75"),
            ("cooldown_style", "steep", "linear or cosine"),
            ("beta2", 1.0, "below 1"),
            ("sources", {"lr": "?"}, "lr, which are no fields"),
        ],
    )
    def test_values_that_cannot_be(self, field, value, words):
        with pytest.raises(UsageError, match=words) as caught:
            dataclasses.replace(SMALL, **{field: value})
        assert "recipe 1b-stacked" in str(caught.value)

    @given(
        steps=st.integers(1, 50),
        warmup=st.floats(0, 0.99),
        part=st.floats(0, 1),
        style=st.sampled_from(["linear", "cosine"]),
    )
    @example(steps=3, warmup=0.5, part=1.0, style="linear")  # both halves would round up
    @settings(deadline=None)  # the first example imports Megatron
    def test_schedule_is_the_trapezoid(self, steps, warmup, part, style):
        """Megatron's scheduler, given our flags, against the definition."""
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        batch = 4
        changed = {"warmup": warmup, "cooldown": part * (1 - warmup), "cooldown_style": style}
        recipe = dataclasses.replace(SMALL, tokens=steps * SMALL.step_tokens, min_learning_rate=1e-4, **changed)
        flags = recipe.megatron_flags()
        optimizer = type("Optimizer", (), {"param_groups": [{}]})()
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=flags["--lr"],
            min_lr=flags["--min-lr"],
            lr_warmup_steps=flags["--lr-warmup-iters"] * batch,
            lr_decay_steps=flags["--train-iters"] * batch,
            lr_decay_style=flags["--lr-decay-style"],
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=steps * batch,
            wd_incr_style="constant",
            wsd_decay_steps=flags["--lr-wsd-decay-iters"] * batch,
            lr_wsd_decay_style=flags["--lr-wsd-decay-style"],
        )
        rising, falling = recipe.warmup_steps, recipe.cooldown_steps
        assert rising < steps
        assert rising + falling <= steps
        for step in range(1, steps + 1):
            scheduler.step(increment=batch)
            wanted = 6e-4 * min(1.0, step / rising if rising else 1.0)
            if step > steps - falling:
                left = (steps - step) / falling
                wanted = 1e-4 + 5e-4 * (left if style == "linear" else (1 - math.cos(math.pi * left)) / 2)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


class TestRealSize:
    @EVERY
    def test_builds_with_as_many_parameters_as_counted(self, recipe):
        """On the meta device, which has no memory."""
        from composer_megatron.model import build_model

        model = build_model(recipe.architecture, max_sequence_length=recipe.seq_len, meta=True)
        assert sum(each.numel() for each in model.parameters()) == recipe.architecture.params_total

    @PLAIN
    def test_forward_and_backward_without_memory(self, recipe):
        """Every tensor has its size and no storage: 2 x 8,192 tokens through 8 billion weights in no memory.

        Not for experts, whose sizes depend on values, nor for recurrences, which take many operations here.
        """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        from composer_megatron.model import build_model, initialize_single_process

        initialize_single_process()
        with FakeTensorMode():
            model = build_model(recipe.architecture, max_sequence_length=recipe.seq_len, dtype=torch.bfloat16)
            tokens = torch.zeros(2, recipe.seq_len, dtype=torch.long)
            losses = model(tokens, tokens, None, labels=tokens)
            losses.sum().backward()
        assert losses.shape == tokens.shape
        assert all(each.grad is not None and each.grad.shape == each.shape for each in model.parameters())

    @EVERY
    def test_megatron_accepts_every_flag(self, recipe, tmp_path, monkeypatch, capsys):
        """As `composer_megatron.train` would start it on 8 GPUs: its own checks, then Megatron's."""
        from megatron.training import arguments

        from composer_megatron.arguments import parse_options
        from composer_megatron.train import megatron_command_line

        monkeypatch.setattr(arguments, "get_device_arch_version", lambda: 9)  # of an H100
        for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        plan, file = planned(recipe.name, 8), tmp_path / "architecture.json"
        recipe.architecture.save(file)
        argv = [*tokens_of(run_flags(recipe, plan, file)), "--mock-data"]
        monkeypatch.setattr("sys.argv", ["train", *megatron_command_line(parse_options(argv))])
        args = arguments.parse_args()
        arguments.validate_args(args)
        layout = plan.layout
        assert args.hybrid_layer_pattern == plan.pattern
        assert args.data_parallel_size == layout.data_parallel
        assert args.global_batch_size == args.micro_batch_size * layout.schedule.micro_batches * layout.data_parallel
        assert args.train_iters * args.seq_length * args.global_batch_size == recipe.steps * recipe.step_tokens
        assert (args.lr, args.weight_decay, args.seed) == (recipe.learning_rate, recipe.weight_decay, recipe.seed)
        assert args.lr_decay_iters in (None, args.train_iters)

    @pytest.mark.parametrize("gpus", [1, 8, 64])
    @EVERY
    def test_layouts_fit(self, recipe, gpus):
        smallest = 18 * recipe.architecture.params_total  # bytes of weights, gradients and optimizer state
        if gpus == 1 and smallest > DEVICES["h100"].memory:
            with pytest.raises(UsageError, match="use more GPUs"):
                planned(recipe.name, gpus)
            return
        plan = planned(recipe.name, gpus)
        assert plan.layout.ranks == gpus
        assert plan.layout.global_batch_size == recipe.global_batch_size
        assert plan.layout.seq_len == recipe.seq_len
        assert max(plan.memory_bytes) < 0.9 * DEVICES["h100"].memory
        assert plan.seconds > 0


class TestLayouts:
    def test_a_fixed_layout_is_kept(self):
        found = lay_out(SMALL, 8, DEVICES["h100"], {"tensor_parallel": 2, "pipeline_parallel": 2, "recompute": "full"})
        layout = found.layout
        assert (layout.tensor_parallel, layout.pipeline_parallel, layout.data_parallel) == (2, 2, 2)
        assert (layout.sequence_parallel, layout.distributed_optimizer) == (True, True)
        flags = run_flags(SMALL, found, Path("a.json"))
        assert flags["--recompute-granularity"] == "full"
        assert flags["--hybrid-layer-pattern"].count("|") == 1
        assert {"--sequence-parallel", "--use-distributed-optimizer", "--overlap-param-gather"} <= flags.keys()

    def test_selective_recomputation_and_interleaving_have_flags(self):
        fixed = {"pipeline_parallel": 2, "virtual_stages": 2, "recompute": "selective"}
        flags = run_flags(SMALL, lay_out(SMALL, 2, DEVICES["h100"], fixed), Path("a.json"))
        assert flags["--num-virtual-stages-per-pipeline-rank"] == 2
        assert flags["--recompute-granularity"] == "selective"
        assert "--overlap-grad-reduce" not in flags

    @pytest.mark.parametrize(
        ("fixed", "gpus", "words"),
        [
            ({"tensor_parallel": 3}, 8, "= 3 does not divide 8 GPUs"),
            ({"micro_batch_size": 3}, 8, "no multiple of 24"),
            ({}, 6, "no layout of 6 GPUs"),
            ({"tensor_parallel": 16}, 16, "does not divide num_query_groups=8"),
        ],
    )
    def test_layouts_that_cannot_be(self, fixed, gpus, words):
        with pytest.raises(UsageError, match=words):
            lay_out(SMALL, gpus, DEVICES["h100"], fixed)


class TestChanges:
    def test_changes(self):
        request = apply(SMALL, ["tokens=1e9", "shape=tiny", "sequence=(AM)x2", "learning_rate=1e-2", "tp=2"])
        recipe = request.recipe
        assert (recipe.tokens, recipe.shape, recipe.sequence.letters) == (10**9, PRESETS["tiny"], "AMAM")
        assert (recipe.learning_rate, dict(request.layout)) == (0.01, {"tensor_parallel": 2})
        assert recipe.source("tokens") == "changed here"
        assert recipe.architecture.origin["changed"] == ["sequence", "shape", "tokens", "learning_rate"]
        assert recipe.source("seq_len") == SMALL.source("seq_len")

    def test_steps_stand_for_tokens_of_the_changed_batch(self):
        recipe = apply(SMALL, ["steps=7", "global_batch_size=3", "seq_len=10"]).recipe
        assert (recipe.tokens, recipe.steps) == (210, 7)

    @given(st.sampled_from([each.name for each in dataclasses.fields(Recipe)] + list(LAYOUT_FIELDS)), st.data())
    def test_a_letter_more_or_less_finds_its_field(self, name, data):
        if name in ("name", "about", "sources", "beta1", "beta2") or len(name) < 4:  # not to be changed, or too alike
            return
        position = data.draw(st.integers(0, len(name) - 1))
        wrong = name[:position] + data.draw(st.sampled_from(["", name[position] * 2])) + name[position + 1 :]
        with pytest.raises(UsageError, match=f"did you mean '{name}'"):
            apply(SMALL, [f"{wrong}=1"])

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("lr=1", "no field 'lr': did you mean 'learning_rate'"),
            ("gbs=1", "did you mean 'global_batch_size'"),
            ("name=x", "no field 'name'"),
            ("tokens", "'tokens' is no change to recipe 1b-stacked: expected field=value"),
            ("tokens=many", "tokens=many: expected a whole number"),
            ("tokens=1.5", "tokens=1.5: expected a whole number"),
            ("tokens=inf", "tokens=inf: expected a whole number"),
            ("seq_len=0", "seq_len=0; expected at least 1"),
            ("learning_rate=", "learning_rate=: expected a number"),
            ("sequence=2Q", "unknown primitive 'Q'"),
            ("shape=1bb", "did you mean '1b'"),
            ("tp=two", "tp=two: expected a whole number"),
        ],
    )
    def test_bad_changes(self, text, words):
        with pytest.raises(UsageError, match=words):
            apply(SMALL, [text])

    def test_tokens_beside_steps(self):
        with pytest.raises(UsageError, match="give one of them"):
            apply(SMALL, ["steps=7", "tokens=1000"])


OWN = """
import dataclasses
from composer_megatron.recipes.catalogue import find_recipe

SHORT = dataclasses.replace(find_recipe("1b-llama"), name="short", tokens=10**9)

def longer():
    return dataclasses.replace(SHORT, name="longer", tokens=10**10)

def broken():
    return 1 / 0
"""


class TestFinding:
    def test_own_recipes(self, tmp_path):
        (tmp_path / "own.py").write_text(OWN)
        assert find_recipe(f"{tmp_path}/own.py:SHORT").tokens == 10**9
        assert find_recipe(f"{tmp_path}/own.py:longer").tokens == 10**10

    def test_the_page_s_own_recipe(self, tmp_path):
        page = Path(__file__).parents[2] / "docs" / "recipes.md"
        (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        (tmp_path / "page.py").write_text(block)
        assert find_recipe(f"{tmp_path}/page.py:SHORT").sequence.letters == "MMMMAA" * 4

    @pytest.mark.parametrize(
        ("content", "name", "words"),
        [
            (OWN, "SHRT", "no 'SHRT': did you mean 'SHORT'"),
            (OWN, "broken", r"broken\(\) failed: ZeroDivisionError"),
            (OWN, "dataclasses", "is a module; expected a Recipe"),
            ("1 +", "x", "fails when it is run: SyntaxError"),
            ("", "zzz", "recipes in it: none"),
        ],
    )
    def test_files_that_do_not_serve(self, tmp_path, content, name, words):
        (tmp_path / "own.py").write_text(content)
        with pytest.raises((UsageError, FileError), match=words):
            find_recipe(f"{tmp_path}/own.py:{name}")

    def test_unknown_names(self, tmp_path):
        with pytest.raises(UsageError, match="unknown recipe '1b-stakced': did you mean '1b-stacked'"):
            find_recipe("1b-stakced")
        with pytest.raises(FileError, match=r"none\.py is no file"):
            find_recipe(f"{tmp_path}/none.py:x")


class TestTraining:
    @FOREIGN
    def test_other_blocks_train_as_the_systems_they_are(self, recipe):
        """`tools/check_systems.py` trains each of them at a tiny shape, and keeps what it found."""
        name = recipe.name.removeprefix("1b-")
        assert recipe.architecture == SYSTEMS[name].architecture(PRESETS["1b"])
        assert read_json(EVIDENCE, "the evidence")[name]["trains"] is True

    @PLAIN
    def test_a_shrunk_recipe_learns(self, recipe):
        """Its blocks in tiny widths, under its optimizer at its peak: four steps on one batch."""
        import torch

        from composer_megatron.model import build_model

        small = apply(recipe, TINY).recipe
        torch.manual_seed(0)
        model = build_model(small.architecture, max_sequence_length=32)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=small.learning_rate,
            betas=(small.beta1, small.beta2),
            eps=small.epsilon,
            weight_decay=small.weight_decay,
        )
        tokens = torch.randint(512, (2, 33)) // 64 * 64  # eight different tokens: there is something to learn at once
        positions = torch.arange(32).expand(2, 32)
        losses = []
        for _ in range(4):
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), small.clip_grad)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(512), abs=0.3)
        assert losses[-1] < losses[0] - 0.05

    @pytest.mark.parametrize(("name", "processes", "layout"), [("8b-stretched", 2, ("pp=2", "micro_batch_size=2"))])
    def test_megatron_trains_it(self, name, processes, layout, place, tmp_path):
        """By `megatron.training.pretrain`, with the flags of a real run; the logged schedule is the recipe's."""
        request = apply(find_recipe(name), [*TINY, *layout])
        recipe = request.recipe
        plan = lay_out(recipe, processes, DEVICES["h100"], request.layout)
        file = tmp_path / "architecture.json"
        recipe.architecture.save(file)
        run = place.run(f"recipe-{name}", *tokens_of(run_flags(recipe, plan, file)), processes=processes)
        assert run.status == 0, run.output
        peak = recipe.learning_rate
        rates = [1 / 2, 1, 1, 1, 1, 1, 1 / 2, 0]
        assert list(run.scalars("learning-rate").values()) == pytest.approx([peak * rate for rate in rates])
        losses = list(run.scalars("lm loss").values())
        assert losses[-1] < losses[0]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code or 0


class TestCommands:
    def test_list(self, capsys):
        main(["recipe", "list"])
        shown = capsys.readouterr().out
        assert all(name in shown for name in RECIPES)
        main(["recipe", "list", "--json"])
        assert [each["name"] for each in json.loads(capsys.readouterr().out)] == list(RECIPES)

    def test_show(self, capsys):
        main(["recipe", "show", "8b-llama", "clip_grad=2", "--gpus", "1", "8"])
        shown = capsys.readouterr().out
        assert "changed here" in shown
        assert "no layout of 1 GPUs" in " ".join(shown.replace("│", " ").split())
        main(["recipe", "show", "8b-llama", "--gpus", "1", "8", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["costs"]["params_total"] == 8_030_261_248  # Llama 3.1 8B's, as published
        assert [each["gpus"] for each in found["layouts"]] == [1, 8]
        assert "problem" in found["layouts"][0]
        assert found["layouts"][1]["ranks"] == 8

    def test_flags_and_dry_run_are_one_run(self, capsys, place, tmp_path):
        """The flags that a launch script is given, and the command that `recipe train` shows, say the same."""
        file = tmp_path / "run" / "architecture.json"
        main(["recipe", "flags", "1b-stacked", *TINY, "pp=2", "--gpus", "4", "--architecture", str(file)])
        flags = set(capsys.readouterr().out.splitlines())
        assert Architecture.load(file) == apply(SMALL, TINY).recipe.architecture
        main(["recipe", "flags", "1b-stacked", *TINY, "--gpus", "4", "--architecture", str(file), "--json"])
        assert f"--architecture={file}" in json.loads(capsys.readouterr().out)
        before = sorted(tmp_path.rglob("*"))
        options = ["--text", str(place.path / "text"), "--run-dir", str(tmp_path / "run"), "--processes", "4"]
        main(["recipe", "train", "1b-stacked", *TINY, "pp=2", *options, "--dry-run", "--", "--log-interval", "2"])
        shown = capsys.readouterr().out.splitlines()[-1].split()
        assert shown[-2:] == ["--log-interval", "2"]
        assert flags <= {each.strip("'") for each in shown}
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["recipe", "show", "1b-stacked", "lr=1"], "did you mean 'learning_rate'"),
            (["recipe", "show", "2b"], "unknown recipe '2b'"),
            (["recipe", "show", "1b-llama", "--device", "h1000"], "did you mean 'h100'"),
            (["recipe", "flags", "1b-llama", "--gpus", "0", "--architecture", "a.json"], "gpus=0"),
            (["recipe", "flags", "1b-llama", "pp=2", "--gpus", "0", "--architecture", "a.json"], "expected at least 1"),
        ],
    )
    def test_bad_requests(self, arguments, words, capsys):
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert len(error.splitlines()) == 1

    def test_train_refuses_before_it_starts(self, place, tmp_path, capsys):
        """What the run would refuse, in the launching process: nothing is written."""
        text, run_dir = str(place.path / "text"), tmp_path / "run"
        train = ["recipe", "train", "1b-llama", *TINY, "--run-dir", str(run_dir), "--text"]
        assert command(*train, text, "--", "--lerning-rate", "1") == 2
        assert command(*train, text, "--megatron-flags", "'") == 2
        assert command(*train, str(tmp_path / "none")) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 3
        assert "unknown argument '--lerning-rate'" in errors[0]
        assert "quote it as for a shell" in errors[1]
        assert f"{tmp_path}/none" in errors[2]
        assert not run_dir.exists()

    def test_another_run_is_not_written_over(self, place, tmp_path, capsys):
        file = tmp_path / "architecture.json"
        SMALL.architecture.save(file)
        before = file.read_bytes()
        train = ["recipe", "train", "1b-llama", "--text", str(place.path / "text"), "--run-dir", str(tmp_path)]
        assert command(*train) == 2
        assert command("recipe", "flags", "1b-llama", "--gpus", "1", "--architecture", str(file)) == 2
        assert "is a run of another architecture" in capsys.readouterr().err
        assert file.read_bytes() == before
        assert sorted(tmp_path.iterdir()) == [file]
