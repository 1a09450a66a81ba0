"""The training benchmark: the plain model is the same model, a step's parts add up, contenders that fail say why."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from composer_megatron.architecture import Architecture
from composer_megatron.errors import ComposerError, UsageError
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS

ROOT = Path(__file__).parents[2]
TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=96, num_query_groups=2)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plain_model_computes_what_megatron_does(load, tied: bool) -> None:
    plain_model = load("plain_model")
    model = pytest.importorskip("composer_megatron.model", reason="needs the extra [train]")
    shape = dataclasses.replace(TINY, tied_embeddings=tied)
    architecture = Architecture(CompositeSequence.parse("1M2A1M"), shape)
    megatron = model.build_model(architecture, max_sequence_length=12, backend="local")
    plain = plain_model.PlainModel(architecture)
    with torch.no_grad():
        _copy(dict(megatron.named_parameters()), plain, shape)
    assert sum(each.numel() for each in plain.parameters()) == architecture.params_total
    tokens = torch.randint(shape.vocab_size, (2, 13))
    positions = torch.arange(12).expand(2, -1)
    labels = tokens[:, 1:].contiguous()
    expected = megatron(tokens[:, :-1], positions, None, labels=labels).mean()
    got = plain(tokens[:, :-1], labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)  # fp32, sums of 64 to 256 terms in another order
    expected.backward()
    got.backward()
    gradient = dict(megatron.named_parameters())["embedding.word_embeddings.weight"].grad
    torch.testing.assert_close(plain.embedding.weight.grad, gradient, rtol=1e-4, atol=1e-6)


def _copy(source, plain, shape) -> None:
    """Megatron keeps the query heads of a group beside its key and value; the plain model all queries first."""
    plain.embedding.weight.copy_(source["embedding.word_embeddings.weight"])
    plain.norm.weight.copy_(source["decoder.final_norm.weight"])
    if not shape.tied_embeddings:
        plain.head.weight.copy_(source["output_layer.weight"])
    for number, block in enumerate(plain.blocks):
        part = {
            name.split(f"layers.{number}.")[1]: each for name, each in source.items() if f"layers.{number}." in name
        }
        if hasattr(block, "gate_up"):
            block.gate_up.weight.copy_(part["mlp.linear_fc1.weight"])
            block.down.weight.copy_(part["mlp.linear_fc2.weight"])
            continue
        per_group = shape.num_attention_heads // shape.num_query_groups
        packed = part["self_attention.linear_qkv.weight"]
        heads = packed.view(shape.num_query_groups, per_group + 2, shape.head_dim, -1)
        ordered = [heads[:, :per_group], heads[:, per_group], heads[:, per_group + 1]]
        block.qkv.weight.copy_(torch.cat([each.reshape(-1, shape.hidden_size) for each in ordered]))
        block.out.weight.copy_(part["self_attention.linear_proj.weight"])


def test_fp32_masters_accumulate_micro_batches(load) -> None:
    plain_model = load("plain_model")
    architecture = Architecture(CompositeSequence.parse("1A1M"), TINY)
    cpu = torch.device("cpu")
    trainer = plain_model.PlainTrainer(architecture, masters=True, device=cpu, dtype=torch.float32)
    trainer.add_state()
    tokens = torch.randint(TINY.vocab_size, (4, 9))
    whole = trainer.model(tokens[:, :-1], tokens[:, 1:])
    wanted = torch.autograd.grad(whole, trainer.params)
    norm = torch.stack([each.norm() for each in wanted]).norm()
    trainer.step(list(tokens.view(2, 2, 9)))
    for master, gradient in zip(trainer.masters, wanted, strict=True):
        torch.testing.assert_close(master.grad, gradient / max(1.0, float(norm)), rtol=1e-3, atol=1e-6)
    stored = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in trainer.tensors()}
    assert sum(stored.values()) == 20 * architecture.params_total  # weight, master, gradient and moments, all fp32 here


def test_kernels_are_counted_once_and_by_kind(load) -> None:
    module = load("breakdown")
    kernel = module.Kernel
    kernels = [
        kernel("nvjet_tst_128x256_TNT", 0.0, 2.0),
        kernel("_forward_kernel", 2.0, 2.5),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 2.5, 3.5),
        kernel("at::cuda::spin_kernel(long)", 3.5, 3.6),
        kernel("nvjet_tst_head", 4.0, 6.0),
        kernel("vectorized_elementwise_kernel", 6.0, 6.5),  # in the head: the loss
        kernel("at::cuda::spin_kernel(long)", 6.5, 6.6),
        kernel("vectorized_elementwise_kernel", 7.0, 7.25),
        kernel("triton_red_fused__log_softmax_nll_loss_3", 7.25, 7.5),
        kernel("overlapping_gemm", 7.25, 7.75),
        kernel("vectorized_elementwise_kernel", 9.0, 9.5),  # in the optimizer's span
        kernel("Memset (Device)", 10.0, 10.5),
        kernel("_update_kernel", 11.0, 11.25),  # the optimizer's, outside the span
    ]
    found = module.breakdown(kernels, [kernel("optimizer", 8.5, 9.75)])
    assert found["breakdown"] == pytest.approx(
        {
            "gemm": 4.5,
            "elementwise": 0.75,
            "attention": 1.0,
            "loss": 0.75,
            "optimizer": 0.75,
            "copies": 0.5,
            "idle": 3.05,
        }
    )
    longest = {"after": "overlapping_gemm", "before": "vectorized_elementwise_kernel", "times": 1, "seconds": 1.25}
    assert found["waits"][0] == longest
    assert found["launches"] == 11
    assert found["kernels"][0]["kind"] == "gemm"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*)", "attention"),
        ("void cudnn::fusion::convert_dq_to_16bits<true>(void const*)", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at", "attention"),
        ("kernel_cutlass_kernel_quackgemm_sm90GemmSm90_object_at", "gemm"),
        ("nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_TNT", "gemm"),
        ("void transformer_engine::dgated_act_kernel<16, true, float>", "elementwise"),
        ("triton_red_fused__log_softmax__to_copy_prepare_softmax_online_8", "loss"),
        ("void transformer_engine::scaled_masked_softmax_warp_forward<__nv_bfloat16, __nv_bfloat16, 12>", "attention"),
        ("void transformer_engine::scaled_upper_triang_masked_softmax_warp_backward<__half, 12>", "attention"),
        ("void transformer_engine::scaled_softmax_warp_forward<__nv_bfloat16, float, 12>", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>", "loss"),
        ("triton_red_fused_copy__exp_sub_sum_unsqueeze_2", "elementwise"),  # Megatron's loss, which the markers tell
    ],
)
def test_kernels_that_a_gpu_showed_are_known_by_name(load, name: str, kind: str) -> None:
    module = load("breakdown")
    kernel = module.Kernel(name, 0.0, 1.0)
    assert module._kind(kernel, [], in_head=False) == kind
    assert module._kind(kernel, [], in_head=True) == ("loss" if kind == "elementwise" else kind)


def test_profiler_events_become_kernels(load) -> None:
    module = load("breakdown")
    from types import SimpleNamespace as Event

    device = torch.autograd.DeviceType

    def event(name, start, kind=device.CUDA, **more):
        return Event(name=name, time_range=Event(start=start, end=start + 5), device_type=kind, **more)

    kernels, spans = module.kernels_of(
        [
            event("later", 20, is_user_annotation=False),
            event("first", 10, is_user_annotation=False),
            event("optimizer", 18, is_user_annotation=True),
            event("## Call CompiledFxGraph ##", 9, is_user_annotation=True),
            event("aten::mm", 9, device.CPU, is_user_annotation=False),
        ]
    )
    assert [each.name for each in kernels] == ["first", "later"]
    assert [each.start for each in spans] == [18e-6]


def test_ideal_seconds_of_llama_1b(load) -> None:
    roofline = load("training_roofline")
    llama = Architecture(CompositeSequence("AM" * 16), PRESETS["1b"])
    parts = roofline.ideal_seconds(llama, 4096, 16_384, {"copy": 3e12, "gemm": 704e12})
    # By hand: 1235.7M weights in products; 4·2048 FLOPs of 2048.5 keys in 16 blocks, forward 1/495, backward 2.5/415.
    assert parts["gemm"] == pytest.approx(6 * 1_235_746_816 * 16_384 / 704e12, rel=1e-3)
    core = 4 * 2048 * 2048.5 * 16
    assert parts["attention"] == pytest.approx(core * (1 / 495e12 + 2.5 / 415e12) * 16_384, rel=1e-6)
    elements = 16 * (2 * 16 * 2048 + 2 * 4 * 40 * 64 + 16 * 8192) + 16 * 2048
    assert parts["elementwise"] == pytest.approx(elements * 16_384 / 3e12, rel=1e-6)
    assert parts["loss"] == pytest.approx(6 * 128_256 * 16_384 / 3e12)
    assert parts["optimizer"] == pytest.approx(38 * llama.params_total / 3e12)
    assert roofline.total(parts) == pytest.approx(sum(parts.values()))


def test_models_of_a_shape(load) -> None:
    models = load("training_models")
    made = models.architectures("1b", models.MODELS)
    assert {name: each.sequence.count("A") for name, each in made.items()} == {
        "llama": 16,
        "stacked": 9,
        "stretched": 10,
        "matched": 9,
    }
    large = models.architectures("3b", ["stacked", "stretched"])
    assert [(each.sequence.count("A"), each.sequence.count("M")) for each in large.values()] == [(16, 32), (15, 33)]
    llama = made["llama"].matrix_parameters
    assert made["matched"].matrix_parameters == pytest.approx(llama, rel=2e-3)
    assert made["stacked"].matrix_parameters > 1.02 * llama
    assert "matched" not in models.architectures("3b", models.MODELS)  # stacking comes out even there
    with pytest.raises(UsageError, match="bigger"):
        models.architectures("1b", ["bigger"])


def test_a_step_has_the_tokens_asked_for(load) -> None:
    models = load("training_models")
    llama = Architecture(CompositeSequence("AM" * 16), PRESETS["1b"])
    for length in (2048, 4096, 8192, 16_384, 32_768):
        size = models.workload(llama, length, 65_536, 16_384)
        assert size.tokens == 65_536
        assert size.micro_batch == max(1, 16_384 // length)


@pytest.mark.parametrize(
    ("shape", "gigabytes", "tokens"), [("1b", 80, 16_384), ("3b", 80, 4096), ("3b", 141, 16_384), ("350m", 80, 16_384)]
)
def test_micro_batches_fit_the_gpu(load, monkeypatch, shape: str, gigabytes: int, tokens: int) -> None:
    models = load("training_models")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gigabytes * 10**9))
    llama = models.architectures(shape, ["llama"])["llama"]
    size = models.workload(llama, 4096, 65_536, None)
    assert size.micro_batch * size.seq_len == tokens
    assert size.tokens == 65_536


def test_contenders_take_turns_and_failures_have_rows(load, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="needs the extra [train]")
    output = tmp_path / "training.json"
    command = [sys.executable, str(ROOT / "benchmarks/bench_training.py"), "--shapes", "tiny", "--models", "llama"]
    command += ["--backends", "composer", "te", "compile", "--lengths", "16", "--step-tokens", "64", "--steps", "2"]
    command += ["--rounds", "2", "--output", str(output)]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "search"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    rows = {row["backend"]: row for row in result["rows"]}
    assert set(rows) == {"composer", "te", "compile"}
    assert "transformer_engine" in rows["te"]["note"]
    assert "median_seconds" not in rows["te"]
    for name in ("composer", "compile"):
        row = rows[name]
        assert len(row["seconds"]) == 4
        assert row["tokens_per_second"] == pytest.approx(64 / row["median_seconds"])
        assert row["tflops"] == pytest.approx(row["flops_per_token"] * row["tokens_per_second"] / 1e12)
        assert row["note"] == ""
    assert "backend te needs" in done.stdout


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        (
            "--backends composer+linear=fp9",
            "composer.linear=fp9: unknown player of linear 'fp9': did you mean 'fp8'",
            2,
        ),
        ("--backends composer+linear", "composer.linear: expected NAME or NAME.PART=PLAYER", 2),
        (
            "--backends compiled",
            "compiled: unknown backend 'compiled': .*; plain PyTorch is compile or compile-bf16",
            2,
        ),
        ("--backends compile:gpt --models llama", "compile:gpt: after the colon expected one of llama", 2),
        ("--models gpt", "'gpt': expected llama, stacked, stretched, matched", 2),
        ("--shapes 2b", "unknown shape '2b': .*presets: 350m, 1b", 2),
        ("--lengths 4096 0", "--lengths 0: expected 1 or more", 2),
        ("--steps 0", "--steps 0: expected 1 or more", 2),
        ("--quick", "no GPU was found, and 1b has 1,... M weights; --shapes tiny", 1),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    load, monkeypatch, capsys, options: str, said: str, status: int
) -> None:
    bench = load("bench_training")
    monkeypatch.setattr(bench, "Contender", None)  # none is started
    with pytest.raises(ComposerError, match=said) as caught:
        bench.run(bench.parse(options.split()))
    assert caught.value.exit_code == status
    assert "\n" not in str(caught.value)


def test_a_backend_can_be_asked_for_one_model(load) -> None:
    bench = load("bench_training")
    given = "--shapes tiny --models llama stacked --backends composer compile:llama --lengths 16"
    (heat,) = bench.heats(bench.parse(given.split()))
    assert heat.pairs == (("llama", "composer"), ("stacked", "composer"), ("llama", "compile"))


def test_a_worker_that_dies_is_reported_and_replaced(load, tmp_path: Path) -> None:
    bench = load("bench_training")
    llama = Architecture(CompositeSequence("AM"), TINY)
    contender = bench.Contender("llama", llama, "compile", tmp_path, tmp_path)
    contender._process.kill()
    contender.send(do="measure", warmup=0, steps=1)
    assert "ended with status -9" in contender.receive()["note"]
    other = contender.alive()
    assert other is not contender
    other.end()
    contender.end()


def test_a_budget_costs_rounds_and_never_a_row(load, monkeypatch) -> None:
    bench = load("bench_training")
    now = [0.0]
    monkeypatch.setattr(load("training_plan").time, "monotonic", lambda: now[0])
    budget = bench.Budget(100.0, 4)
    budget.next()
    assert budget.allows(25.0)
    assert not budget.allows(25.1)
    now[0] = 40.0  # late: the others share what is left
    budget.next()
    assert budget.allows(20.0)
    assert not budget.allows(20.1)
    now[0] = 120.0
    budget.next()
    assert not budget.allows(0.1)
    options = bench.parse(["--models", "llama", "stacked", "--backends", "composer", "compile", "--together", "2"])
    options.shapes, options.lengths = ["tiny"], [8192, 32_768]
    found = [(heat.seq_len, [backend for _, backend in heat.pairs]) for heat in bench.heats(options)]
    assert found == [
        (8192, ["composer"] * 2),
        (32_768, ["composer"] * 2),
        (8192, ["compile"] * 2),
        (32_768, ["compile"] * 2),
    ]


def test_without_memory_a_contender_tries_smaller_micro_batches(load, capsys) -> None:
    bench = load("bench_training")
    asked: list[dict] = []

    class Small:
        """Has memory to prepare two sequences, and to measure one."""

        name, model, backend, architecture = "llama x", "llama", "x", Architecture(CompositeSequence("AM"), TINY)

        def send(self, **command) -> None:
            asked.append(command)

        def receive(self) -> dict:
            size = next(command["micro_batch"] for command in reversed(asked) if command["do"] == "prepare")
            measured = asked[-1]["do"] == "measure"
            if size > (1 if measured else 2):
                return {"note": bench.OUT_OF_MEMORY}
            return {"seconds": [2.0], "peak_bytes": None, "loss": 1.0} if measured else {"prepared_in": 1.0, "says": ""}

    case = bench.Case(bench.Workload(16, 9, 1), [Small()], {"copy": None, "gemm": None})
    case.prepare()
    assert [(command["micro_batch"], command["micro_batches"]) for command in asked] == [(9, 1), (4, 2), (2, 4)]
    assert case.notes == {}
    assert "out of memory; again with 4 x 16" in capsys.readouterr().out
    row = case.row(case.contenders[0])
    assert (row["micro_batch"], row["micro_batches"], row["note"]) == (2, 4, "")
    case.answers["llama x"] = [{"seconds": [9.0], "peak_bytes": None, "loss": 1.0}]  # of the size that was given up
    assert len(list(case.round(0, 1))) == 1
    row = case.row(case.contenders[0])
    assert (row["micro_batch"], row["micro_batches"], row["rounds"]) == (1, 8, 1)
    assert row["tokens_per_second"] == 8 * 16 / 2


def test_a_worker_gives_memory_back_before_it_says_why_it_failed(load) -> None:
    """Nothing may refer to the tensors of the step that failed, or the next contender finds no room."""
    worker = load("training_worker")
    kept: list[weakref.ref] = []
    order: list[str] = []

    class Lock:
        def take(self) -> None: ...

        def release(self) -> None:
            order.append("released")

    made = worker.Worker(Architecture(CompositeSequence("AM"), TINY), "composer", Lock())

    def fail(**_) -> dict:
        activations = torch.zeros(3)
        kept.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def rest() -> None:
        gc.collect()
        order.append("freed" if kept[0]() is None else "held")

    made.measure, made.rest = fail, rest
    answers: list[dict] = []
    worker._serve(made, ['{"do": "measure"}'], lambda found: (order.append("said"), answers.append(found)))
    assert order == ["freed", "released", "said"]
    assert answers == [{"note": "out of memory"}]
