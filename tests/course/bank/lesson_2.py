"""Answers to lesson 2: the levels of NF4, and the nearest of them."""

from bank.answers import Answer

CODE = "A code of k bits"
PUBLISHED = "The 16 levels of NF4"
NEAREST = "Every number takes the level"
TIE = "A number exactly between"
ORDER = "The levels may be in any order"
ROUNDTRIP = "A round trip"
AGAIN = "Quantizing a dequantized"
ZERO = "Zero stays exactly zero"
LAYOUT = "A tensor of any shape"
REFUSED = "What cannot be quantized"
UNCHANGED = "The weight is not changed"

ABSMAX = "absmax = blocks.abs().amax(1)"
NORMALIZED = "_normalize(blocks, absmax)"

WRONG = [
    Answer(
        "the largest probability is that of 4 bits for any number of bits",
        PUBLISHED,
        {"round(1 - (1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)": "0.9677083"},
        shows="wanted",
    ),
    Answer(
        "equation 4 as it is printed",
        CODE,
        functions={
            "normal_float": """
def normal_float(bits):
    size = 2**bits
    quantiles = torch.tensor(ndtri([i / (size + 1) for i in range(size + 1)]))
    return (quantiles[1:] + quantiles[:-1]).float() / 2
"""
        },
    ),
    Answer(
        "levels at equal distances",
        CODE,
        functions={
            "normal_float": """
def normal_float(bits):
    return torch.linspace(-1, 1, 2**bits)
"""
        },
    ),
    Answer(
        "the quantiles are not divided by the largest",
        CODE,
        {"return levels / levels.max()": "return levels"},
        shows="nf4.normal_float(bits=2)",
    ),
    Answer(
        "zero replaces one of the positive levels",
        CODE,
        {
            "torch.linspace(outermost, 0.5, half + 1)[:-1]": "torch.linspace(outermost, 0.5, half)"
            "[:-1]",
            "-ndtri(torch.linspace(outermost, 0.5, half)[:-1]": "-ndtri("
            "torch.linspace(outermost, 0.5, half + 1)[:-1]",
        },
    ),
    Answer(
        "any number of bits is taken",
        CODE,
        {"if not 2 <= bits <= 8:": "if False:"},
    ),
    Answer(
        "the outermost probability is the center of the last of 16 bins",
        PUBLISHED,
        {"(1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)": "1 / (2 * size), 7)"},
        shows="nf4.NF4",
    ),
    Answer(
        "the levels are rounded to four decimals",
        PUBLISHED,
        {"return levels / levels.max()": "return (levels / levels.max()).round(decimals=4)"},
        shows="-0.6962",
    ),
    Answer(
        "the probabilities are spaced in float64",
        PUBLISHED,
        {
            "torch.linspace(outermost, 0.5, half + 1)": "torch.linspace("
            "outermost, 0.5, half + 1, dtype=torch.float64)"
        },
    ),
    Answer(
        "a number takes the next lower level",
        NEAREST,
        {"midpoints = (levels[1:] + levels[:-1]) / 2": "midpoints = levels[1:]"},
    ),
    Answer(
        "the smallest difference is taken, not the smallest distance",
        NEAREST,
        functions={
            "_nearest": """
def _nearest(x, codebook):
    return (x[..., None] - codebook).argmin(-1).to(torch.uint8)
"""
        },
    ),
    Answer(
        "the thresholds between levels are written with three decimals",
        NEAREST,
        {"(levels[1:] + levels[:-1]) / 2": "((levels[1:] + levels[:-1]) / 2).round(decimals=3)"},
    ),
    Answer(
        "absmax is the largest number, not the largest magnitude",
        NEAREST,
        {ABSMAX: "absmax = blocks.amax(1).abs()"},
        shows="absmax",
    ),
    Answer(
        "one absmax for the whole tensor",
        NEAREST,
        {ABSMAX: "absmax = flat.abs().max().expand(len(blocks)).clone() if len(flat) else flat"},
    ),
    Answer(
        "numbers are normalized in the dtype they come in",
        NEAREST,
        {"weight.detach().to(torch.float32).reshape(-1)": "weight.detach().reshape(-1)"},
    ),
    Answer(
        "a tie takes the upper level",
        TIE,
        {"out_int32=True)": "out_int32=True, right=True)"},
    ),
    Answer(
        "the code of a level is its rank, not its place",
        ORDER,
        {"codes = order[first].to(torch.uint8)": "codes = first.to(torch.uint8)"},
    ),
    Answer(
        "negative numbers take the level of their magnitude",
        ROUNDTRIP,
        {NORMALIZED: NORMALIZED + ".abs()"},
    ),
    Answer(
        "absmax is stored in bfloat16",
        AGAIN,
        {"Quantized(packed, absmax,": "Quantized(packed, absmax.bfloat16().float(),"},
    ),
    Answer(
        "a block of zeros is divided by zero",
        ZERO,
        {NORMALIZED: "blocks / absmax[:, None]"},
    ),
    Answer(
        "memory order is taken for row-major order",
        LAYOUT,
        {"to(torch.float32).reshape(-1)": "to(torch.float32).as_strided((weight.numel(),), (1,))"},
        shows="strides",
    ),
    Answer(
        "the shape of the weight is forgotten",
        LAYOUT,
        {"codebook, weight.shape, weight.dtype": "codebook, flat.shape, weight.dtype"},
    ),
    Answer(
        "NaN and infinity pass",
        REFUSED,
        {"    check_finite(flat, weight.shape)\n": ""},
        shows="ValueError",
    ),
    Answer(
        "the gradient is kept",
        UNCHANGED,
        {"weight.detach().to": "weight.to"},
    ),
]

