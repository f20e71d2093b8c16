"""Generation stops where training put an end, also in the adapter's folder and after a merge."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

import train
from helpers import models
from training import end_tokens, use_adapter
from training.loss_and_eval import generate_answers
from training.options import Options


def model_with_ends(ends: int | list[int] | None) -> LlamaForCausalLM:
    model = models.tiny_llama()
    model.generation_config.eos_token_id = ends
    return model


@pytest.mark.parametrize(
    "own, expected", [(2, [0, 2]), ([2, 5], [0, 2, 5]), (None, [0]), (0, [0]), ([], [0])]
)
def test_the_models_own_ends_stay(own: int | list[int] | None, expected: list[int]) -> None:
    model = model_with_ends(own)
    end_tokens.add(model, {0})
    assert model.generation_config.eos_token_id == expected


def test_generation_stops_at_an_added_end() -> None:
    model = models.tiny_llama(vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # each token has the same logit, and greedy takes the first
    steps = []

    def count(module: nn.Module, inputs: object, output: object) -> None:
        steps.append(output)

    model.lm_head.register_forward_hook(count)
    for ends, expected in (({7}, 5), ({0}, 1)):
        steps.clear()
        end_tokens.add(model, ends)
        generate_answers(model, models.tokenizer(), [[4, 5]], 5, torch.float32)
        assert len(steps) == expected


def test_the_ends_come_back_from_the_folder_of_an_adapter(tmp_path: Path) -> None:
    end_tokens.save(model_with_ends([0, 2]), tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 2]
    model = model_with_ends(5)
    end_tokens.load(model, tmp_path)
    assert model.generation_config.eos_token_id == [0, 2, 5]


@pytest.mark.parametrize("content, expected", [(None, 5), ({}, [5]), ({"eos_token_id": 2}, [2, 5])])
def test_a_folder_may_name_one_end_or_none(
    tmp_path: Path, content: dict | None, expected: int | list[int]
) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    model = model_with_ends(5)
    end_tokens.load(model, tmp_path)
    assert model.generation_config.eos_token_id == expected


@pytest.mark.parametrize("ids", ["<|im_end|>", [True], [-1], [2**31], [None], {"2": 2}])
def test_a_folder_whose_ends_are_no_ids_is_refused(tmp_path: Path, ids: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id must be token ids"):
        end_tokens.load(model_with_ends(5), tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a model that ends at <|endoftext|>, trained on answers with <|im_end|>."""
    folder = tmp_path_factory.mktemp("ends")
    tokenizer = models.tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "model")
    model = model_with_ends(0)
    model.config.eos_token_id = 0
    model.save_pretrained(folder / "model")
    row = json.dumps({"prompt": "Who?", "completion": "Me."})
    (folder / "rows.jsonl").write_text(f"{row}\n" * 4)
    flags = ["--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    assert train.main([*flags, "--max-steps", "1", "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


def ends_in(folder: Path) -> int | list[int]:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_a_prompt_to_an_adapter_stops_at_the_ends_of_its_data(trained: Path) -> None:
    assert ends_in(trained) == [0, 2]
    model, _ = use_adapter.load_adapted_model(Options(adapter=trained, device="cpu"), None)
    assert model.generation_config.eos_token_id == [0, 2]


@pytest.mark.parametrize("flag", ["--merge", "--merge-4bit"])
def test_a_merged_model_stops_at_the_ends_of_its_data(
    trained: Path, tmp_path: Path, flag: str
) -> None:
    assert train.main(["--adapter", str(trained), flag, str(tmp_path / "merged")]) == 0
    assert ends_in(tmp_path / "merged") == [0, 2]
