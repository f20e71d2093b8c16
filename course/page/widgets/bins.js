// Blocks of weights at the levels of a code: what one outlier does to the weights of its block.
"use strict";

page.widgets.bins = {
  outlier: 300, // the place of the weight that the slider sets

  // The code of each weight and its error, as nf4.py computes them in float32.
  quantize(weights, blockSize, levels) {
    const f = Math.fround;
    const midpoints = levels.slice(1).map((level, i) => f(f(f(level) + f(levels[i])) / 2));
    const codes = [];
    const errors = [];
    for (let start = 0; start < weights.length; start += blockSize) {
      const block = weights.slice(start, start + blockSize).map(f);
      const absmax = Math.max(...block.map(Math.abs));
      const reciprocal = f(1 / absmax);
      for (const weight of block) {
        const x = f(weight * reciprocal);
        const below = midpoints.findIndex((midpoint) => x <= midpoint);
        const code = below < 0 ? levels.length - 1 : below;
        codes.push(code);
        errors.push(Math.abs(f(f(levels[code]) * absmax) - weight));
      }
    }
    return { codes, errors };
  },

  // What the widget shows for one setting: weights at each level, and mean errors.
  summary(table, code, blockSize, outlier) {
    const weights = table.weights.with(this.outlier, outlier);
    const levels = table.codes[code];
    const { codes, errors } = this.quantize(weights, blockSize, levels);
    const start = this.outlier - (this.outlier % blockSize);
    const isInside = (i) => i >= start && i < start + blockSize;
    const count = function (chosen) {
      return levels.map((_, code) => codes.filter((x, i) => x === code && chosen(i)).length);
    };
    const mean = (chosen) => {
      const some = errors.filter((_, i) => chosen(i));
      return some.length ? some.reduce((a, b) => a + b) / some.length : 0;
    };
    return {
      inside: count(isInside),
      outside: count((i) => !isInside(i)),
      error: mean(() => true),
      errorInside: mean(isInside),
      errorOutside: mean((i) => !isInside(i)),
    };
  },

  mount(root, table) {
    const { controls, stage } = page.frame(
      root,
      "One outlier and its block",
      `${table.weights.length} normal weights with standard deviation 1, each block divided by ` +
        "its largest magnitude, absmax. Make one weight larger, and change the size of the blocks.",
    );
    const update = () => {
      this.shown = this.summary(table, code.value, 2 ** size.value, Number(outlier.value));
      const used = this.shown.inside.filter(Boolean).length;
      drawing.redraw();
      show({
        "mean error": this.shown.error.toFixed(4),
        "in the outlier's block": this.shown.errorInside.toFixed(4),
        "in all other blocks": this.shown.errorOutside.toFixed(4),
        "levels used in its block": `${used} of ${this.shown.inside.length}`,
      });
    };
    const size = page.slider(
      controls,
      "block size",
      { min: 4, max: 9, value: 6 },
      (i) => `${2 ** i} weights`,
      update,
    );
    const outlier = page.slider(
      controls,
      "the outlier",
      { min: 1, max: 60, value: 4 },
      (x) => `${x} standard deviations`,
      update,
    );
    const code = page.choice(controls, "code", Object.keys(table.codes), update);
    page.legend(stage, [
      ["bar", "share of the weights of all other blocks"],
      ["hot", "share of the weights of the outlier's block"],
    ]);
    const drawing = page.drawing(stage, "232px", (svg, width) => {
      this.draw(svg, width, table.codes[code.value], this.shown);
    });
    const show = page.numbers(stage, [
      "mean error",
      "in the outlier's block",
      "in all other blocks",
      "levels used in its block",
    ]);
    update();
  },

  // A bar per level: the share of the outlier's block, beside the share of the other blocks.
  draw(svg, width, levels, shown) {
    const bottom = 190;
    const place = (level) => 66 + ((level + 1) / 2) * (width - 82);
    const half = Math.max(2, Math.min(9, (width - 82) / 60));
    const shares = [shown.outside, shown.inside].map((counts) => {
      const all = counts.reduce((a, b) => a + b);
      return counts.map((count) => (all ? count / all : 0));
    });
    const top = [0.2, 0.4, 1].find((share) => share >= Math.max(...shares.flat()));
    for (const share of [0, top / 2, top]) {
      const y = bottom - (170 * share) / top;
      svg.add("line", { class: "axis", x1: 54, x2: width, y1: y, y2: y });
      svg.add("text", { class: "quiet end", x: 46, y: y + 4 }, `${Math.round(100 * share)} %`);
    }
    [
      ["bar", -half],
      ["hot", 0],
    ].forEach(([style, shift], group) => {
      levels.forEach((level, i) => {
        const height = (170 * shares[group][i]) / top;
        svg.add("rect", {
          class: style,
          x: place(level) + shift,
          y: bottom - height,
          width: half,
          height,
        });
      });
    });
    for (const level of levels) {
      svg.add("line", {
        class: "other",
        x1: place(level),
        x2: place(level),
        y1: bottom,
        y2: bottom + 5,
      });
    }
    for (const x of [-1, 0, 1]) {
      svg.add("text", { class: "quiet middle", x: place(x), y: bottom + 20 }, x);
    }
    svg.add(
      "text",
      { class: "quiet middle", x: place(0), y: bottom + 37 },
      "levels: weight / absmax of its block",
    );
    const fullest = Math.round(100 * Math.max(...shares[1]));
    svg.setAttribute("aria-label", `the fullest level holds ${fullest} % of the outlier's block`);
  },
};
