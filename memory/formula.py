"""Predicts the memory of a training step, in bytes by component, from the model's shape alone.

A decoder layer of Llama has seven linear maps (out, in): q (q, d), k and v (kv, d), o (d, q),
gate and up (f, d), down (d, f). With L layers, rank r, vocabulary V, and 16 bits per number unless
stated otherwise:

    base          the seven maps; in NF4 1/2 byte per weight
    constants     1/64 + 4/(64 * 256) bytes per weight, and 4 bytes per map for the mean
    embedding     V d, and V d more for the head unless it is tied; norms: 2 L + 1 vectors of d
    adapters      r (in + out) per map, float32; gradients: the same; AdamW's moments: twice that
    loss          logits, V per label, which their gradient overwrites; ROWS rows in float32
    buffer        the largest map, dense: a GPU dequantizes every map into it

Activations, in bytes per token and layer, as autograd saves them for backward; in float32 each
2 becomes 4, except for what is float32 anyway:

    8 d + 8            the inputs of both norms in float32, and 1 / rms
    4 d + 2 q + 2 f    the inputs x of the maps: of q, k, v (shared); gate, up (shared); o; down
    2 q + 4 kv         rotated q and k, and v; with an attention mask (padding, packed documents)
                       2 q + 4 q, since k and v are copied for each head, and 2 T for the mask
    4 heads            the logarithm of attention's normalizer; attention weights are never stored
    6 f                gate, silu(gate), up
    14 r               x A^T of the seven maps; in full fine-tuning 4 d, for the norms' weights
    5 d + q + f        with dropout before the adapters: a mask, one byte per number of each map's x

Checkpointing saves only the input of a layer, 2 d, and recomputes the rest in backward. A layer
peaks in the backward of silu(gate) * up: two gradients, 4 f, and the incoming one, 2 d. Without
checkpointing the first norm saves nothing (its input is the frozen embedding), and the peak may be
in the backward of the last norm: five float32 tensors, 20 d; in full fine-tuning also in the first
norm's. Activations are freed as gradients appear, so the peak is the maximum over a few instants.

Error: 0 for lasting bytes; the tests allow 5 % of a peak. Not counted: biases, the CUDA context.

Differs from figure 6 of the paper (batch 1, length 512, r 64). Full fine-tuning of 65B is
equal: 780 GB, 12 bytes per parameter, without activations. QLoRA's totals (6.9, 11.3, 24.7, 45.0
GB, in powers of two) are 0.5 to 0.8 GB above ours, about a CUDA context, but the parts differ:
2-byte adapters of 18 r d per layer, as if the MLP were two maps of d x 4 d (Llama's three: 19.06
r d; ours are float32), moments of 8 * 18 r d, and a "model" 13 % (65B) to 37 % (7B) above 4.127
bits per weight plus 16-bit embedding and head, which we cannot explain.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL = "full fine-tuning"
LORA = "16-bit LoRA"
QLORA = "QLoRA"
METHODS = (FULL, LORA, QLORA)

ROWS = 16  # of logits that are in float32 at a time (loss_and_eval.CrossEntropy)
OUTSIDE_TORCH = 2**30  # bytes of a card for CUDA's context, libraries, gaps between tensors

KNOWN_MODELS = ("llama", "mistral")  # model_type of models whose layers are the seven maps above
MOST_TENSORS = 100_000  # of a model whose config is read
MOST_BYTES = 2**26  # for what transformers computes while it builds a model without weights
# A config in which one of these is set has no prediction.
NOT_COUNTED = ("attention_bias", "mlp_bias", "quantization_config")


class Shape(NamedTuple):
    """The sizes of a Llama that its memory depends on."""

    layers: int
    hidden: int  # d
    intermediate: int  # f
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # the head is the embedding

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    def parameters(self) -> int:
        """The number of all weights."""
        maps = sum(n_out * n_in for n_out, n_in in self.maps())
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * maps + embeddings + self.hidden * (2 * self.layers + 1)

    def maps(self) -> list[tuple[int, int]]:
        """Returns (out, in) of the seven linear maps of a layer."""
        d = self.hidden
        f = self.intermediate
        return [(self.q, d), (self.kv, d), (self.kv, d), (d, self.q), (f, d), (f, d), (d, f)]


def llama(layers: int, hidden: int, intermediate: int, heads: int) -> Shape:
    """The shape of a first-generation Llama: one kv head per head, a vocabulary of 32000."""
    return Shape(layers, hidden, intermediate, heads, heads, hidden // heads, 32000)


SHAPES = {
    "llama-7b": llama(32, 4096, 11008, 32),
    "llama-13b": llama(40, 5120, 13824, 40),
    "llama-33b": llama(60, 6656, 17920, 52),
    "llama-65b": llama(80, 8192, 22016, 64),
}


def shape_of(model: str) -> Shape:
    """The shape of one of SHAPES, or of a Hugging Face folder; only its config.json is read.

    Raises: ValueError if `model` is neither, or a model that the formula does not cover. The number
    of parameters, which transformers counts, decides: biases and experts are not in the formula.
    """
    if model in SHAPES:
        return SHAPES[model]
    from checkpoints import skeleton  # slow, and only a folder needs it

    try:
        empty = skeleton.from_config(Path(model), MOST_TENSORS, MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}; give a folder, or one of {', '.join(SHAPES)}") from None
    count = sum(parameter.numel() for parameter in empty.parameters())
    config = empty.config
    if config.model_type in KNOWN_MODELS:
        shape = shape_from(config.to_dict())
        if shape.parameters() == count:
            return shape
    known = " and ".join(KNOWN_MODELS)
    raise ValueError(
        f"{Path(model) / 'config.json'} describes a {type(empty).__name__} of {count:,} "
        f"parameters, and the formula covers {known}, without biases: its memory is not predicted"
    )


def shape_from(config: dict) -> Shape:
    """The shape in the config of a Llama, with the defaults of transformers filled in."""
    heads = config["num_attention_heads"]
    hidden = config["hidden_size"]
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=hidden,
        intermediate=config["intermediate_size"],
        heads=heads,
        kv_heads=config["num_key_value_heads"] or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        tied=config["tie_word_embeddings"],
    )


class Instant(NamedTuple):
    """Bytes of temporary tensors at one instant of a step."""

    activations: int
    loss: int
    gradients: int


class Prediction(NamedTuple):
    """Bytes: the maximum of each component, and the instants of a step that may be the peak."""

    components: dict[str, int]
    instants: dict[str, Instant]

    def peak(self, paged: bool = False) -> int:
        """The largest number of bytes at one time; paged: without AdamW's moments."""
        temporary = {"activations", "loss", "gradients"}
        if paged:
            temporary.add("AdamW moments")
        lasting = sum(size for name, size in self.components.items() if name not in temporary)
        return lasting + max(sum(instant) for instant in self.instants.values())


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
    """Predicts a step of batch * length tokens in which AdamW already has its moments.

    accumulating: gradients of an earlier pass exist when this one starts.
    labels: tokens in the loss; None for all tokens but the first of each sequence.
    masked: attention has a mask, for padding or packed documents.
    dropout: there is dropout before the adapters.
    width: bytes per number where the table above says 16 bits; 4 for float32, but not for FULL.
    """
    if labels is None:
        labels = batch * (length - 1)
    step = _Pass(
        shape, method, batch, length, r, checkpointing, labels, masked, packed, dropout, width
    )
    components = step.weights(block_size, double_quant)
    trained = sum(components.values()) if method == FULL else components["adapters"]
    instants = step.instants(trained)
    if accumulating:
        instants = {name: instant._replace(gradients=trained) for name, instant in instants.items()}
    moments_per_gradient = 4 if method == FULL else 2  # float32; a gradient of FULL has 16 bits
    components |= {
        "gradients": trained,
        "AdamW moments": moments_per_gradient * trained,
        "activations": max(instant.activations for instant in instants.values()),
        "loss": instants["the loss"].loss,
    }
    return Prediction(components, instants)


