"""Answers to lesson 4: the product of a frozen weight and an adapter, and its gradient."""

from bank.answers import Answer

OUTPUT = "The output is"
DERIVATIVES = "The gradients of x, A, B and b"
EACH = "Output and gradients are right"
START = "While B is zero"
SAVED = "Forward saves"
NEEDED = "What needs no gradient"
BIAS = "A bias that is trained"
SCALING = "The scaling is"
UPDATE = "The update is"

BASE = "y = base.matmul(x, bias=bias)"
ADDED = "dispatch.add_product_(y, h, _transpose(lora_B, x.dtype), scaling)"
SAVE = "ctx.save_for_backward(x if needs_A else None, h if needs_B else None, keep, lora_A, lora_B)"
OF_B = "dB = (h.T @ g).mul_(ctx.scaling)"
OF_X = "dx = ctx.base.matmul(g, transposed=False)  # (tokens, in)"

WRONG = [
    Answer(
        "the bias is added twice",
        OUTPUT,
        {BASE: f"{BASE}\n        y = y if bias is None else y + bias"},
    ),
    Answer(
        "the adapter is not scaled",
        OUTPUT,
        {"x.dtype), scaling)": "x.dtype), 1.0)"},
        shows="output",
    ),
    Answer(
        "scaling is applied to h and again to the product",
        OUTPUT,
        {"lora_A.to(x.dtype))  # (tokens, r)": "lora_A.to(x.dtype)) * scaling"},
    ),
    Answer(
        "the adapter replaces the frozen product",
        OUTPUT,
        {BASE: "y = 0 * base.matmul(x, bias=bias)"},
    ),
    Answer(
        "the gradient of B is not scaled",
        DERIVATIVES,
        {OF_B: "dB = (h.T @ g)"},
        shows="gradient of lora_B",
    ),
    Answer(
        "the gradient of A is not scaled",
        DERIVATIVES,
        {"@ g.T).mul_(ctx.scaling)": "@ g.T)"},
        shows="gradient of lora_A",
    ),
    Answer(
        "the gradient of x leaves the adapter out",
        DERIVATIVES,
        {"dispatch.add_product_(dx, dh, A)": "pass"},
        shows="gradient of x",
    ),
    Answer(
        "the gradient of x leaves the frozen weight out",
        DERIVATIVES,
        {OF_X: "dx = torch.zeros(len(g), ctx.base.shape[1], dtype=g.dtype)"},
        shows="gradient of x",
    ),
    Answer(
        "the gradient of the bias is forgotten",
        DERIVATIVES,
        {"dbias = g.sum(0)  # (out,)": "dbias = torch.zeros_like(g[0])"},
        shows="gradient of bias",
    ),
    Answer(
        "the gradients of A and B are returned in the wrong order",
        DERIVATIVES,
        {"return dx, dA, dB, dbias": "return dx, dB, dA, dbias"},
    ),
    Answer(
        "the gradient is divided by the number of tokens",
        DERIVATIVES,
        {OF_B: "dB = (h.T @ g).mul_(ctx.scaling).div_(len(g))"},
        shows="gradient of lora_B",
    ),
    Answer(
        "nothing is dropped in the forward pass",
        EACH,
        {"F.linear(_drop(x, keep), lora_A": "F.linear(x, lora_A"},
    ),
    Answer(
        "the gradient of x passes through what dropout dropped",
        EACH,
        {"dx.add_(dropped.mul_(keep))": "dx.add_(dropped)"},
    ),
    Answer(
        "the gradient of A is that of x without dropout",
        EACH,
        {"dA = (dh.T @ _drop(x, keep))": "dA = (dh.T @ x)"},
    ),
    Answer(
        "the output is computed in bfloat16",
        EACH,
        {
            BASE: "y = base.matmul(x.bfloat16(), bias=None if bias is None else bias.bfloat16())"
            ".to(x.dtype)"
        },
    ),
    Answer(
        "the frozen branch is dropped too",
        START,
        {BASE: "y = base.matmul(_drop(x, keep), bias=bias)"},
    ),
    Answer(
        "everything is computed in float32 and rounded at the end",
        START,
        functions={
            "LoRAMatmul.forward": """
    def forward(ctx, x, lora_A, lora_B, bias, keep, scaling, base):
        wide = x.float()
        h = F.linear(_drop(wide, keep), lora_A.float())
        y = base.matmul(wide, bias=None if bias is None else bias.float())
        ctx.save_for_backward(x, h, keep, lora_A, lora_B)
        ctx.scaling, ctx.base = scaling, base
        return (y + h @ lora_B.float().T * scaling).to(x.dtype)
"""
        },
    ),
    Answer(
        "the dequantized weight is saved",
        SAVED,
        {
            SAVE: SAVE.replace("lora_B)", "lora_B, base(x.dtype))"),
            "x, h, keep, lora_A, lora_B = ctx.saved_tensors": "x, h, keep, lora_A, lora_B, W = "
            "ctx.saved_tensors",
            OF_X: "dx = g @ W",
        },
        shows="wanted",
    ),
    Answer(
        "the dequantized weight is kept on ctx, where no hook sees it",
        SAVED,
        {"        ctx.base = base\n": "        ctx.base = base\n        ctx.W = base(x.dtype)\n"},
    ),
    Answer(
        "each layer saves its own copy of x, as dropout leaves it",
        SAVED,
        {
            SAVE: "dropped = _drop(x, keep)\n        " + SAVE.replace("(x if", "(dropped if"),
        },
    ),
    Answer(
        "the output is saved, which no gradient needs",
        SAVED,
        {
            SAVE: SAVE.replace("lora_B)", "lora_B, y)"),
            "x, h, keep, lora_A, lora_B = ctx.saved_tensors": "x, h, keep, lora_A, lora_B, _ = "
            "ctx.saved_tensors",
        },
    ),
    Answer(
        "the mask is saved in the dtype of x",
        SAVED,
        {
            SAVE: SAVE.replace("keep,", "None if keep is None else keep.to(x.dtype),"),
        },
    ),
    Answer(
        "all gradients are computed for a frozen adapter",
        NEEDED,
        {SAVE: "ctx.save_for_backward(x, h, keep, lora_A, lora_B)"},
        shows="wanted",
    ),
    Answer(
        "the gradient of the bias is scaled",
        BIAS,
        {"dbias = g.sum(0)  # (out,)": "dbias = g.sum(0) * ctx.scaling"},
        shows="gradient of bias",
    ),
    Answer(
        "the gradient of the bias is a mean over the tokens",
        BIAS,
        {"dbias = g.sum(0)  # (out,)": "dbias = g.mean(0)"},
        shows="gradient of bias",
    ),
    Answer(
        "the scaling is alpha",
        SCALING,
        {
            "return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)": "return "
            "self.lora_alpha"
        },
        shows="layer.scaling == scaling",
    ),
    Answer(
        "use_rslora is ignored",
        SCALING,
        {"(math.sqrt(self.r) if self.use_rslora else self.r)": "self.r"},
    ),
    Answer(
        "the update is not scaled",
        UPDATE,
        {
            "return (self.lora_B @ self.lora_A).detach() * self.scaling": "return "
            "(self.lora_B @ self.lora_A).detach()"
        },
    ),
    Answer(
        "the update is transposed",
        UPDATE,
        {"return (self.lora_B @ self.lora_A)": "return (self.lora_A.T @ self.lora_B.T)"},
    ),
]

