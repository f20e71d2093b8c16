"""Answers to lesson 5: the frozen weight, the layer, attach and merge."""

from bank.answers import Answer

COST = "A weight costs"
DECODED = "The decoded weight"
DENSE = "With codebook=None"
LAYER = "A layer with its adapter"
DEFAULTS = "Settings that are given"
FREED = "A dense weight is freed"
ATTACH = "attach replaces"
NAMED = "If one layer cannot"
MERGE = "merge leaves"
AUDIT = "The audit of merge"

QUANTIZED = "q = dispatch.quantize(weight, block_size, codebook)"
REGISTERED = "        self._register(q, constants)\n\n    @classmethod"
KEPT = 'self.register_buffer("weight", weight.detach())'
MADE = "layer = cls(base, linear.bias, r, lora_alpha, lora_dropout,"
RETURNED = "return layer.train(linear.training)"
TRAINED = 'parameter.requires_grad_(layer.r > 0 and name != "bias")'
SUM = "weight = (base(update.dtype) + update).to(base.decoded_dtype)"

WRONG = [
    Answer(
        "the decoded weight is kept for the next time",
        FREED,
        {
            "        return dispatch.dequantize(q, dtype, constants)\n": "        self.decoded = "
            "dispatch.dequantize(q, dtype, constants)\n        return self.decoded\n"
        },
    ),
    Answer(
        "use_rslora is not passed on",
        DEFAULTS,
        {
            "compute_dtype, use_rslora)\n        return": "compute_dtype)\n        return",
        },
    ),
    Answer(
        "the constants are not quantized",
        COST,
        {"constants = quantize_constants(q.absmax, quantizer=dispatch.quantize)": "pass"},
    ),
    Answer(
        "the constants are left out of the bill",
        COST,
        {'if not name.endswith("codebook")': 'if name == "packed"'},
    ),
    Answer(
        "every layer pays for the codebooks, which all layers share",
        COST,
        {'if not name.endswith("codebook")': "if name"},
    ),
    Answer(
        "the dense weight is kept next to its codes",
        COST,
        {
            REGISTERED: "        self._register(q, constants)\n"
            "        self.dense = weight.detach()\n\n    @classmethod"
        },
    ),
    Answer(
        "8-bit codes of constants are taken for constants",
        DECODED,
        {
            "return dispatch.dequantize(q, dtype, constants)": "return dispatch.dequantize("
            "Quantized(q.packed, q.absmax.float(), q.codebook, q.shape, q.dtype, q.block_size), "
            "dtype)"
        },
    ),
    Answer(
        "the dtype that is asked for is ignored",
        DECODED,
        {"dtype = dtype or self.decoded_dtype\n": "dtype = self.decoded_dtype\n"},
    ),
    Answer(
        "the block size is always 64",
        DECODED,
        {QUANTIZED: "q = dispatch.quantize(weight, 64, codebook)"},
    ),
    Answer(
        "the code is always NF4",
        DECODED,
        {QUANTIZED: "q = dispatch.quantize(weight, block_size)"},
    ),
    Answer(
        "the dense weight is copied",
        DENSE,
        {KEPT: 'self.register_buffer("weight", weight.detach().clone())'},
    ),
    Answer(
        "the dense weight is trained too",
        DENSE,
        {KEPT: "self.weight = weight"},
    ),
    Answer(
        "alpha is not passed on",
        LAYER,
        {MADE: "layer = cls(base, linear.bias, r, r, lora_dropout,"},
    ),
    Answer(
        "the bias is lost",
        LAYER,
        {MADE: "layer = cls(base, None, r, lora_alpha, lora_dropout,"},
    ),
    Answer(
        "the dropout is not passed on",
        LAYER,
        {MADE: "layer = cls(base, linear.bias, r, lora_alpha, 0.0,"},
    ),
    Answer(
        "the weight is stored as (in, out)",
        LAYER,
        {"base = FrozenWeight(linear.weight,": "base = FrozenWeight(linear.weight.T,"},
    ),
    Answer(
        "a layer that was evaluating goes back to training",
        DEFAULTS,
        {RETURNED: "return layer"},
    ),
    Answer(
        "the compute dtype of the layer is forgotten",
        DEFAULTS,
        {"compute_dtype = compute_dtype or linear.compute_dtype": "pass"},
    ),
    Answer(
        "the new layer remembers the one it replaced",
        FREED,
        {RETURNED: "layer.source = [linear]\n        return layer.train(linear.training)"},
    ),
    Answer(
        "the frozen weight remembers what it was made of",
        FREED,
        {
            REGISTERED: "        self._register(q, constants)\n"
            "        self.source = [weight]\n\n    @classmethod"
        },
    ),
    Answer(
        "a layer with two names is replaced under one of them",
        ATTACH,
        {
            "        for name in names:\n            model.set_submodule(name, layer)": "        "
            "model.set_submodule(names[0], layer)"
        },
    ),
    Answer(
        "the rest of the model stays trainable",
        ATTACH,
        {"    model.requires_grad_(False)\n": ""},
    ),
    Answer(
        "the adapters are frozen with the rest",
        ATTACH,
        {TRAINED: "pass"},
    ),
    Answer(
        "the biases are trained",
        ATTACH,
        {TRAINED: "parameter.requires_grad_(layer.r > 0)"},
    ),
    Answer(
        "the layers before the one that fails are replaced",
        NAMED,
        {"            check_replaceable(model.get_submodule(names[0]))": "            pass"},
    ),
    Answer(
        "the error does not say which layer it is about",
        NAMED,
        {
            "        with naming(names[0]):\n            layer = layer_type": "        "
            "if True:\n            layer = layer_type"
        },
    ),
    Answer(
        "base and update are rounded before they are added",
        MERGE,
        {SUM: "weight = base() + update.to(base.decoded_dtype)"},
    ),
    Answer(
        "the update is merged twice",
        MERGE,
        {SUM: "weight = (base(update.dtype) + 2 * update).to(base.decoded_dtype)"},
    ),
    Answer(
        "the bias is lost in the merge",
        MERGE,
        {"linear.bias = layer.bias": "linear.bias = None"},
    ),
    Answer(
        "a layer with two names is merged under one of them",
        MERGE,
        {
            "        for name in names:\n            inner.set_submodule(name, linear)": "        "
            "inner.set_submodule(names[0], linear)"
        },
    ),
    Answer(
        "the audit reports what was wanted",
        AUDIT,
        {"realized = (merged() - before).flatten()": "realized = update.flatten()"},
    ),
    Answer(
        "the audit compares lengths, whatever the direction",
        AUDIT,
        {
            "return MergeAudit(wanted_norm, dot / wanted_norm**2": "return MergeAudit("
            "wanted_norm, realized_norm / wanted_norm"
        },
    ),
    Answer(
        "the audit forgets double quantization",
        AUDIT,
        {
            "base.block_size, base.double_quant, base.codebook": "base.block_size, False, "
            "base.codebook"
        },
    ),
    Answer(
        "an update of zero is divided by zero",
        AUDIT,
        {"if wanted_norm == 0:": "if False:"},
        shows="ZeroDivisionError",
    ),
]

