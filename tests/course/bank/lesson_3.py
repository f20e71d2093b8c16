"""Answers to lesson 3: the constants in 8 bits."""

from bank.answers import Answer

LAYOUT = "Codes, nested constants and offset"
OFFSET = "The offset is the mean"
EQUAL = "Equal constants"
NEAREST = "Every constant"
ERROR = "The error is at most"
RANGE = "A decoded constant"
REFUSED = "What cannot be quantized"
UNCHANGED = "The constants and their stored form"

WRONG = [
    Answer(
        "constants are decoded by DYNAMIC, whichever codebook is stored",
        NEAREST,
        {"dq.absmax, dq.codebook, shape": "dq.absmax, DYNAMIC, shape"},
    ),
    Answer(
        "a negative constant takes its magnitude",
        RANGE,
        {"absmax.clamp_(0, torch": "absmax.abs_().clamp_(0, torch"},
    ),
    Answer(
        "the mean is not removed, nor added",
        OFFSET,
        {"offset = absmax.mean() if": "offset = absmax.new_zeros(()) if"},
        shows="offset",
    ),
    Answer(
        "the median is removed instead of the mean",
        OFFSET,
        {"offset = absmax.mean() if": "offset = absmax.median() if"},
    ),
    Answer(
        "a float32 sum that overflows is the mean",
        OFFSET,
        {"if offset.isinf():": "if False:"},
    ),
    Answer(
        "the smallest constant is removed instead of the mean",
        OFFSET,
        {"offset = absmax.mean() if": "offset = absmax.min() if"},
    ),
    Answer(
        "the mean is forgotten on the way back",
        EQUAL,
        {" + dq.offset": ""},
    ),
    Answer(
        "the mean is added in units of the nested absmax",
        ERROR,
        {"nf4.dequantize(q) + dq.offset": "nf4.dequantize(q) + dq.offset * dq.absmax.max()"},
    ),
    Answer(
        "the mean is removed, but not stored",
        ERROR,
        {"offset.reshape(1), block_size, q.": "torch.zeros(1), block_size, q."},
    ),
    Answer(
        "each block is decoded with the constant of the one before",
        ERROR,
        {"nf4.Quantized(dq.codes, dq.absmax,": "nf4.Quantized(dq.codes, dq.absmax.roll(1),"},
    ),
    Answer(
        "the levels are those of an 8-bit integer",
        NEAREST,
        {
            "q = quantizer(absmax - offset, block_size, DYNAMIC)": "q = quantizer("
            "absmax - offset, block_size, torch.linspace(-1, 1, 256))"
        },
    ),
    Answer(
        "a constant takes the next lower level",
        NEAREST,
        functions={
            "quantize": """
def quantize(absmax, block_size=256, quantizer=nf4.quantize):
    absmax = absmax.to(torch.float32)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    q = quantizer(absmax - offset, block_size, DYNAMIC)
    nested = q.absmax.repeat_interleave(block_size)[: absmax.numel()].reshape(absmax.shape)
    x = torch.where(nested > 0, (absmax - offset) / nested, 0.0)
    codes = (torch.searchsorted(DYNAMIC, x, right=True) - 1).clamp(min=0).to(torch.uint8)
    return DoubleQuantized(codes, q.absmax, offset.reshape(1), block_size, DYNAMIC)
"""
        },
    ),
    Answer(
        "blocks of 64 constants by default",
        LAYOUT,
        {"absmax: Tensor, block_size: int = 256,": "absmax: Tensor, block_size: int = 64,"},
    ),
    Answer(
        "the codes lose the shape of the constants",
        LAYOUT,
        {"codes = q.packed.reshape(absmax.shape)": "codes = q.packed"},
    ),
    Answer(
        "the offset is a number without a dimension",
        LAYOUT,
        {"offset.reshape(1), block_size, q.": "offset, block_size, q."},
    ),
    Answer(
        "a decoded constant may be negative",
        RANGE,
        {".clamp_(0, torch.finfo": ".clamp_(-1, torch.finfo"},
    ),
    Answer(
        "a decoded constant may be infinite",
        RANGE,
        {".clamp_(0, torch.finfo(torch.float32).max)": ".clamp_(0)"},
    ),
    Answer(
        "a negative constant passes",
        REFUSED,
        {"if (absmax < 0).any():": "if False:"},
        shows="ValueError",
    ),
    Answer(
        "a NaN spreads over all constants before it is found",
        REFUSED,
        {"nf4.check_finite(absmax.reshape(-1), absmax.shape)": "None"},
        shows="5 of 5 weights",
    ),
    Answer(
        "the mean is subtracted in place",
        UNCHANGED,
        {"quantizer(absmax - offset,": "quantizer(absmax.sub_(offset),"},
    ),
    Answer(
        "the way back adds to the offset",
        UNCHANGED,
        {"nf4.dequantize(q) + dq.offset": "dq.offset.add_(nf4.dequantize(q).mean())"},
    ),
]

RIGHT = [
    Answer(
        "the nearest 8-bit level without nf4.quantize",
        functions={
            "quantize": """
def quantize(absmax, block_size=256, quantizer=None):
    constants = absmax.to(torch.float32)
    nf4.check_arguments(constants, block_size, DYNAMIC)
    nf4.check_finite(constants.reshape(-1), constants.shape)
    if constants.numel() and constants.min() < 0:
        raise ValueError(f"quantization constants must be >= 0, got {constants.min().item()}")
    n = constants.numel()
    offset = constants.double().sum() / max(n, 1)
    offset = offset.float().reshape(1)
    centred = (constants - offset).reshape(-1)
    padded = torch.cat([centred, centred.new_zeros(-n % block_size)]).reshape(-1, block_size)
    largest = padded.abs().amax(1)
    unit = padded.double() / torch.where(largest > 0, largest, 1.0).double()[:, None]
    middles = (DYNAMIC[1:].double() + DYNAMIC[:-1].double()) / 2
    codes = torch.bucketize(unit, middles).flatten()[:n]
    return DoubleQuantized(
        codes.to(torch.uint8).reshape(constants.shape), largest, offset, block_size, DYNAMIC
    )
""",
            "dequantize": """
def dequantize(dq):
    n = dq.codes.numel()
    scale = dq.absmax.repeat_interleave(dq.block_size)[:n].reshape(dq.codes.shape)
    constants = dq.codebook[dq.codes.int()] * scale + dq.offset[0]
    return constants.clamp(min=0, max=torch.finfo(torch.float32).max)
""",
        },
    ),
    Answer(
        "the mean always in float64",
        edits={
            "offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())": "offset = ("
            "absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(()))"
        },
    ),
]
