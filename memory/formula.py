"""The ledger before the run: what fine-tuning will weigh, byte by byte, from the shape of the model alone.

A decoder layer of Llama has seven linear maps: q (q, d), k, v (kv, d), o (d, q), gate, up (f, d), down (d, f). With L layers,
rank r, vocabulary V, and 16 bits a number where nothing else is said:

    base          the seven maps; in NF4, 1/2 byte a weight, 1/64 + 4/(64 * 256) for its constants, and 4 a map for their mean
    the rest      embedding and head V d each (one tensor, if tied); 2 L + 1 norms of d
    adapters      r (in + out) a map, float32; as much again for gradients, twice that for AdamW's moments
    loss          logits and their gradient, V each a label; a few rows of them in float32 (evaluate.py)
    buffer        one dense map, the largest: what a GPU dequantizes into, again and again

Activations, in bytes a token and layer, as autograd keeps them for backward:

    8 d + 8            the inputs of both norms in float32, and 1 / rms
    4 d + 2 q + 2 f    x of q, k, v, of gate, up, of o (which is the result of attention), of down: the adapters need them
    2 q + 4 kv         q and k after rotation, v
    4 heads            the logarithm of attention's normalizer; its weights are never written out
    6 f                gate, silu(gate), up
    14 r               x A^T of the seven; in full fine-tuning 4 d instead, x of the norms' weights
    5 d + q + f        with dropout before the adapters, a byte for each number of the seven x

In float32 each 2 is a 4, but for what is float32 anyhow. Where attention has a mask (padding, packed documents), k and v are
there for every head, 4 q instead of 4 kv, and the mask, 2 T for a token in T. Without checkpointing the first norm keeps
nothing: before it is only the frozen embedding. Checkpointing keeps a layer's input instead, 2 d, and makes the others anew
when backward comes to the layer. There the most is alive at the product silu(gate) * up: its two gradients, 4 f, and the
gradient that came in, 2 d. Without it more may be alive in the backward pass of the last norm, which makes five float32
tensors, 20 d. In full fine-tuning so does that of the first norm, when all gradients are there.

Activations leave as gradients come, so the peak is not the sum of all maxima but the largest of a few instants. Not counted:
biases, and what lies outside of torch's tensors, such as CUDA's context.

Beside figure 6 of the paper (batch 1, length 512, r 64; powers of two). Agreed: 65B takes 780 GB in full fine-tuning, 12
bytes a parameter, and no activations. Its QLoRA totals (6.9, 11.3, 24.7, 45.0 GB) are 0.5 to 0.8 GB above ours, about a CUDA
context; but in other parts. Its adapters have 2 bytes for each of 18 r d numbers a layer, as if the MLP were two maps of
d x 4 d; Llama's three make it 19.06 r d, and ours are float32. Its moments, 8 * 18 r d, differ by that alone. Its "model" is
13 % (65B) to 37 % (7B) above 4.127 bits a weight and a 16-bit embedding and head, which nothing that we know of explains.
"""

import json
from pathlib import Path
from typing import NamedTuple

FULL, LORA, QLORA = METHODS = "full fine-tuning", "16-bit LoRA", "QLoRA"
ROWS = 16  # of logits are in float32 at once, and their exponentials (evaluate.CrossEntropy)


class Shape(NamedTuple):
    """What a Llama's memory depends on."""

    layers: int
    hidden: int  # d
    intermediate: int  # f
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # the head is the embedding

    def maps(self) -> list[tuple[int, int]]:
        """(out, in) of the seven linear maps of a layer."""
        d, f, q, kv = (
            self.hidden,
            self.intermediate,
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
        )
        return [(q, d), (kv, d), (kv, d), (d, q), (f, d), (f, d), (d, f)]


def llama(layers: int, hidden: int, intermediate: int, heads: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, heads, hidden // heads, 32000)


SHAPES = {
    "llama-7b": llama(32, 4096, 11008, 32),
    "llama-13b": llama(40, 5120, 13824, 40),
    "llama-33b": llama(60, 6656, 17920, 52),
    "llama-65b": llama(80, 8192, 22016, 64),
}


def shape_of(model: str) -> Shape:
    """The shape of one of SHAPES, or of a Hugging Face folder: its config.json is read, and nothing in it is run.

    Raises: ValueError if it is neither, or the config has not the keys of a Llama.
    """
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model) / "config.json"
    try:
        return shape_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # what is not UTF-8 or not JSON is one, too
        raise ValueError(
            f"{path}: {error}; give the folder of a Llama, or one of {', '.join(SHAPES)}"
        ) from None


def shape_from(config: dict) -> Shape:
    """The shape in a Llama's config. Raises: ValueError if it is none."""
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        shape = Shape(
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"not the config of a Llama ({f'no {error}' if isinstance(error, KeyError) else error})"
        ) from None
    if not all(type(size) is int and size > 0 for size in shape[:-1]):
        raise ValueError(f"sizes must be whole numbers above 0, got {shape}")
    return shape


class Instant(NamedTuple):
    """What comes and goes, in bytes, at one instant of a step."""

    activations: int
    loss: int
    gradients: int


class Prediction(NamedTuple):
    """Bytes: each component when it is largest, and what comes and goes at the instants that may be the peak."""

    components: dict[str, int]
    instants: dict[str, Instant]

    def peak(self, paged: bool = False) -> int:
        """The most that is alive at once; with `paged`, AdamW's moments have left the device."""
        leaving = {"activations", "loss", "gradients", *(["AdamW moments"] if paged else [])}
        lasting = sum(nbytes for name, nbytes in self.components.items() if name not in leaving)
        return lasting + max(map(sum, self.instants.values()))


