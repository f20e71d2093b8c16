"""The ledger against sums done by hand."""

import torch
from torch import nn

from helpers import models
from lora import attach
from memory import measured as memory


def test_the_ledger_counts_each_number_once_and_each_byte_that_is_there() -> None:
    model = models.tiny_llama(torch.bfloat16, vocab_size=1024)
    elements = sum(
        parameter.numel() for parameter in model.parameters()
    )  # the tied head is the embedding
    rows = memory.ledger(attach(model, r=4))
    adapters = sum(
        4 * (layer.in_features + layer.out_features)
        for layer in model.modules()
        if hasattr(layer, "lora_A")
    )
    assert rows["adapters"] == (adapters, 2 * adapters, 4 * adapters)
    assert rows["embedding, head"] == (1024 * 64, 2 * 1024 * 64, 2 * 1024 * 64)
    assert rows["norms, biases"] == (5 * 64, 2 * 5 * 64, 2 * 5 * 64)
    assert sum(row.elements for row in rows.values()) == elements + adapters
    buffers = [
        buffer
        for name, buffer in model.named_buffers()
        if not name.endswith(("codebook", "inv_freq"))
    ]
    assert sum(row.bytes_now for row in rows.values()) == sum(
        tensor.nbytes for tensor in [*model.parameters(), *buffers]
    )


def test_bits_a_weight_are_those_of_the_paper() -> None:
    layer = nn.Sequential(nn.Linear(16384, 4, bias=False))
    summary = memory.summary(attach(layer, r=1))
    weights = 4 * 16384
    assert summary["bits_per_weight"] == 4 + 8 / 64 + 32 / (64 * 256) + 32 / weights  # and one mean
    assert summary["trainable_parameters"] == 4 + 16384
    assert summary["total_parameters"] == weights + 4 + 16384
    assert summary["base_bytes_16bit"] == 2 * weights


def test_what_lives_is_counted_once_while_it_does() -> None:
    kept, mapped = torch.zeros(100), torch.zeros(1000)
    with memory.Live(kept, kept[:10], outside=[mapped]) as live:
        assert live.now() == live.peak == 400
        other = kept + 1
        view = other.view(10, 10)
        mapped.copy_(mapped)
        assert live.now() == 800
        del other
        assert live.now() == 800, "its view still holds the bytes"
        del view
        assert live.now() == 400
        for _ in range(3):
            torch.zeros(50)  # each may have the address of the one before
    assert live.now() == 400 and live.peak == 800


def test_resident_memory_grows_by_what_is_touched() -> None:
    before = memory.rss_bytes()
    block = torch.ones(2**25)
    assert memory.rss_bytes() - before > block.nbytes // 2
    assert memory.peak_rss_bytes() >= memory.rss_bytes() - block.nbytes
