"""Never random weights: every way into a compressed directory loads the right weights or stops with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ernie_elastic.compression import CompressedConfig, TbeConfig, compress_directory
from ernie_elastic.compression.config import register
from ernie_elastic.errors import ConfigError, FormatError
from tests.compression.conftest import Pair
from tests.support import ROOT

Pairs = Callable[[str], Pair]


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that can find the package but has not imported it."""
    modules = str(tmp_path / "modules")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_MODULES_CACHE=modules, OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


UNIMPORTED = """
import sys
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
def attempt(label, load, **kwargs):
    try:
        load({path!r}, **kwargs)
        print(); print(label, 'LOADED')
    except Exception as error:
        print(); print(label, type(error).__name__, ' '.join(str(error).split()))
attempt('direct:', Qwen3MoeForCausalLM.from_pretrained)
attempt('auto:', AutoModelForCausalLM.from_pretrained)
attempt('untrusted:', AutoModelForCausalLM.from_pretrained, trust_remote_code=False)
assert 'ernie_elastic' not in sys.modules
sys.modules['ernie_elastic'] = None  # as if it were not installed
attempt('not installed:', AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
"""
TRUSTED = """
import sys, torch
from transformers import AutoModelForCausalLM
for path, out in {pairs}:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    torch.save(model(torch.arange(3, 14)[None]).logits.detach(), out)
print('LOADED', 'ernie_elastic.compression' in sys.modules)
"""


def test_a_process_that_does_not_import_us_stops_with_the_reason(pairs: Pairs, tmp_path: Path) -> None:
    done = run(UNIMPORTED.format(path=str(pairs("qwen3_moe").compressed)), tmp_path)
    lines = {line.split(": ")[0]: line for line in done.stdout.splitlines() if ": " in line}
    assert done.returncode == 0 and "LOADED" not in done.stdout, done.stdout + done.stderr[-2000:]
    assert "losslessly compressed" in lines["direct"] and "AutoModelForCausalLM" in lines["direct"]
    assert "trust_remote_code=True" in lines["auto"] and "trust_remote_code=True" in lines["untrusted"]
    assert "ImportError" in lines["not installed"] and "ernie_elastic" in lines["not installed"]


def test_trusted_code_imports_us_and_loads_the_right_weights(pairs: Pairs, tmp_path: Path) -> None:
    """tiny_moe: the original config's own auto_map and file are still there and are used."""
    names = ("qwen3_moe", "tiny_moe")
    done = run(TRUSTED.format(pairs=[(str(pairs(name).compressed), name) for name in names]), tmp_path)
    assert done.returncode == 0 and "LOADED True" in done.stdout, done.stderr[-2000:]
    for name in names:
        with torch.no_grad():
            expected = pairs(name).dense()(torch.arange(3, 14)[None]).logits
        assert torch.equal(torch.load(tmp_path / name), expected)


def test_a_class_called_directly_stops_here_too(pairs: Pairs) -> None:
    """Also in a process that has imported us, and also when the caller overrides what the first guard is in."""
    path = pairs("qwen3_moe").compressed
    with pytest.raises(Exception, match="losslessly compressed"):
        Qwen3MoeForCausalLM.from_pretrained(path)
    with pytest.raises(Exception, match="losslessly compressed"):
        Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = Qwen3MoeConfig.from_pretrained(path, dtype="float32")
    with pytest.raises(ValueError, match="quant_method"):
        Qwen3MoeForCausalLM.from_pretrained(path, config=config)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_config_class_of_transformers_stops(pairs: Pairs, tmp_path: Path) -> None:
    code = f"""
import transformers
transformers.logging.set_verbosity_error()
loaded = []
for name in sorted(transformers.CONFIG_MAPPING.keys()):
    try:
        transformers.CONFIG_MAPPING[name].from_pretrained({str(pairs("qwen3_moe").compressed)!r})
        loaded.append(name)
    except Exception:
        pass
print('LOADED', loaded)
"""
    done = run(code, tmp_path)
    assert "LOADED []" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_config_inside_is_given_back(pairs: Pairs) -> None:
    pair = pairs("qwen3_moe")
    config = AutoConfig.from_pretrained(pair.compressed)
    plain = AutoConfig.from_pretrained(pair.source)
    assert type(config) is Qwen3MoeConfig
    assert config.quantization_config == TbeConfig().to_dict()
    ours, theirs = config.to_dict(), plain.to_dict()
    assert {key for key in ours if ours[key] != theirs.get(key)} == {"quantization_config", "_name_or_path"}
    changed, unused = AutoConfig.from_pretrained(
        pair.compressed, output_attentions=True, nothing=3, return_unused_kwargs=True
    )
    assert changed.output_attentions and unused == {"nothing": 3}


def test_kernel_can_be_chosen_by_the_config(pairs: Pairs) -> None:
    config = AutoConfig.from_pretrained(pairs("llama_tied").compressed)
    config.quantization_config["kernel"] = "fused"
    model = AutoModelForCausalLM.from_pretrained(pairs("llama_tied").compressed, config=config)
    assert model.lm_head.packed.kernel == "fused"


def test_unknown_models_inside_are_named(pairs: Pairs, tmp_path: Path) -> None:
    outer = json.loads((pairs("llama").compressed / "config.json").read_text())
    outer["original_config"]["config"]["model_type"] = "never_heard_of"
    with pytest.raises(ConfigError, match="never_heard_of"):
        CompressedConfig.from_dict(outer)
    with pytest.raises(FormatError, match="original_config"):
        CompressedConfig.from_dict({"model_type": "ernie_elastic_compressed"})


def test_settings_are_checked() -> None:
    for wrong in ({"layout": "zip"}, {"kernel": "quick"}):
        with pytest.raises(ConfigError):
            TbeConfig(**wrong)
    with pytest.raises(FormatError, match="version"):
        TbeConfig(format_version=3)
    assert TbeConfig.from_dict(TbeConfig(kernel="fused").to_dict()).kernel == "fused"
    register()  # a second time: nothing happens


def test_loading_a_directory_without_streams_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    compress_directory(pair.source, tmp_path / "out")
    for path in pair.source.glob("*.safetensors"):
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(Exception, match="holds no stream"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
