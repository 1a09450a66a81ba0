"""Comparing layouts: they use all GPUs, fit, come best first, and what does not fit is said."""

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.errors import UsageError
from composer_megatron.planner.estimate import estimate
from composer_megatron.planner.survey import default_batch, survey
from composer_megatron.roofline import DEVICES
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


def llama(name: str) -> Architecture:
    return Architecture(CompositeSequence("AM" * PRESETS[name].baseline_pairs), PRESETS[name])


@pytest.mark.parametrize(("name", "gpus"), [("350m", 2), ("1b", 8), ("8b", 64)])
def test_every_layout_is_possible(name: str, gpus: int) -> None:
    plans = survey(llama(name), gpus, DEVICES["h100"])
    assert 2 <= len(plans) <= 10
    seconds = [estimate(plan).seconds for plan in plans]
    assert seconds == sorted(seconds)
    for plan in plans:
        assert plan.layout.ranks == gpus
        assert plan.layout.global_batch_size == default_batch(gpus, 4096)
        assert max(plan.memory_bytes) <= 0.9 * 80e9


def test_small_models_on_few_gpus_need_data_parallelism_alone() -> None:
    best = survey(llama("1b"), 8, DEVICES["h100"])[0].layout
    assert (best.data_parallel, best.tensor_parallel, best.pipeline_parallel) == (8, 1, 1)


def test_large_models_on_many_gpus() -> None:
    """70B on 1,024 GPUs: without model parallelism nothing fits; the best is near published runs, 30 to 50 % MFU."""
    model = llama("70b")
    plans = survey(model, 1024, DEVICES["h100"], seq_len=8192, most=3)
    best = plans[0]
    assert best.layout.tensor_parallel * best.layout.pipeline_parallel >= 8
    tokens = best.layout.global_batch_size * 8192 / estimate(best).seconds / 1024
    assert 0.3 < model.flops_per_token(8192) * tokens / 989e12 < 0.5
    assert "tp" in str(best.layout)


@pytest.mark.parametrize(
    ("name", "gpus", "options", "message"),
    [
        ("1b", 0, {}, "gpus=0"),
        ("70b", 1, {}, "the least needs .* GB on some GPU"),
        ("1b", 7, {"global_batch_size": 8}, "no layout of 7 GPUs fits"),
        ("1b", 8, {"memory_limit": 1e9}, "keeps 1.0 GB"),
    ],
)
def test_nothing_fits(name: str, gpus: int, options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        survey(llama(name), gpus, DEVICES["h100"], **options)