def predict(
    shape: Shape,
    method: str,
    batch: int,
    length: int,
    r: int = 64,
    checkpointing: bool = True,
    accumulating: bool = False,
    labels: int | None = None,
    masked: bool = False,
    packed: bool = False,
    dropout: bool = False,
    block_size: int = 64,
    double_quant: bool = True,
    width: int = 2,
) -> Prediction:
    """What a step of batch * length tokens takes, once AdamW has its moments.

    `accumulating`: the step has passes before this one, whose gradients are there already. `labels`: None for all tokens but
    a sequence's first. `masked`: attention has a mask, for padding or packed documents. `dropout`: before the adapters.
    `width`: bytes of a number where 16 bits were said; 4 for float32, and not in full fine-tuning.
    """
    weights, coded = [out * into for out, into in shape.maps()], method == QLORA
    labels = batch * (length - 1) if labels is None else labels
    constants = sum(_constants(n, block_size, double_quant) for n in weights) if coded else 0
    components = {
        "base": shape.layers * sum((n + 1) // 2 if coded else width * n for n in weights),
        "constants": shape.layers * constants,
        "embedding, head": width * shape.vocabulary * shape.hidden * (1 if shape.tied else 2),
        "norms": width * shape.hidden * (2 * shape.layers + 1),
        "adapters": 0 if method == FULL else shape.layers * 4 * r * sum(map(sum, shape.maps())),
        "buffer": width * max(weights) if coded else 0,
    }
    trained = sum(components.values()) if method == FULL else components["adapters"]
    kept = batch * length * _kept(shape, 0 if method == FULL else r, masked, dropout, width)
    kept += masked * width * batch * length**2
    rotary = 2 * width * length * shape.head_dim * (batch if packed else 1)  # cos and sin
    common = (
        rotary + masked * checkpointing * batch * length**2
    )  # and the mask, a byte each, for the layers to come
    instants = _instants(
        shape,
        method,
        batch,
        length,
        r,
        checkpointing,
        trained,
        labels,
        kept,
        common,
        dropout,
        width,
    )
    if accumulating:
        instants = {name: instant._replace(gradients=trained) for name, instant in instants.items()}
    components |= {
        "gradients": trained,
        "AdamW moments": (4 if method == FULL else 2) * trained,  # float32, of 16 bits or 32
        "activations": max(instant.activations for instant in instants.values()),
        "loss": instants["the loss"].loss,
    }
    return Prediction(components, instants)


def _constants(n: int, block_size: int, double_quant: bool) -> int:
    """Bytes of the quantization constants of n weights."""
    blocks = -(-n // block_size)
    return blocks + 4 * -(-blocks // 256) + 4 if double_quant else 4 * blocks


def _instants(
    shape: Shape,
    method: str,
    batch: int,
    length: int,
    r: int,
    checkpointing: bool,
    trained: int,
    labels: int,
    layer: int,
    common: int,
    dropout: bool,
    width: int,
) -> dict[str, Instant]:
    """What comes and goes in a step, when there is most of it.

    Bytes: trained, of all gradients; layer, of what a layer keeps; common, of what all layers share.
    """
    d, f, layers, tokens = shape.hidden, shape.intermediate, shape.layers, batch * length
    full, norm = method == FULL, (4 * d + 4) * tokens
    kept = width * d * tokens if checkpointing else layer
    first_norm = (
        0 if full or checkpointing else norm
    )  # whose input, the frozen embedding, wants no gradient: it keeps nothing
    all_layers = common + layers * kept - first_norm
    last = (
        all_layers + norm + (2 * d * (tokens + labels) if full else 0)
    )  # x of the last norm's weight, and x of the head's
    product, draw = (
        width * (2 * f + d),
        4 * f + 2 * width * d,
    )  # backward of silu(gate) * up; random numbers, as down is redone
    layer -= (
        4 * d * tokens if width == 4 else 0
    )  # its first norm's input is its own, and is kept already
    inside = layer * checkpointing + max(product, draw * dropout * checkpointing) * tokens

    outer = (
        2 * d * (shape.vocabulary + 1) if full else 0
    )  # gradients that are there before any layer's: the head's, a norm's,
    first = 2 * d * f if full else 4 * r * (d + f)  # the first of a layer: that of down,
    each = (
        (2 * sum(out * into for out, into in shape.maps()) + 4 * d) if full else trained // layers
    )  # and all of a layer
    logits, rows = width * shape.vocabulary * labels, 4 * shape.vocabulary * min(ROWS, labels)
    return {
        "the loss": Instant(last, 2 * logits + 2 * rows, 0),
        "the last norm's backward": Instant(last + 20 * d * tokens, 0, outer),
        "the last layer's backward": Instant(all_layers + inside, 0, outer + first),
        "the first layer's backward": Instant(
            common + kept + inside - first_norm, 0, outer + (layers - 1) * each + first
        ),
        "the end of backward": Instant(
            24 * d * tokens if full else 0, 0, trained
        ),  # the first norm's
    }


def _kept(shape: Shape, r: int, masked: bool = False, dropout: bool = False, width: int = 2) -> int:
    """What a layer keeps for backward, in bytes a token: the table above."""
    d, f, q, kv = (
        shape.hidden,
        shape.intermediate,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    attention = (
        width * (q + 2 * (q if masked and shape.kv_heads > 1 else kv)) + 4 * shape.heads
    )  # of one, none is a copy
    adapters = width * 7 * r + dropout * (5 * d + q + f)
    return (
        8 * d + 8 + width * (2 * d + q + f) + attention + width * 3 * f + (adapters if r else 4 * d)
    )
