"""Lets transformers 4 read a folder that transformers 5 wrote.

transformers 5 renamed entries of the JSON files. Version 4 ignores the new names without a warning
and takes its defaults, so the model would compute something else; vLLM and llama.cpp may read the
old names too. The old entries are added; version 5 reads both.

    config.json            rope_parameters  ->  rope_theta, rope_scaling, partial_rotary_factor, and
                                                the names that GPT-NeoX and Gemma 3 had for them
    tokenizer_config.json  the class TokenizersBackend     ->  PreTrainedTokenizerFast
                           extra_special_tokens as a list  ->  additional_special_tokens
"""

import json
from pathlib import Path

from checkpoints import io


def add_older_names(folder: Path) -> None:
    """Adds the entries that transformers 4 reads to the JSON files of a saved model."""
    for name, add in {
        "config.json": _add_rope,
        "tokenizer_config.json": _rename_tokenizer,
    }.items():
        entries = io.read_json(folder / name, io.LARGEST_JSON)
        add(entries)
        text = json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        io.write_text(text, folder / name)


def _add_rope(config: dict) -> None:
    """Adds the older entries for rotary embeddings, of models whose layers have two kinds too."""
    rope = config.get("rope_parameters") or {}
    if "sliding_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    rope = dict(rope.get("full_attention", rope))
    if "rope_theta" not in rope:
        return
    is_neox = config["model_type"].startswith("gpt_neox")
    config["rotary_emb_base" if is_neox else "rope_theta"] = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        config["rotary_pct" if is_neox else "partial_rotary_factor"] = partial
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope


def _rename_tokenizer(config: dict) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