RIGHT = [
    Answer(
        "the backward pass with einsum, one product a line",
        functions={
            "LoRAMatmul.backward": """
    def backward(ctx, g):
        x, h, keep, lora_A, lora_B = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        A, B = lora_A.to(g.dtype), lora_B.to(g.dtype)
        with torch.autocast(g.device.type, enabled=False):
            dh = torch.einsum("to,or->tr", g, B) * ctx.scaling
            dB = torch.einsum("to,tr->or", g, h) * ctx.scaling if needs_B else None
            dA = None
            if needs_A:
                dropped = x if keep is None else torch.where(keep, x, 0)
                dA = torch.einsum("tr,ti->ri", dh, dropped)
            dx = None
            if needs_x:
                through = dh @ A
                through = through if keep is None else torch.where(keep, through, 0)
                dx = ctx.base.matmul(g, transposed=False) + through
            dbias = torch.ones(len(g), dtype=g.dtype) @ g if needs_bias else None
        dA = None if dA is None else dA.to(lora_A.dtype)
        dB = None if dB is None else dB.to(lora_B.dtype)
        return dx, dA, dB, dbias, None, None, None
"""
        },
    ),
    Answer(
        "dropout by masked_fill, and products by @",
        functions={
            "LoRAMatmul.forward": """
    def forward(ctx, x, lora_A, lora_B, bias, keep, scaling, base):
        dropped = x if keep is None else x.masked_fill(~keep, 0)
        h = dropped @ lora_A.to(x.dtype).T
        y = base.matmul(x, bias=bias) + (h @ lora_B.to(x.dtype).T) * scaling
        _, needs_A, needs_B, *_ = ctx.needs_input_grad
        saved = x if needs_A else None, h if needs_B else None
        ctx.save_for_backward(*saved, keep, lora_A, lora_B)
        ctx.scaling, ctx.base = scaling, base
        return y
""",
        },
    ),
    Answer(
        "the update with einsum, the scaling as a power of r",
        edits={
            "return (self.lora_B @ self.lora_A).detach() * self.scaling": "return "
            'torch.einsum("or,ri->oi", self.lora_B, self.lora_A).detach().mul(self.scaling)',
            "return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)": "return "
            "self.lora_alpha / self.r ** (0.5 if self.use_rslora else 1)",
        },
    ),
]
