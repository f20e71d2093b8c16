"""The table of precisions, each entry of which is seen to be so in a real step, by other means than its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from test_base_model import SMALL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

from data import dataset as data
from helpers.strategies import same_bits
from lora import QLoRALinear, attach
from memory import formula as predict
from paged_optim import PagedAdamW
from training import dtypes as precision
from training import loss_and_eval as evaluate

CONFIGS = [LlamaConfig(**SMALL, tie_word_embeddings=True), PhiConfig(**SMALL)]
DTYPES = [torch.float32, torch.bfloat16]


def model_of(config: LlamaConfig | PhiConfig, dtype: torch.dtype, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return attach(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), r=4, **settings)


def rows_of(model: nn.Module, dtype: torch.dtype) -> dict[str, precision.Row]:
    return {row.what: row for row in precision.rows(model, dtype)}


class Results(TorchDispatchMode):
    """All that operations give: their name, dtype and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, Tensor):
                self.seen.append((func.overloadpacket.__name__, tensor.dtype, tensor.numel()))
        return result


@contextmanager
def recorded_norms() -> Iterator[list[torch.dtype]]:
    """The dtypes that norms work in: of the root of Llama's, of what torch's LayerNorm is given under autocast."""
    found, root, layer_norm = [], torch.rsqrt, F.layer_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rsqrt", lambda x: (found.append(x.dtype), root(x))[1])
        patch.setattr(
            F, "layer_norm", lambda x, *rest: (found.append(x.dtype), layer_norm(x, *rest))[1]
        )
        yield found


def words(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_the_table_says_is_what_a_step_does(
    config: LlamaConfig | PhiConfig, dtype: torch.dtype
) -> None:
    model = model_of(config, dtype)
    table, outputs = rows_of(model, dtype), {}
    norms = [
        module
        for module in model.modules()
        if type(module).__name__ in ("LlamaRMSNorm", "LayerNorm")
    ]
    assert len(norms) == (5 if config.model_type == "llama" else 3)
    adapted = [module for module in model.modules() if isinstance(module, QLoRALinear)]
    watched = {
        "head": [model.lm_head],
        "norms": norms,
        "adapters": adapted,
        "embedding": [model.get_input_embeddings()],
    }
    for what, modules in watched.items():
        for module in modules:
            module.register_forward_hook(
                lambda *args, what=what: outputs.setdefault(what, set()).add(args[2].dtype)
            )

    ids = torch.randint(3, 256, (3, 20))
    batch = data.Batch(ids, torch.ones_like(ids), ids)
    with recorded_norms() as inside, Results() as forward:
        loss = evaluate.label_loss(model.train(), batch, dtype)
    with Results() as backward:
        (loss / batch.n_labels).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    assert (
        outputs["adapters"] == outputs["head"] == {dtype}
        and words({dtype}) == table["head"].computed
    )
    assert (
        table["adapters"].computed
        == table["linear layers"].computed
        == table["gradients"].computed
        == words({dtype})
    )
    products = {kind for name, kind, _ in backward.seen if name in ("mm", "matmul", "addmm_")}
    assert products == {dtype}, "gradients are computed in what the products are"
    assert table["norms"].computed == words(set(inside)) + (
        f", then {words(outputs['norms'])}" if dtype not in inside else ""
    )
    assert table["norms"].kept == words({norm.weight.dtype for norm in norms}) == words({dtype})
    assert table["embedding"].computed == words(outputs["embedding"])

    assert (
        table["loss"].kept == words({dtype})
        and table["loss"].computed == words({loss.dtype}) == "float32"
    )
    whole = batch.n_labels * config.vocab_size
    large = [kind for name, kind, numel in forward.seen + backward.seen if numel >= whole]
    assert set(large) == {dtype}, "the logits never are float32 as a whole"
    assert (
        predict.ROWS == evaluate.CrossEntropy.ROWS
        and f"{predict.ROWS} rows at a time" in table["loss"].because
    )
    assert ("never are float32" in table["loss"].because) == (dtype != torch.float32)

    assert (
        table["gradients"].kept
        == words({parameter.grad.dtype for parameter in parameters})
        == "float32"
    )
    paged, resident = PagedAdamW(parameters), torch.optim.AdamW(parameters)
    paged.step(), resident.step()
    moments = {
        tensor.dtype
        for state in resident.state.values()
        for tensor in (state["exp_avg"], state["exp_avg_sq"])
    }
    assert (
        table["optimizer state"].kept
        == table["optimizer state"].computed
        == words(moments)
        == "float32"
    )
    assert {page.dtype for page in paged.pager.cache.values()} == moments


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({}, "16 levels, 8-bit constants (4.135 bits)"),
        ({"double_quant": False}, "16 levels, 32-bit constants (4.500 bits)"),
        ({"codebook": None}, "bfloat16"),
    ],
)
def test_the_base_is_described_by_its_tensors(settings: dict, kept: str) -> None:
    model = model_of(CONFIGS[0], torch.bfloat16, **settings)
    row = rows_of(model, torch.bfloat16)["linear layers"]
    assert row.kept.startswith(kept)
    assert row.because == (
        "as loaded" if "codebook" in settings else "decoded as they are multiplied, and dropped"
    )


def test_the_head_is_said_to_be_the_embedding_only_where_it_is() -> None:
    tied, apart = (
        rows_of(model_of(config, torch.float32), torch.float32)["head"] for config in CONFIGS
    )
    assert (tied.because, apart.because) == ("the embedding, once more", "as loaded")


def test_a_layer_norm_that_autocast_puts_in_float32_is_said_to_be() -> None:
    """As on a GPU, whose list of such operations has it; a processor's has not."""
    model, real = model_of(CONFIGS[1], torch.bfloat16), F.layer_norm

    def layer_norm(x: Tensor, shape: tuple, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return real(x.float(), shape, weight.float(), bias.float(), eps)

    assert rows_of(model, torch.bfloat16)["norms"].computed == "bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "layer_norm", layer_norm)
        assert rows_of(model, torch.bfloat16)["norms"].computed == "float32"


def test_a_model_without_norms_has_none_in_the_table() -> None:
    model = model_of(CONFIGS[0], torch.float32)
    for name in [name for name, _ in model.named_modules() if "norm" in name]:
        model.set_submodule(name, nn.Identity())
    assert rows_of(model, torch.float32)["norms"][1:3] == ("-", "-")


def test_looking_leaves_the_model_and_its_random_numbers_alone() -> None:
    model = model_of(CONFIGS[0], torch.bfloat16, lora_dropout=0.5).train()
    before, generator = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.get_rng_state(),
    )
    text = precision.table(model, torch.bfloat16)
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "precision",
        "linear layers",
        "adapters",
        "embedding",
        "head",
        "norms",
        "loss",
        "gradients",
        "optimizer state",
    ]
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_products_are_in_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "amx_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert precision.pick_dtype("auto", "cpu") is dtype
        assert precision.pick_dtype("float32", "cpu") is torch.float32
        assert precision.pick_dtype("bfloat16", "cpu") is torch.bfloat16