RIGHT = [
    Answer(
        "the nearest by argmin over all levels",
        functions={
            "_nearest": """
def _nearest(x, codebook):
    by_level = codebook.argsort(stable=True)
    distance = (x[..., None] - codebook[by_level]).abs()
    code = by_level[distance.argmin(-1)]
    same = codebook[code][..., None] == codebook
    return same.int().argmax(-1).to(torch.uint8)
"""
        },
    ),
    Answer(
        "the quantiles from scipy.stats, and one list of levels",
        edits={"from scipy.special import ndtri": "from scipy.stats import norm"},
        functions={
            "normal_float": """
def normal_float(bits):
    if bits not in range(2, 9):
        raise ValueError(f"a NormalFloat code has 2 to 8 bits, got {bits}")
    n = 2**bits
    top = round(1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2, 7)
    levels = [0.0]
    for sign, count in ((1, n // 2), (-1, n // 2 - 1)):
        for p in torch.linspace(top, 0.5, count + 1)[:count].tolist():
            levels.append(sign * float(norm.ppf(p)))
    levels = torch.tensor(sorted(levels))
    return levels / levels[-1]
"""
        },
    ),
    Answer(
        "one block after the other, in float64",
        functions={
            "quantize": """
def quantize(weight, block_size=64, codebook=NF4):
    check_arguments(weight, block_size, codebook)
    flat = weight.detach().contiguous().view(-1).float()
    check_finite(flat, weight.shape)
    order = codebook.argsort(stable=True)
    levels = codebook[order].double()
    middles = (levels[:-1] + levels[1:]) / 2
    all_codes, constants = [], []
    for start in range(0, flat.numel(), block_size):
        block = flat[start : start + block_size].double()
        largest = block.abs().max()
        unit = block / largest if largest > 0 else block
        places = (unit[:, None] > middles).sum(1)
        places = torch.searchsorted(levels, levels[places])
        all_codes.append(order[places])
        constants.append(largest.float())
    n = flat.numel()
    codes = torch.cat([*all_codes, torch.empty(0, dtype=torch.int64)]).to(torch.uint8)
    if n % 2 and len(codebook) <= 16:
        zero = codebook.abs().argmin().to(torch.uint8)
        codes = torch.cat([codes, zero[None]])
    absmax = torch.stack(constants) if constants else flat.new_zeros(0)
    packed = _pack(codes, n, codebook)
    return Quantized(packed, absmax, codebook, weight.shape, weight.dtype, block_size)
"""
        },
    ),
]
