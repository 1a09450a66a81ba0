"""Backends play the parts; which one plays them changes no parameter."""

import dataclasses

import pytest

from composer_megatron.architecture import Architecture
from composer_megatron.backend import BACKENDS, get_backend
from composer_megatron.errors import UsageError
from composer_megatron.model import build_model
from composer_megatron.sequence import CompositeSequence
from composer_megatron.shape import PRESETS


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_builds_the_same_parameters(name):
    architecture = Architecture(CompositeSequence.parse("2A4M"), PRESETS["tiny"])

    def shapes(backend):
        model = build_model(architecture, max_sequence_length=16, backend=backend, meta=True)
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    assert shapes(name) == shapes("local")


def test_the_key_is_the_name():
    assert all(row.name == key for key, row in BACKENDS.items())


def test_local_needs_nothing_but_pytorch_and_megatron():
    modules = {
        part.__module__.split(".")[0]
        for field in dataclasses.fields(BACKENDS["local"])
        if callable(part := getattr(BACKENDS["local"], field.name))
    }
    assert modules <= {"composer_megatron", "megatron"}


def test_an_unknown_backend_is_named_with_those_there_are():
    with pytest.raises(UsageError, match=r"unknown backend 'locl': did you mean 'local'\? known: local"):
        get_backend("locl")
