"""The tokens at which generation stops: the model's own, and those that training put at ends.

A model's generation_config.json may name <|endoftext|> alone while its chat template ends answers
with <|im_end|>. A model that learns the answers would stop at neither, and would go on with turns
of its own. So generation_config.json in the adapter's folder, and in that of a merged model, has
all of them:

    {"eos_token_id": [0, 2]}
"""

from __future__ import annotations  # type hints must not load the classes of transformers

from collections.abc import Iterable
from pathlib import Path

import transformers

from checkpoints import io

FILE = "generation_config.json"


def add(model: transformers.PreTrainedModel, ids: Iterable[int]) -> None:
    """Lets generation stop at these tokens, too."""
    own = model.generation_config.eos_token_id
    if own is None:
        own = []
    elif isinstance(own, int):
        own = [own]
    model.generation_config.eos_token_id = sorted({*own, *ids})


def save(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Writes the generation config of a model into the folder of its adapter."""
    io.write_text(model.generation_config.to_json_string(), folder / FILE)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def load(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Lets generation stop at the tokens in the folder of an adapter, if it has the file, too.

    Raises: ValueError if the file names no token ids.
    """
    if not (folder / FILE).is_file():
        return  # other programs save adapters without it
    ids = io.read_json(folder / FILE).get("eos_token_id", [])
    if isinstance(ids, int):
        ids = [ids]
    if not isinstance(ids, list) or not all(map(_is_id, ids)):
        raise ValueError(f"{folder / FILE}: eos_token_id must be token ids, not {str(ids)[:50]}")
    add(model, ids)
