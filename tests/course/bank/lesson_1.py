"""Answers to lesson 1: blocks, packing and the way back."""

from bank.answers import Answer

PAIR = "The first number of a pair"
BYTES = "Up to 16 levels share a byte"
LAYOUT = "A tensor of any shape"
NEAREST = "Every number takes the level"
ROUNDTRIP = "A round trip"
SCALING = "Scaling a weight"
ZERO = "Zero stays exactly zero"
CAST = "Level times absmax"
UNCHANGED = "Neither the weight"

WRONG = [
    Answer(
        "the first number goes to the low half, and comes back from there",
        PAIR,
        {
            "(pairs[:, :1] << 4) | pairs[:, 1:]": "pairs[:, :1] | (pairs[:, 1:] << 4)",
            "torch.cartesian_prod(sixteen, sixteen)": "torch.cartesian_prod(sixteen, sixteen)"
            ".flip(1)",
        },
        shows="[0xf7]  [0x7f]",
    ),
    Answer(
        "the halves of a byte change places on the way back",
        ROUNDTRIP,
        {
            "torch.cartesian_prod(sixteen, sixteen)": "torch.cartesian_prod(sixteen, sixteen)"
            ".flip(1)"
        },
    ),
    Answer(
        "codes of more than 4 bits are packed in pairs too",
        BYTES,
        functions={
            "_pack": """
def _pack(codes, n, codebook):
    pairs = codes[: n + n % 2].reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]
"""
        },
    ),
    Answer(
        "the odd last number is dropped",
        LAYOUT,
        {"codes[: n + n % 2]": "codes[: n - n % 2]"},
    ),
    Answer(
        "the odd last number is paired with code 0, the level -1",
        LAYOUT,
        {"codes[: n + n % 2]": "F.pad(codes[:n], (0, n % 2))"},
        shows="wanted",
    ),
    Answer(
        "numbers after the last whole block are dropped",
        LAYOUT,
        {"flat = F.pad(flat, (0, missing))": "flat = flat[: -(flat.numel() % block_size)]"},
    ),
    Answer(
        "what fills the last block counts for its absmax",
        NEAREST,
        {"F.pad(flat, (0, missing))": "F.pad(flat, (0, missing), value=1.0)"},
    ),
    Answer(
        "a block is every k-th number instead of a run of numbers",
        NEAREST,
        {"return flat.reshape(-1, block_size)": "return flat.reshape(block_size, -1).T"},
    ),
    Answer(
        "each number is divided by the mean magnitude of its block",
        NEAREST,
        {
            "1 / (absmax * shift), 0.0)": "1 / ((blocks * shift[:, None]).abs().mean(1)"
            " + (absmax == 0)), 0.0)"
        },
    ),
    Answer(
        "every block is scaled back by the absmax of the first",
        ROUNDTRIP,
        {"blocks.mul_(q.absmax[:, None])": "blocks.mul_(q.absmax[:1, None])"},
    ),
    Answer(
        "dequantization takes all blocks for blocks of 64",
        ROUNDTRIP,
        {
            "blocks = _into_blocks(levels, q.block_size)": "blocks = _into_blocks(levels, 64)",
            "blocks.mul_(q.absmax[:, None])": "blocks.mul_(q.absmax[torch.arange(len(blocks))"
            ".clamp(max=len(q.absmax) - 1)][:, None])",
        },
    ),
    Answer(
        "absmax is forgotten on the way back",
        ROUNDTRIP,
        {"    blocks.mul_(q.absmax[:, None])\n": ""},
    ),
    Answer(
        "a small number is added to absmax, against a division by zero",
        SCALING,
        {"torch.where(absmax > 0, 1 / (absmax * shift), 0.0)": "1 / (absmax * shift + 1e-8)"},
    ),
    Answer(
        "1 / absmax overflows for tiny blocks",
        SCALING,
        {"torch.where(absmax < 2.0**-64, 2.0**64,": "torch.where(absmax < 0, 2.0**64,"},
    ),
    Answer(
        "a block of zeros is divided by zero",
        ZERO,
        {"torch.where(absmax > 0, 1 / (absmax * shift), 0.0)": "1 / (absmax * shift)"},
        shows="nf4.quantize(weight=tensor([0",
    ),
    Answer(
        "the product is made in the dtype of the weight",
        CAST,
        {
            "blocks.mul_(q.absmax[:, None])": "blocks = blocks.to(dtype or q.dtype)"
            " * q.absmax[:, None].to(dtype or q.dtype)"
        },
    ),
    Answer(
        "every weight comes back in float32",
        LAYOUT,
        {".reshape(q.shape).to(dtype or q.dtype)": ".reshape(q.shape)"},
        shows="float32",
    ),
    Answer(
        "the weight itself is normalized",
        UNCHANGED,
        {
            "return (blocks * shift[:, None]).mul_(reciprocal[:, None])": "return blocks.mul_("
            "shift[:, None]).mul_(reciprocal[:, None])"
        },
    ),
    Answer(
        "the way back leaves its result in absmax",
        UNCHANGED,
        {"blocks.mul_(q.absmax[:, None])": "blocks.mul_(q.absmax[:, None]); q.absmax.zero_()"},
    ),
]

RIGHT = [
    Answer(
        "packing by arithmetic, unpacking by two lookups",
        functions={
            "_pack": """
def _pack(codes, n, codebook):
    if len(codebook) > 16:
        return codes[:n, None].clone()
    even = codes[0:n:2]
    odd = codes[1 : n + n % 2 : 2]
    return (even * 16 + odd)[:, None]
""",
            "_unpack": """
def _unpack(packed, codebook):
    numbers = packed[:, 0].long()
    if len(codebook) > 16:
        return codebook[numbers]
    return torch.stack([codebook[numbers // 16], codebook[numbers % 16]], dim=1).flatten()
""",
        },
    ),
    Answer(
        "division instead of a reciprocal",
        functions={
            "_normalize": """
def _normalize(blocks, absmax):
    return blocks / torch.where(absmax == 0, 1.0, absmax)[:, None]
"""
        },
    ),
    Answer(
        "a loop over the blocks, and helpers of other names",
        functions={
            "dequantize": """
def dequantize(q, dtype=None):
    if len(q.codebook) > 16:
        codes = q.packed.flatten()
    else:
        codes = torch.cat([q.packed >> 4, q.packed & 15], dim=1).flatten()
    n = math.prod(q.shape)
    decoded = q.codebook[codes[:n].int()]
    for i in range(len(q.absmax)):
        decoded[i * q.block_size : (i + 1) * q.block_size] *= q.absmax[i]
    return decoded.reshape(q.shape).to(q.dtype if dtype is None else dtype)
""",
            "_into_blocks": """
def _into_blocks(flat, block_size):
    n_blocks = math.ceil(flat.numel() / block_size)
    blocks = flat.new_zeros(n_blocks * block_size)
    blocks[: flat.numel()] = flat
    return blocks.view(n_blocks, block_size)
""",
            "_unpack": "",
        },
    ),
]
