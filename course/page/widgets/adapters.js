// Rank and layers of the adapters: how many parameters are trained.
"use strict";

page.widgets.adapters = {
  layers: {
    "q, v": ["q", "v"],
    attention: ["q", "k", "v", "o"],
    MLP: ["gate", "up", "down"],
    all: ["q", "k", "v", "o", "gate", "up", "down"],
  },

  // A is (r, in), B is (out, r): r (in + out) numbers for each map.
  trainable(model, r, names) {
    const numbers = names.map((name) => r * (model.maps[name][0] + model.maps[name][1]));
    return model.layers * numbers.reduce((a, b) => a + b);
  },

  mount(root, table) {
    const { controls, stage } = page.frame(
      root,
      "What the adapters train",
      "Each map of a decoder layer is frozen. Those that you choose get thin matrices, A and B.",
    );
    const update = () => {
      const model = table[select.value];
      const count = this.trainable(model, 2 ** rank.value, this.layers[layers.value]);
      drawing.redraw();
      show({
        "trainable parameters": page.integer(count),
        "of all parameters": `${((100 * count) / (model.parameters + count)).toFixed(2)} %`,
        "adapters in float32": page.gigabytes(4 * count),
        "with gradients and moments": page.gigabytes(16 * count),
      });
    };
    const select = page.select(controls, "model", Object.keys(table), update);
    const rank = page.slider(
      controls,
      "rank r",
      { min: 0, max: 8, value: 6 },
      (i) => `r = ${2 ** i}`,
      update,
    );
    const layers = page.choice(controls, "layers", Object.keys(this.layers), update);
    page.legend(stage, [
      ["bar", "a map that gets an adapter, to scale"],
      ["hot", "A below it, B at its right"],
    ]);
    const drawing = page.drawing(stage, "clamp(130px, 36vw, 240px)", (svg, width, height) => {
      this.draw(
        svg,
        width,
        height,
        table[select.value],
        2 ** rank.value,
        this.layers[layers.value],
      );
    });
    const show = page.numbers(stage, [
      "trainable parameters",
      "of all parameters",
      "adapters in float32",
      "with gradients and moments",
    ]);
    update();
  },

  // The maps of a layer, all to one scale: A lies below its map, B at its right.
  draw(svg, width, height, model, r, chosen) {
    const maps = Object.entries(model.maps);
    const gap = 12;
    const wide = maps.reduce((sum, [, size]) => sum + size[1] + r, 0);
    const high = Math.max(...maps.map(([, size]) => size[0] + r));
    const scale = Math.min((width - gap * (maps.length - 1)) / wide, (height - 26) / high);
    let x = (width - scale * wide - gap * (maps.length - 1)) / 2;
    for (const [name, [out, into]] of maps) {
      const isChosen = chosen.includes(name);
      const top = 20;
      const thick = Math.max(r * scale, 1.5);
      const shape = { x, y: top, width: into * scale, height: out * scale };
      svg.add("rect", { class: isChosen ? "bar" : "empty", ...shape });
      svg.add("text", { class: isChosen ? "" : "quiet", x, y: top - 6 }, name);
      if (isChosen) {
        svg.add("rect", { class: "hot", ...shape, y: top + out * scale + 1, height: thick });
        svg.add("rect", { class: "hot", ...shape, x: x + into * scale + 1, width: thick });
      }
      x += scale * (into + r) + gap;
    }
    svg.setAttribute("aria-label", `adapters of rank ${r} on ${chosen.join(", ")}`);
  },
};
