"""The table of dtypes: every entry is checked against a real step, recorded in another way."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from test_base_model import SMALL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig, PhiConfig

from data import dataset
from helpers.strategies import same_bits
from kernels import dispatch
from lora import QLoRALinear, attach
from memory import formula
from paged_optim import PagedAdamW
from training import dtypes, loss_and_eval
from training.options import Options

CONFIGS = [LlamaConfig(**SMALL, tie_word_embeddings=True), PhiConfig(**SMALL)]
DTYPES = [torch.float32, torch.bfloat16]


def model_of(config: LlamaConfig | PhiConfig, dtype: torch.dtype, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return attach(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), r=4, **settings)


def rows_of(model: nn.Module, dtype: torch.dtype) -> dict[str, dtypes.Row]:
    return {row.what: row for row in dtypes.dtype_rows(model, dtype)}


class Results(TorchDispatchMode):
    """Records the name, dtype and number of elements of the result of every operation."""

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
    """The dtypes that norms compute in: of rsqrt in Llama's, of the input of torch's LayerNorm."""
    found: list[torch.dtype] = []
    real_rsqrt, real_layer_norm = torch.rsqrt, F.layer_norm

    def rsqrt(x: Tensor) -> Tensor:
        found.append(x.dtype)
        return real_rsqrt(x)

    def layer_norm(x: Tensor, *rest: object) -> Tensor:
        found.append(x.dtype)
        return real_layer_norm(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rsqrt", rsqrt)
        patch.setattr(F, "layer_norm", layer_norm)
        yield found


def words(kinds: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in kinds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_what_the_table_says_is_what_a_step_does(
    config: LlamaConfig | PhiConfig, dtype: torch.dtype
) -> None:
    model = model_of(config, dtype)
    table = rows_of(model, dtype)
    norm_types = ("LlamaRMSNorm", "LayerNorm")
    norms = [module for module in model.modules() if type(module).__name__ in norm_types]
    assert len(norms) == (5 if config.model_type == "llama" else 3)
    watched = {
        "head": [model.lm_head],
        "norms": norms,
        "adapters": [module for module in model.modules() if isinstance(module, QLoRALinear)],
        "embedding": [model.get_input_embeddings()],
    }
    outputs: dict[str, set[torch.dtype]] = {kind: set() for kind in watched}
    for kind, modules in watched.items():
        for module in modules:
            module.register_forward_hook(
                lambda *args, kind=kind: outputs[kind].add(args[2].dtype)  # None: changes nothing
            )

    ids = torch.randint(3, 256, (3, 20))  # (B, T)
    batch = dataset.Batch(ids, torch.ones_like(ids), ids)
    with recorded_norms() as inside, Results() as forward:
        loss = loss_and_eval.label_loss(model.train(), batch, dtype)
    with Results() as backward:
        (loss / batch.n_labels).backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    assert outputs["adapters"] == outputs["head"] == {dtype}
    for what in ("head", "adapters", "linear layers", "gradients"):
        assert table[what].computed == words({dtype})
    matmuls = {kind for name, kind, _ in backward.seen if name in ("mm", "matmul", "addmm_")}
    # Thin products are in float32 where the processor has none of 16 bits (kernels/dispatch.py).
    thin = {dtype} if dispatch.multiplies_natively("cpu", dtype) else {torch.float32}
    assert matmuls == {dtype} | thin, "gradients are computed in the dtype of the matmuls"
    then = "" if dtype in inside else f", then {words(outputs['norms'])}"
    assert table["norms"].computed == words(set(inside)) + then
    assert table["norms"].kept == words({norm.weight.dtype for norm in norms}) == words({dtype})
    assert table["embedding"].computed == words(outputs["embedding"])

    assert table["loss"].kept == words({dtype})
    assert table["loss"].computed == words({loss.dtype}) == "float32"
    logits = batch.n_labels * config.vocab_size
    large = [kind for name, kind, numel in forward.seen + backward.seen if numel >= logits]
    assert set(large) == {dtype}, "the logits are never float32 all at once"
    assert formula.ROWS == loss_and_eval.CrossEntropy.ROWS
    assert f"{formula.ROWS} rows at a time" in table["loss"].because
    assert ("the logits stay" in table["loss"].because) == (dtype != torch.float32)

    gradients = {parameter.grad.dtype for parameter in parameters}
    assert table["gradients"].kept == words(gradients) == "float32"
    paged = PagedAdamW(parameters)
    resident = torch.optim.AdamW(parameters)
    paged.step()
    resident.step()
    states = resident.state.values()
    moments = {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")}
    row = table["optimizer state"]
    assert row.kept == row.computed == words(moments) == "float32"
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
    decoded = "decoded for each matmul, then freed"
    assert row.kept.startswith(kept)
    assert row.because == ("as loaded" if "codebook" in settings else decoded)


def test_the_head_is_said_to_be_the_embedding_only_where_it_is() -> None:
    tied, apart = (
        rows_of(model_of(config, torch.float32), torch.float32)["head"] for config in CONFIGS
    )
    assert (tied.because, apart.because) == ("tied to the embedding", "as loaded")


def test_a_layer_norm_that_autocast_puts_in_float32_is_said_to_be() -> None:
    """As on a GPU, where autocast has it in its list of float32 operations; on a CPU it has not."""
    model = model_of(CONFIGS[1], torch.bfloat16)
    real = F.layer_norm

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


def test_a_module_with_vectors_that_returns_a_tuple_is_no_norm() -> None:
    """As the attention of DiffLlama, which has vectors of its own."""
    torch.manual_seed(0)
    config = DiffLlamaConfig(**SMALL)
    model = attach(AutoModelForCausalLM.from_config(config).eval(), r=4)
    row = rows_of(model, torch.float32)["norms"]
    assert row.because == "not cast by us: DiffLlamaRMSNorm and autocast decide"


@pytest.mark.parametrize(
    ("output", "computed"),
    [
        ((torch.ones(2), {"residual": torch.ones(2), "scale": None}), "float32"),
        ([torch.ones(2).bfloat16()], "float32, then bfloat16"),
        (None, "-"),
    ],
)
def test_a_norm_may_return_anything(output: object, computed: str) -> None:
    recorder = dtypes.DtypeRecorder()
    norm = nn.Identity()
    with recorder:
        recorder.enter("norms", norm, ())
        torch.ones(2).mul(2)
        recorder.leave("norms", norm, (), output)
    assert recorder.computed("norms") == computed


def test_a_model_that_the_table_cannot_run_does_not_stop_a_run() -> None:
    model = model_of(CONFIGS[0], torch.float32).train()

    def forward(prompt: str) -> None:
        raise AssertionError

    model.forward = forward
    text = dtypes.dtype_table(model, torch.float32)
    assert text.startswith("precision: no table for LlamaForCausalLM (TypeError: ")
    assert model.training and "\n" not in text


def test_the_table_leaves_the_model_and_the_random_numbers_unchanged() -> None:
    model = model_of(CONFIGS[0], torch.bfloat16, lora_dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    text = dtypes.dtype_table(model, torch.bfloat16)
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


def test_matmuls_are_in_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native = {"avx512_bf16": True}, torch.bfloat16
    emulated = {"avx512_f": True, "amx_bf16": False}, torch.float32
    for features, dtype in (native, emulated):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert dtypes.pick_dtype("auto", "cpu") is dtype
        assert dtypes.pick_dtype("float32", "cpu") is torch.float32
        assert dtypes.pick_dtype("bfloat16", "cpu") is torch.bfloat16


@pytest.mark.parametrize("available", [False, True])
def test_the_device_is_the_gpu_if_there_is_one_unless_given(
    monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    args = Options()
    assert dtypes.resolve_device_and_dtype(args) is args
    assert args.device == ("cuda" if available else "cpu")
    assert args.dtype is dtypes.pick_dtype("auto", args.device)
    given = dtypes.resolve_device_and_dtype(Options(device="cpu", dtype="float32"))
    assert (given.device, given.dtype) == ("cpu", torch.float32)


def test_a_device_that_torch_lacks_is_an_error_of_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        dtypes.resolve_device_and_dtype(Options(device="abacus"))
    error = capsys.readouterr().err
    assert re.fullmatch("train.py: --device abacus cannot be used .*: try cpu\n", error)
