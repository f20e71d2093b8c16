// A code of 2 to 8 bits: its levels, its error on normal weights, and its cost.
"use strict";

page.widgets.code = {
  // Bits per weight of a code whose codes are packed without gaps, with its constants.
  cost(bits, blockSize, isDouble) {
    return bits + (isDouble ? 8 / blockSize + 32 / (256 * blockSize) : 32 / blockSize);
  },

  // nf4.py stores two codes of at most 16 levels in a byte, and larger codes one by one.
  stored(bits, blockSize, isDouble) {
    return this.cost(bits > 4 ? 8 : 4, blockSize, isDouble);
  },

  mount(root, table) {
    const { controls, stage } = page.frame(
      root,
      "Bits, levels, error and cost",
      "NormalFloat has its levels where normal weights are; the integers have equal steps.",
    );
    const settings = () => [Number(bits.value), 2 ** size.value, isDouble.checked];
    const update = () => {
      const [b, blockSize, double] = settings();
      levels.redraw();
      trade.redraw();
      show({
        "levels of NormalFloat": table.levels.nf[b].length,
        "error of NormalFloat": table.errors.nf[b][blockSize].toFixed(4),
        "error of the integers": table.errors.int[b][blockSize].toFixed(4),
        "bits per weight": this.cost(b, blockSize, double).toFixed(3),
        "as nf4.py stores it": this.stored(b, blockSize, double).toFixed(3),
      });
    };
    const bits = page.slider(
      controls,
      "bits",
      { min: 2, max: 8, value: 4 },
      (b) => `${b} bits`,
      update,
    );
    const sizes = table["block sizes"].map(Math.log2);
    const size = page.slider(
      controls,
      "block size",
      { min: sizes[0], max: sizes.at(-1), value: 6 },
      (i) => `${2 ** i} weights`,
      update,
    );
    const isDouble = page.checkbox(controls, "double quantization of the constants", true, update);
    page.legend(stage, [
      ["mark", "NormalFloat"],
      ["other", "integers"],
    ]);
    const levels = page.drawing(stage, "172px", (svg, width) =>
      this.drawLevels(svg, width, table, ...settings()),
    );
    const trade = page.drawing(stage, "242px", (svg, width) =>
      this.drawTrade(svg, width, table, ...settings()),
    );
    const show = page.numbers(stage, [
      "levels of NormalFloat",
      "error of NormalFloat",
      "error of the integers",
      "bits per weight",
      "as nf4.py stores it",
    ]);
    update();
  },

  // The density of weight / absmax, with the levels of NormalFloat above and the integers below.
  drawLevels(svg, width, table, bits, blockSize) {
    const place = (x) => 12 + ((x + 1) / 2) * (width - 24);
    const density = table.density[blockSize];
    const top = Math.max(...density);
    const points = density.map((y, i) => {
      const x = place(-1 + (2 * i + 1) / density.length);
      return `${x.toFixed(1)},${(94 - (80 * y) / top).toFixed(1)}`;
    });
    svg.add("polygon", {
      class: "area",
      points: [`${place(-1)},94`, ...points, `${place(1)},94`].join(" "),
    });
    svg.add("polyline", { class: "curve", points: points.join(" ") });
    svg.add("line", { class: "axis", x1: 0, x2: width, y1: 94, y2: 94 });
    for (const x of table.levels.nf[bits]) {
      svg.add("line", { class: "mark", x1: place(x), x2: place(x), y1: 84, y2: 108 });
    }
    for (const x of table.levels.int[bits]) {
      svg.add("line", { class: "other", x1: place(x), x2: place(x), y1: 116, y2: 128 });
    }
    for (const x of [-1, 0, 1]) svg.add("text", { class: "quiet middle", x: place(x), y: 146 }, x);
    svg.add(
      "text",
      { class: "quiet middle", x: width / 2, y: 166 },
      "weight / absmax, and how often it occurs",
    );
    svg.setAttribute("aria-label", `${table.levels.nf[bits].length} levels from -1 to 1`);
  },

  // Error against cost, a point for each number of bits. Errors are drawn by their logarithms.
  drawTrade(svg, width, table, bits, blockSize, isDouble) {
    const place = (cost) => 56 + ((cost - 2) / 7.2) * (width - 76);
    const height = (error) => 34 + (-Math.log10(error) - 0.2) * 72;
    svg.add("line", { class: "axis", x1: 56, x2: width, y1: 198, y2: 198 });
    for (const error of [0.3, 0.1, 0.03, 0.01, 0.005]) {
      svg.add("line", { class: "axis", x1: 56, x2: width, y1: height(error), y2: height(error) });
      svg.add("text", { class: "quiet end", x: 48, y: height(error) + 4 }, error);
    }
    for (let cost = 2; cost <= 9; cost++) {
      svg.add("text", { class: "quiet middle", x: place(cost), y: 215 }, cost);
    }
    for (const [name, style] of [
      ["int", "other"],
      ["nf", "mark"],
    ]) {
      const points = Object.entries(table.errors[name]).map(([b, errors]) => {
        const x = place(this.cost(Number(b), blockSize, isDouble));
        return [Number(b), x, height(errors[blockSize])];
      });
      const line = points.map(([, x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
      svg.add("polyline", { class: style, fill: "none", points: line });
      for (const [b, x, y] of points) {
        svg.add("circle", {
          class: style,
          cx: x,
          cy: y,
          r: b === bits ? 6 : 2.5,
          fill: "var(--card)",
        });
      }
    }
    svg.add(
      "text",
      { class: "quiet", x: 0, y: 12 },
      "root mean squared error, in standard deviations",
    );
    svg.add("text", { class: "quiet middle", x: (56 + width) / 2, y: 233 }, "bits per weight");
    svg.setAttribute("aria-label", "error against bits per weight, for both codes");
  },
};
