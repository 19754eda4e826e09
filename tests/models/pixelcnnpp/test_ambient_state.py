"""What a caller has set in PyTorch, for other code, changes no result, and is as it was after every call."""

from contextlib import contextmanager

import pytest
import torch

from art_pixeldefend.models.pixelcnnpp.decoders import certify, greedy_decode, sample


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
}
METHODS = {
    f"greedy_decode, {engine}": lambda model, x, engine=engine: greedy_decode(model, x, 16, engine)
    for engine in ("reference", "fixed-point", "cached", "compiled")
} | {
    "log_prob": lambda model, x: model.log_prob(x),
    "bits_per_dim": lambda model, x: model.bits_per_dim(x),
    "conditional_log_probs": lambda model, x: model.conditional_log_probs(x),
    "certify": lambda model, x: torch.stack([part.double() for part in certify(model, x, x, 16)]),
    "sample": lambda model, x: sample(model, 2, seed=1),
}


def settings():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_results_depend_on_arguments_only_and_settings_stay(make_model, make_levels, method):
    model, x = make_model((3, 4, 5)), torch.from_numpy(make_levels(2, (3, 4, 5)))
    with torch.no_grad():  # tails, where masses underflow and logarithms decide
        model.network.head.bias[3:12].add_(5.0)
        model.network.head.bias[12:21].add_(-6.0)
    call = METHODS[method]
    expected = call(model, x)
    for name, state in STATES.items():
        with state():
            before, generator = settings(), torch.random.get_rng_state()
            found = call(model, x)
            assert settings() == before, name
            assert torch.equal(torch.random.get_rng_state(), generator), name
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