class _Pass(NamedTuple):
    """One forward and backward pass. Every method returns bytes."""

    shape: Shape
    method: str
    batch: int
    length: int
    r: int
    checkpointing: bool
    labels: int
    masked: bool
    packed: bool
    dropout: bool
    width: int

    def weights(self, block_size: int, double_quant: bool) -> dict[str, int]:
        """The weights and the buffer, by component."""
        shape = self.shape
        sizes = [n_out * n_in for n_out, n_in in shape.maps()]
        if self.method == QLORA:
            base = sum((n + 1) // 2 for n in sizes)
            constants = sum(constant_bytes(n, block_size, double_quant) for n in sizes)
            buffer = self.width * max(sizes)
        else:
            base = self.width * sum(sizes)
            constants = 0
            buffer = 0
        adapters = 0 if self.method == FULL else 4 * self.r * sum(map(sum, shape.maps()))
        embeddings = 1 if shape.tied else 2
        return {
            "base": shape.layers * base,
            "constants": shape.layers * constants,
            "embedding, head": self.width * shape.vocabulary * shape.hidden * embeddings,
            "norms": self.width * shape.hidden * (2 * shape.layers + 1),
            "adapters": shape.layers * adapters,
            "buffer": buffer,
        }

    def instants(self, trained: int) -> dict[str, Instant]:
        """The temporary bytes at each instant that may be the peak; trained: all gradients."""
        d = self.shape.hidden
        tokens = self.batch * self.length
        full = self.method == FULL
        layer = self.layer_activations()
        kept = self.width * d * tokens if self.checkpointing else layer
        norm = (4 * d + 4) * tokens
        # Without checkpointing the first norm saves nothing: its input, the frozen embedding,
        # needs no gradient.
        not_kept = 0 if full or self.checkpointing else norm

        shared = self.shared_activations()
        all_layers = shared + self.shape.layers * kept - not_kept
        first_layer = shared + kept - not_kept
        at_loss = all_layers + norm
        if full:
            at_loss += 2 * d * (tokens + self.labels)  # x of the last norm's weight and of the head
        in_layer = self.layer_backward(layer)
        at_end = 24 * d * tokens if full else 0  # the backward of the first norm

        before_layers, first_map, per_layer = self.gradients(trained)
        at_last = before_layers + first_map
        at_first = at_last + (self.shape.layers - 1) * per_layer
        return {
            "the loss": Instant(at_loss, self.loss(), 0),
            "the last norm's backward": Instant(at_loss + 20 * d * tokens, 0, before_layers),
            "the last layer's backward": Instant(all_layers + in_layer, 0, at_last),
            "the first layer's backward": Instant(first_layer + in_layer, 0, at_first),
            "the end of backward": Instant(at_end, 0, trained),
        }

    def layer_activations(self) -> int:
        """What one layer saves for backward without checkpointing."""
        r = 0 if self.method == FULL else self.r
        tokens = self.batch * self.length
        saved = tokens * saved_per_token(self.shape, r, self.masked, self.dropout, self.width)
        if self.masked:
            saved += self.width * tokens * self.length
        return saved

    def shared_activations(self) -> int:
        """Bytes that all layers share: cosine and sine of the rotation, and the mask."""
        rotations = self.batch if self.packed else 1
        shared = 2 * self.width * self.length * self.shape.head_dim * rotations
        if self.masked and self.checkpointing:
            shared += self.batch * self.length**2  # as bool, to recompute the other layers
        return shared

    def layer_backward(self, layer: int) -> int:
        """What the backward of a layer adds to the saved activations; layer: what it saves."""
        d = self.shape.hidden
        f = self.shape.intermediate
        tokens = self.batch * self.length
        product = self.width * (2 * f + d) * tokens  # the backward of silu(gate) * up
        if not self.checkpointing:
            return product
        if self.width == 4:
            layer -= 4 * d * tokens  # the checkpoint is the float32 input of the first norm
        # The random numbers of dropout exist while down is recomputed.
        random_numbers = (4 * f + 2 * self.width * d) * tokens
        return layer + max(product, random_numbers if self.dropout else 0)

    def gradients(self, trained: int) -> tuple[int, int, int]:
        """Gradients: those before the layers; those of one layer's down; those of one layer."""
        d = self.shape.hidden
        f = self.shape.intermediate
        if self.method == FULL:
            head_and_norm = 2 * d * (self.shape.vocabulary + 1)
            maps = sum(n_out * n_in for n_out, n_in in self.shape.maps())
            return head_and_norm, 2 * d * f, 2 * maps + 4 * d
        return 0, 4 * self.r * (d + f), trained // self.shape.layers

    def loss(self) -> int:
        """The logits, which become their gradient, and the rows in float32."""
        logits = self.width * self.shape.vocabulary * self.labels
        rows = 4 * self.shape.vocabulary * min(ROWS, self.labels)
        return logits + rows


def constant_bytes(n: int, block_size: int, double_quant: bool) -> int:
    """Bytes of the quantization constants of n weights."""
    blocks = -(-n // block_size)
    if not double_quant:
        return 4 * blocks
    return blocks + 4 * -(-blocks // 256) + 4


def saved_per_token(
    shape: Shape, r: int, masked: bool = False, dropout: bool = False, width: int = 2
) -> int:
    """Bytes that one layer saves for backward per token, by the table above; r = 0 for FULL."""
    d = shape.hidden
    f = shape.intermediate
    q = shape.q
    copied = masked and shape.kv_heads > 1  # a single kv head is expanded without a copy
    k_and_v = 2 * (q if copied else shape.kv)
    norms = 8 * d + 8
    inputs = width * (2 * d + q + f)
    attention = width * (q + k_and_v) + 4 * shape.heads
    mlp = width * 3 * f
    trained = width * 7 * r if r else 4 * d
    if r and dropout:
        trained += 5 * d + q + f
    return norms + inputs + attention + mlp + trained


class StepSettings(NamedTuple):
    """The settings of a run that its memory depends on.

    method: LORA or QLORA. dropout: there is dropout before the adapters.
    width: bytes per number of the compute dtype. use_dora: DoRA, which is not predicted.
    """

    method: str
    r: int
    checkpointing: bool
    dropout: bool
    block_size: int
    double_quant: bool
    width: int
    use_dora: bool = False


def predict_step(
    config: "PretrainedConfig",
    settings: StepSettings,
    batch: int,
    length: int,
    accumulating: bool = False,
    labels: int | None = None,
    masked: bool = True,
    packed: bool = False,
) -> Prediction | None:
    """Predicts a pass of batch * length tokens of a run; None for a model that is not covered."""
    unknown = config.model_type not in KNOWN_MODELS
    if unknown or settings.use_dora or any(getattr(config, key, None) for key in NOT_COUNTED):
        return None
    return predict(
        shape_from(config.to_dict()),
        settings.method,
        batch,
        length,
        r=settings.r,
        checkpointing=settings.checkpointing,
        accumulating=accumulating,
        labels=labels,
        masked=masked,
        packed=packed,
        dropout=settings.dropout,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
        width=settings.width,
    )
