"""python -m memory: what it prints is the prediction, and wrong arguments end in one line."""

import json
from pathlib import Path

import pytest
from test_formula import APART, GROUPED, WIDE, config_of

from helpers.pages import text_of_pages
from memory import __main__ as command
from memory.formula import QLORA, SHAPES, predict, shape_of

NEGATIVE = {
    "num_attention_heads": 2,
    "hidden_size": 4,
    "num_hidden_layers": -1,
    "intermediate_size": 4,
    "vocab_size": 9,
}


def test_only_the_config_of_a_folder_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in (WIDE, GROUPED, APART):
        config_of(shape).save_pretrained(tmp_path)
        assert shape_of(str(tmp_path)) == shape
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]  # as in older files
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = shape_of(str(tmp_path))
    assert (older.heads, older.kv_heads, older.head_dim) == (3, 3, 32)
    assert command.main(["--model", str(tmp_path), "--seq", "64", "--r", "4"]) == 0
    assert "sequences of 64 that fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "indices"),
        ("{}", "no 'num_attention_heads'"),
        (json.dumps(NEGATIVE), "whole numbers above 0"),
    ],
)
def test_what_is_not_the_config_of_a_llama_is_refused_in_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        shape_of(str(tmp_path))
    assert command.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("memory: ") and str(tmp_path) in error and error.count("\n") == 1


def test_every_component_is_printed_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "llama-7b"]) == 0
    text = capsys.readouterr().out
    predicted = predict(SHAPES["llama-7b"], QLORA, 1, 512)
    for peak in (predicted.peak(), predicted.peak(paged=True)):
        assert f"{peak / 1e9:.3f}" in text
    for name, nbytes in predicted.components.items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{nbytes / 1e9:.3f}"


def test_a_size_below_1_is_refused() -> None:
    with pytest.raises(SystemExit):
        command.main(["--batch", "0"])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("size", [4, 24, 48])
def test_the_largest_batch_fits_and_the_next_one_does_not(size: int, paged: bool) -> None:
    shape = SHAPES["llama-7b"]
    room = size * 2**30
    count = command.largest_batch(shape, QLORA, 512, 64, room, paged)
    at_most = predict(shape, QLORA, max(count, 1), 512, 64).peak(paged)
    one_more = predict(shape, QLORA, count + 1, 512, 64).peak(paged)
    assert (at_most <= room) == (count > 0) and one_more > room


def test_the_pages_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-65b", "--seq", "512", "--batch", "1", "--r", "64"]
    assert command.main(flags) == 0
    assert capsys.readouterr().out in text_of_pages()
