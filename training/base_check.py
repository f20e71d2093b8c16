"""Checks the frozen base against the flags and the data, before a weight is read.

A base that is in 4 bits already cannot be quantized in another way. A flag that asks for one is an
error; a flag that is not given takes the value of the base, so report and state say what was used.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import transformers
from torch import Tensor

from checkpoints import bnb_4bit, headers, io
from checkpoints.quantization import DENSE, Quantization
from data.dataset import Task
from training.options import Options, spelling


def check_base(
    folder: Path,
    start: str,
    args: Options,
    task: Task,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    """Checks a folder with a base, and sets the flags that describe its quantization.

    start: how its adapters are initialized.
    Raises: ValueError where loading or training would, naming the file, the flag or the token.
    """
    model, _, quantization = headers.read(folder, args.dtype)
    if quantization is not None:
        adopt_quantization(args, quantization, folder)
        require_no_dense_weights(args, start, folder)
    if args.save_4bit:
        require_4bit_format(args)
    rows = model.get_input_embeddings().num_embeddings
    require_known_ids(ids_of(task), rows, tokenizer, folder)


def adopt_quantization(args: Options, quantization: Quantization, where: Path) -> None:
    """Sets --quant, --block-size and --no-double-quant to what a base is.

    where: what says so. Raises: ValueError if a flag that was given disagrees.
    """
    values: dict[str, object] = {"quant": quantization.code}
    if quantization.code != DENSE:
        values["block_size"] = quantization.block_size
        values["no_double_quant"] = not quantization.double_quant
    defaults = {each.name: each.default for each in fields(Options)}
    for name, value in values.items():
        asked = getattr(args, name)
        was_given = name in args.given or asked != defaults[name]
        if was_given and asked != value:
            words = spelling(name) if asked is True else f"{spelling(name)} {asked}"
            raise ValueError(
                f"{words} disagrees with {where}, whose base is {quantization}: "
                "leave it out, or give another --model"
            )
        setattr(args, name, value)


def require_no_dense_weights(args: Options, start: str, folder: Path) -> None:
    """Raises: ValueError if a flag needs the dense weights of a base that is in 4 bits."""
    resumed = folder == args.save_4bit  # --compare still reads the dense --model
    needs = {
        "--compare": args.compare and not resumed,
        f"--lora-start {start}": start != "default",
    }
    for flag, is_given in needs.items():
        if is_given:
            raise ValueError(
                f"{flag} needs dense weights, and {folder} is in 4 bits already: "
                "leave it out, or give the folder of the dense model"
            )


def require_4bit_format(args: Options) -> None:
    """Raises: ValueError if --save-4bit has no format for the base, or no place."""
    if args.quant not in bnb_4bit.CODES or args.block_size not in bnb_4bit.BLOCK_SIZES:
        sizes = ", ".join(map(str, bnb_4bit.BLOCK_SIZES))
        raise ValueError(
            f"--save-4bit cannot save --quant {args.quant} in blocks of {args.block_size}: the "
            f"format of bitsandbytes has {' and '.join(bnb_4bit.CODES)} in blocks of {sizes}"
        )
    require_no_dense_model(args.save_4bit)


def require_no_dense_model(folder: Path) -> None:
    """Raises: ValueError if a folder to save a 4-bit model in holds a dense one."""
    config = folder / "config.json"
    if config.is_file() and "quantization_config" not in io.read_json(config):
        raise ValueError(f"{folder} holds a model that is not in 4 bits: choose another folder")


def ids_of(task: Task) -> Iterable[list[int]]:
    """The token ids of each sequence."""
    return (example.ids for example in [*task.train, *task.test, *task.unseen])


def require_known_ids(
    sequences: Iterable[list[int]],
    rows: int,
    tokenizer: transformers.PreTrainedTokenizerBase,
    where: object,
) -> None:
    """Raises: ValueError naming a token, of the data or the end token, without an embedding."""
    largest = max(max(ids, default=0) for ids in [[tokenizer.eos_token_id], *sequences])
    if largest >= rows:
        raise ValueError(
            f"{where}: its tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the id "
            f"{largest}, and the embedding has {rows} rows: take the tokenizer of this model, or "
            "remove the token from its files"
        )


def quantization_of(args: Options) -> dict[str, int | bool | Tensor | None]:
    """The flags as FrozenWeight takes them."""
    return Quantization(args.quant, args.block_size, not args.no_double_quant).settings()