RIGHT = [
    Answer(
        "the frozen weight by nf4 and double_quant, without the kernels",
        edits={
            "from double_quant import DoubleQuantized\n": "import double_quant as nested\n"
            "import nf4\nfrom double_quant import DoubleQuantized\n"
        },
        functions={
            "FrozenWeight.__init__": """
    def __init__(self, weight, block_size=64, double_quant=True, codebook=NF4):
        super().__init__()
        if codebook is not None:
            q = nf4.quantize(weight, block_size, codebook)
            self._register(q, nested.quantize(q.absmax) if double_quant else None)
        else:
            self.double_quant = False
            self.shape, self.dtype = weight.shape, weight.dtype
            self.decoded_dtype = weight.dtype
            self.register_buffer("weight", weight.data)
            self.register_buffer("codebook", None)
""",
            "FrozenWeight.forward": """
    def forward(self, dtype=None):
        dtype = self.decoded_dtype if dtype is None else dtype
        if self.codebook is None:
            return self.weight.to(dtype)
        q, constants = self.packed_state()
        if constants is not None:
            largest = min(torch.finfo(kind).max for kind in (q.dtype, torch.float32))
            absmax = nested.dequantize(constants).clamp(max=largest)
            q = Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)
        return nf4.dequantize(q, dtype)
""",
            "FrozenWeight.nbytes": """
    def nbytes(self):
        names = "packed", "absmax", "nested_absmax", "nested_offset", "weight"
        tensors = [getattr(self, name, None) for name in names]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
""",
        },
    ),
    Answer(
        "layers are set as attributes of their parents",
        functions={
            "adapt": """
def adapt(model, layers, layer_type=QLoRALinear):
    if unwrap(model) is not model and layers:
        kind = type(model).__name__
        raise ValueError(f"adapters go into the model itself, got a {kind} around it")
    check_no_other_adapters(model)
    for (name, *_), _ in layers:
        with naming(name):
            check_replaceable(model.get_submodule(name))
    sizes = []
    for names, settings in layers:
        with naming(names[0]):
            new = layer_type.from_linear(model.get_submodule(names[0]), **settings)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
        sizes.append((new.base.shape.numel() * new.base.dtype.itemsize, new.base.nbytes))
    adapters = set()
    for module in model.modules():
        if isinstance(module, QLoRALinear) and module.r:
            adapters |= {module.lora_A, module.lora_B}
    for parameter in model.parameters():
        parameter.requires_grad = parameter in adapters
    return sum(before for before, _ in sizes), sum(now for _, now in sizes)
"""
        },
    ),
    Answer(
        "the audit in float64, the merged layer from an ordinary nn.Linear",
        functions={
            "merge": """
def merge(model):
    inner = unwrap(model)
    audits = {}
    for layer, names in names_of(inner, QLoRALinear).items():
        update = layer.update()
        if layer.base.codebook is not None:
            found = audit_merge(layer.base, update)
            for name in names:
                audits[name] = found
        merged = update + layer.base(update.dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(merged.to(layer.base.decoded_dtype), requires_grad=False)
        linear.bias = layer.bias
        linear.training = layer.training
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(inner.get_submodule(parent), last, linear)
    if hasattr(getattr(inner, "config", None), "quantization_config"):
        del inner.config.quantization_config
    return model, audits
""",
            "audit_merge": """
def audit_merge(base, update):
    before = base(update.dtype)
    fourbit = FrozenWeight(before + update, base.block_size, base.double_quant, base.codebook)
    realized = (fourbit() - before).double()
    wanted = update.double()
    if not wanted.any():
        return MergeAudit(0.0, 1.0, 1.0)
    dot = (realized * wanted).sum()
    length = wanted.square().sum().sqrt()
    moved = realized.square().sum().sqrt()
    cosine = (dot / (length * moved)).item() if moved > 0 else 0.0
    return MergeAudit(length.item(), (dot / length**2).item(), cosine)
""",
        },
    ),
]
