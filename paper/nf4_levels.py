"""The picture of the README: NF4's levels on the weights of a real layer, before and after division by absmax.

Left: one layer of SmolLM2 as it is; a normal with the same standard deviation fits it. Right: the same weights as NF4 sees
them, each block of 64 divided by its largest magnitude, with the 16 levels and how much each is used.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
import nf4
from checkpoints import sources as pretrained

LAYER = "model.layers.15.mlp.up_proj.weight"


def main() -> None:
    with safe_open(pretrained.default_folder() / "model.safetensors", "pt") as file:
        weight = file.get_tensor(LAYER).float()
    q = nf4.quantize(weight)
    normalised = weight.reshape(-1, q.block_size) / q.absmax[:, None]
    codes = torch.cat([q.packed >> 4, q.packed & 15]).flatten().int()
    share = codes.bincount(minlength=16) / weight.numel()

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(2, 3)
    )
    sigma = weight.std().item()
    left.hist(
        weight.flatten().numpy(),
        bins=200,
        range=(-4 * sigma, 4 * sigma),
        density=True,
        color="#9db8d2",
    )
    x = torch.linspace(-4 * sigma, 4 * sigma, 400)
    density = torch.exp(-((x / sigma) ** 2) / 2) / (sigma * (2 * torch.pi) ** 0.5)
    left.plot(x, density, color="#1f3a5f", linewidth=1.5, label=f"normal, σ = {sigma:.3f}")
    left.set(title=f"weights of {LAYER.removesuffix('.weight')}", xlabel="weight", yticks=[])
    left.legend(frameon=False, loc="upper right")

    right.hist(normalised.flatten().numpy(), bins=201, range=(-1, 1), density=True, color="#9db8d2")
    top = right.get_ylim()[1]
    for level, used in zip(nf4.NF4.tolist(), share.tolist()):
        right.axvline(level, ymax=0.88, color="#b5442e", linewidth=1.2)
        right.text(level, top * 1.06, f"{100 * used:.0f}", ha="center", fontsize=8, color="#b5442e")
    right.set(
        title="divided by the absmax of their block: NF4's levels, % of weights on each",
        xlabel="weight / absmax",
        yticks=[],
    )
    right.set_ylim(0, top * 1.18)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
    print(f"wrote {Path(__file__).with_suffix('.png').name}")


if __name__ == "__main__":
    main()
