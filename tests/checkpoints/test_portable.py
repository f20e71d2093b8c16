"""A folder that transformers 5 saved keeps its meaning for transformers 4.

`make test` installs transformers 4 in a folder of its own (Makefile).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_base_model import LLAMA_3, SMALL
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
)

from checkpoints import base_model, portable
from helpers import models

PLAIN = {"rope_type": "default", "rope_theta": 777.0}
BY_LAYER = {
    "full_attention": PLAIN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
}
PARTIAL = PLAIN | {"partial_rotary_factor": 0.25}
TWO_KINDS = ["sliding_attention", "full_attention"]
# A config, and the entries that transformers 4 reads.
CONFIGS = {
    "llama": (LlamaConfig(**SMALL, rope_parameters=PLAIN), {"rope_theta": 777.0}),
    "llama 3": (
        LlamaConfig(**SMALL, rope_parameters=LLAMA_3),
        {
            "rope_theta": 1e4,
            "rope_scaling": {key: LLAMA_3[key] for key in LLAMA_3 if key != "rope_theta"},
        },
    ),
    "phi": (
        PhiConfig(**SMALL, rope_parameters=PARTIAL),
        {"rope_theta": 777.0, "partial_rotary_factor": 0.25},
    ),
    "gpt-neox": (
        GPTNeoXConfig(**SMALL, rope_parameters=PARTIAL),
        {"rotary_emb_base": 777.0, "rotary_pct": 0.25},
    ),
    "gemma 3": (
        Gemma3TextConfig(**SMALL, head_dim=16, layer_types=TWO_KINDS, rope_parameters=BY_LAYER),
        {"rope_theta": 777.0, "rope_local_base_freq": 55.0},
    ),
}
IDS = torch.arange(5, 45)[None]
OLDER = Path(sys.prefix) / "transformers-4"


def save(config: PretrainedConfig, folder: Path) -> torch.Tensor:
    """Saves a random model for both versions; returns its logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    base_model.save_dense(model, folder)
    tokenizer = models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<zebra>"]})
    tokenizer.save_pretrained(folder)
    portable.add_older_names(folder)
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_entries_of_older_versions_are_there_and_change_nothing_for_this_one(
    name: str, tmp_path: Path
) -> None:
    config, entries = CONFIGS[name]
    logits = save(config, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert entries.items() <= saved.items()
    assert "rope_scaling" in entries or "rope_scaling" not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS, use_cache=False).logits, logits)


def test_the_tokenizer_has_a_class_and_special_tokens_that_older_versions_know(
    tmp_path: Path,
) -> None:
    save(CONFIGS["llama"][0], tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in saved
    assert saved["additional_special_tokens"][-1] == "<zebra>"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("order<zebra>").input_ids[-1] == 49152
    assert tokenizer.decode([49152], skip_special_tokens=True) == ""


def test_a_model_without_rotary_embeddings_and_a_known_tokenizer_stay_as_they_are(
    tmp_path: Path,
) -> None:
    contents = {"config.json": {"model_type": "opt"}}
    contents["tokenizer_config.json"] = {"tokenizer_class": "GPT2Tokenizer"}
    for name, entries in contents.items():
        (tmp_path / name).write_text(json.dumps(entries))
    portable.add_older_names(tmp_path)
    for name, entries in contents.items():
        assert json.loads((tmp_path / name).read_text()) == entries


READ = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4.")
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(5, 45)[None], use_cache=False).logits
    torch.save(logits, folder + "/logits")
    print(AutoTokenizer.from_pretrained(folder)("order<zebra>").input_ids)
"""


def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in CONFIGS]
    logits = [save(CONFIGS[folder.name][0], folder) for folder in folders]
    command = [sys.executable, "-c", READ, *folders]
    assert OLDER.is_dir(), "make test installs it"
    older = os.environ | {"PYTHONPATH": str(OLDER)}
    run = subprocess.run(command, env=older, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for folder, expected in zip(folders, logits):
        assert torch.equal(torch.load(folder / "logits"), expected), folder.name
    ids = str(models.tokenizer()("order").input_ids[:1] + [49152])
    assert run.stdout.splitlines() == [ids] * len(folders)
