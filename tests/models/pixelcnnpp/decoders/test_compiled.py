"""The engine compiled by Numba: bits, threads, programs, and what it does where Numba cannot do all it should."""

import ast
import gc
import os
import platform
import runpy
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import art_pixeldefend
from art_pixeldefend.models.pixelcnnpp import PixelCNNpp, compilation, mixture
from art_pixeldefend.models.pixelcnnpp.decoders import certify, choose_engine, greedy_decode
from art_pixeldefend.models.pixelcnnpp.decoders.compiled import choice, engine, interpreter

PACKAGE = Path(art_pixeldefend.__file__).parent


def run(code, folder, *arguments, **environment):
    """Standard error of a Python process that works in a folder."""
    command = [sys.executable, "-c", code, str(folder), *arguments]
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent)} | environment
    process = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stderr


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_an_image_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(data):
    size = st.integers(1, 11)
    shape = data.draw(st.tuples(st.integers(1, 3), size, size), "shape")
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    filters, resnets = data.draw(st.integers(1, 72), "filters"), data.draw(st.integers(1, 2), "resnets")
    model = PixelCNNpp(shape, filters, resnets, 3).eval()
    x = torch.randint(0, 256, (data.draw(st.integers(1, 20), "batch"), *shape), dtype=torch.uint8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(data.draw(st.integers(1, 5), "threads"))
        together = greedy_decode(model, x, 60, "compiled")
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([greedy_decode(model, image[None], 60, "compiled") for image in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("filters, resnets, mixtures", [(16, 1, 10), (17, 3, 1), (40, 1, 5), (72, 1, 2)])
def test_any_width_and_depth_is_taken(make_model, make_levels, filters, resnets, mixtures):
    model = make_model((1, 6, 6), filters=filters, resnets=resnets, mixtures=mixtures)
    x = torch.from_numpy(make_levels(6, model.image_shape))
    assert certify(model, x, greedy_decode(model, x, 20, "compiled"), 20).exact.all()


@settings(max_examples=40, deadline=None)
@given(
    channels=st.integers(1, 3), mixtures=st.integers(1, 20), seed=st.integers(0, 999),
    beyond=st.sampled_from([0.0, 1e30, np.inf, np.nan]),
)  # fmt: skip
def test_the_numbers_beyond_a_mixture_s_components_do_not_matter(channels, mixtures, seed, beyond):
    """Components are computed in whole vectors, which reach beyond the parameters of a pixel."""
    rng = np.random.default_rng(seed)
    count = mixture.parameters_per_pixel(channels, mixtures)
    params = np.full(count + choice.PADDING, beyond, np.float32)
    params[:count] = rng.normal(0, 2, count)
    pixel = rng.integers(0, 256, channels).astype(float)
    low, high = sorted(rng.integers(0, 256, 2))
    table, masses = choice.make_table(mixtures), np.empty(256)
    for channel in range(channels):
        parts = mixture.components(
            torch.from_numpy(params[:count].astype(float))[None], torch.from_numpy(pixel)[None], channel
        )
        choice.components(params, pixel, channel, channels, mixtures, table)
        np.testing.assert_allclose(table[choice.WEIGHT, :mixtures], parts.log_weights[0].exp(), rtol=1e-12)
        np.testing.assert_allclose(table[choice.MEAN, :mixtures], parts.means[0], rtol=1e-12)
        best = choice.best_level(table, mixtures, low, high, masses)
        assert best == mixture.best_level(parts, torch.tensor([low]), torch.tensor([high])).item()


def program_of(model):
    """The program that is kept after decoding with a model."""
    greedy_decode(model, np.zeros((1, *model.image_shape)), 16, "compiled")
    return engine._programs[model][1]


def test_programs_of_several_models_are_kept_and_freed_with_the_models(make_model):
    models = [make_model((1, 5, 5), seed) for seed in range(3)]
    programs = [program_of(model) for model in models]
    assert [program_of(model) for model in models] == programs
    models[0].network.head.bias.data.add_(0.5)
    assert program_of(models[0]) is not programs[0]
    assert [program_of(model) for model in models[1:]] == programs[1:]
    freed = weakref.ref(programs.pop())
    del models
    gc.collect()
    assert freed() is None


def test_a_change_of_any_parameter_is_seen(make_model):
    model = make_model((1, 2, 2))
    program = program_of(model)
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1.0  # which no version counter counts
        changed = program_of(model)
        assert changed is not program
        program = changed
    assert program_of(model) is program


def test_weights_that_are_mended_are_seen_after_an_error(make_model, make_levels):
    model, x = make_model((1, 5, 5)), make_levels(2, (1, 5, 5))
    expected = greedy_decode(model, x, 16, "compiled")
    bias = model.network.head.bias.data.clone()
    model.network.head.bias.data.fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(ValueError, match="finite"):
            greedy_decode(model, x, 16, "compiled")
    model.network.head.bias.data.copy_(bias)
    np.testing.assert_array_equal(greedy_decode(model, x, 16, "compiled"), expected)


def modules_compiled_in(function, found):
    """Add the files of the package that the code and the constants of a compiled function come from."""
    module = sys.modules[function.__module__]
    if not module.__name__.startswith("art_pixeldefend") or (function.__code__, module) in found:
        return
    found[function.__code__, module] = {module.__file__}
    imported = {
        name.name: node.module
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("art_pixeldefend")
        for name in node.names
    }
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            if name in imported:
                found[function.__code__, module].add(sys.modules[imported[name]].__file__)
            value = function.__globals__.get(name)
            value = getattr(value, "py_func", getattr(value, "_defn", value))  # of a dispatcher, of an intrinsic
            if isinstance(value, types.FunctionType):
                modules_compiled_in(value, found)


def test_the_cache_key_covers_every_file_whose_code_or_constants_are_compiled_in():
    found = {}
    for function in (interpreter.product, interpreter.decode_group):
        modules_compiled_in(function.py_func, found)
    assert len(found) > 15
    assert set.union(*found.values()) == set(interpreter.SOURCES)


def test_the_checksum_changes_with_any_file(tmp_path):
    paths = [shutil.copy(path, tmp_path / f"{i}.py") for i, path in enumerate(interpreter.SOURCES)]
    before = interpreter.checksum(paths)
    assert before == interpreter.checksum(interpreter.SOURCES)
    for path in paths:
        Path(path).write_text(Path(path).read_text().replace("1", "2", 1))
        after = interpreter.checksum(paths)
        assert after != before
        before = after


PURIFY = """
import sys, numpy as np
from art_pixeldefend import PixelCNNpp, PixelDefend
from art_pixeldefend.models.pixelcnnpp.decoders import choose_engine
folder = sys.argv[1]
model = PixelCNNpp.load(folder + "/model.safetensors")
assert choose_engine(model, "auto") == sys.argv[2]
defence = PixelDefend((0, 255), 60, model, verbose=True, device_type="cpu")
np.save(folder + "/purified.npy", defence(np.load(folder + "/x.npy"))[0])
"""


@pytest.fixture
def folder(make_model, make_levels, tmp_path):
    """A model, levels, and what the reference makes of them."""
    model, x = make_model((3, 5, 6)), make_levels(3, (3, 5, 6))
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "expected.npy", greedy_decode(model, x, 60, "reference"))
    return tmp_path


def assert_purified(folder):
    np.testing.assert_array_equal(np.load(folder / "purified.npy"), np.load(folder / "expected.npy"))


def test_without_wide_vectors_the_image_is_the_same_and_compilation_is_announced_once(folder):
    """A process that compiles for a processor with AVX2 (or, elsewhere, without vectors) and no AVX-512."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    environment = {
        "NUMBA_CPU_NAME": "haswell" if x86 else "generic",
        "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma" if x86 else "",
        "NUMBA_CACHE_DIR": str(folder),
    }
    lanes = "\nfrom art_pixeldefend.models.pixelcnnpp.decoders.compiled.gemm import LANES\nassert LANES == 8"
    for announced in (1, 0):  # the second process finds the code in the cache
        printed = run(PURIFY + lanes, folder, "compiled", **environment)
        assert printed.count("compiling") == announced
        assert printed.find("compiling") < printed.find("purify:")  # it does not count in the progress bar
        assert_purified(folder)
        (folder / "purified.npy").unlink()


def test_compiled_code_is_cached_for_the_user_and_not_beside_the_source(tmp_path, monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "module.py"
    source.write_text("def double(x):\n    return 2 * x\n")
    function = runpy.run_path(str(source))["double"]
    assert compilation.jit()(function)(3) == 6
    assert numba.config.CACHE_DIR == "" and [path.name for path in source.parent.iterdir()] == ["module.py"]
    if sys.platform == "linux":
        assert list((tmp_path / "cache" / "art-pixeldefend" / "numba").rglob("*.nbi"))


def test_without_a_writable_folder_for_the_cache_it_compiles_and_warns_once(folder):
    """Files where the folders would be made, in the package and for the user."""
    copy = folder / "packages" / "art_pixeldefend"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "weights", "*.csv"))
    for path in (path for path in copy.rglob("*") if path.is_dir()):
        (path / "__pycache__").touch()
    fused = """
import torch
from art_pixeldefend.models.pixelcnnpp.passes import fused
x = torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
fused.concat_elu(x)
"""
    environment = {"PYTHONPATH": str(copy.parent), "HOME": str(folder / "missing"), "XDG_CACHE_HOME": os.devnull}
    environment |= {"USERPROFILE": os.devnull, "NUMBA_CACHE_DIR": ""}
    assert run(PURIFY + fused, folder, "compiled", **environment).count("NUMBA_CACHE_DIR") == 1
    assert_purified(folder)


def test_with_numba_disabled_other_code_takes_over(folder):
    step = "\nmodel.train().sub_pixel_log_probs(model.as_levels(np.load(folder + '/x.npy'))).sum().backward()"
    run(PURIFY + step, folder, "cached", NUMBA_DISABLE_JIT="1")
    assert_purified(folder)


def test_without_numba_auto_takes_another_engine(make_model, make_levels, monkeypatch):
    model = make_model((1, 5, 5))
    x = make_levels(3, model.image_shape)
    expected = greedy_decode(model, x, 16, "compiled")
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it raises ImportError
    compilation.has_numba.cache_clear()
    try:
        assert choose_engine(model, "auto") == "cached"
        np.testing.assert_array_equal(greedy_decode(model, x, 16), expected)
        with pytest.raises(ValueError, match="Numba"):
            greedy_decode(model, x, 16, "compiled")
    finally:
        compilation.has_numba.cache_clear()


def test_a_batch_is_decoded_once_also_when_weights_have_changed(make_model, make_levels, monkeypatch):
    model, x, executed = make_model((1, 5, 5)), torch.from_numpy(make_levels(3, (1, 5, 5))), []
    execute = engine._execute
    monkeypatch.setattr(engine, "_execute", lambda *args: executed.append(1) or execute(*args))
    for _ in range(2):
        greedy_decode(model, x, 9, "compiled")
        model.network.head.bias.data.add_(0.5)
    assert len(executed) == 2
