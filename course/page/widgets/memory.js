// The price of a training step in bytes, by memory/formula.py: no mask, no dropout, 16-bit numbers.
"use strict";

page.widgets.memory = {
  methods: {
    "4 bits": "QLoRA",
    "16 bits": "16-bit LoRA",
    "16 bits, all trained": "full fine-tuning",
  },

  // (out, in) of the seven maps of a layer.
  maps(shape) {
    const { hidden: d, intermediate: f } = shape;
    const q = shape.heads * shape.head_dim;
    const kv = shape.kv_heads * shape.head_dim;
    return [
      [q, d],
      [kv, d],
      [kv, d],
      [d, q],
      [f, d],
      [f, d],
      [d, f],
    ];
  },

  // The bytes of the weights by component, and of the buffer that a map is decoded into.
  weights(shape, { method, r, isDouble, blockSize }) {
    const sizes = this.maps(shape).map(([out, into]) => out * into);
    const sum = (numbers) => numbers.reduce((a, b) => a + b);
    const constants = function (n) {
      const blocks = Math.ceil(n / blockSize);
      return isDouble ? blocks + 4 * Math.ceil(blocks / 256) + 4 : 4 * blocks;
    };
    const isQuantized = method === "QLoRA";
    const ranks = sum(this.maps(shape).map(([out, into]) => out + into));
    return {
      base: shape.layers * (isQuantized ? sum(sizes.map((n) => Math.ceil(n / 2))) : 2 * sum(sizes)),
      constants: isQuantized ? shape.layers * sum(sizes.map(constants)) : 0,
      "embedding, head": 2 * shape.vocabulary * shape.hidden * (shape.tied ? 1 : 2),
      norms: 2 * shape.hidden * (2 * shape.layers + 1),
      adapters: method === "full fine-tuning" ? 0 : shape.layers * 4 * r * ranks,
      buffer: isQuantized ? 2 * Math.max(...sizes) : 0,
    };
  },

  // The temporary bytes at each instant that may be the peak: activations, loss, gradients.
  instants(shape, { method, r, batch, length, isCheckpointing, rows }, trained) {
    const { hidden: d, intermediate: f, layers, head_dim, vocabulary } = shape;
    const q = shape.heads * head_dim;
    const kv = shape.kv_heads * head_dim;
    const isFull = method === "full fine-tuning";
    const tokens = batch * length;
    const labels = batch * (length - 1);
    const attention = 2 * (q + 2 * kv) + 4 * shape.heads;
    const extra = isFull ? 4 * d : 14 * r;
    const layer = tokens * (8 * d + 8 + 2 * (2 * d + q + f) + attention + 6 * f + extra);
    const kept = isCheckpointing ? 2 * d * tokens : layer;
    const norm = (4 * d + 4) * tokens;
    const notKept = isFull || isCheckpointing ? 0 : norm;
    const shared = 4 * length * head_dim;
    const all = shared + layers * kept - notKept;
    const atLoss = all + norm + (isFull ? 2 * d * (tokens + labels) : 0);
    const inLayer = 2 * (2 * f + d) * tokens + (isCheckpointing ? layer : 0);
    const before = isFull ? 2 * d * (vocabulary + 1) : 0;
    const atLast = before + (isFull ? 2 * d * f : 4 * r * (d + f));
    const weights = this.maps(shape).reduce((sum, [out, into]) => sum + out * into, 0);
    const perLayer = isFull ? 2 * weights + 4 * d : trained / layers;
    const loss = 2 * vocabulary * labels + 4 * vocabulary * Math.min(rows, labels);
    return [
      [atLoss, loss, 0],
      [atLoss + 20 * d * tokens, 0, before],
      [all + inLayer, 0, atLast],
      [shared + kept - notKept + inLayer, 0, atLast + (layers - 1) * perLayer],
      [isFull ? 24 * d * tokens : 0, 0, trained],
    ];
  },

  // The largest bytes of each component, what exists at the peak, and the peak.
  predict(shape, settings) {
    const weights = this.weights(shape, settings);
    const sum = (numbers) => Object.values(numbers).reduce((a, b) => a + b);
    const isFull = settings.method === "full fine-tuning";
    const trained = isFull ? sum(weights) : weights.adapters;
    const instants = this.instants(shape, settings, trained);
    const moments = (isFull ? 4 : 2) * trained;
    const [activations, loss, gradients] = instants.reduce((a, b) => (sum(b) > sum(a) ? b : a));
    const components = {
      ...weights,
      gradients: trained,
      "AdamW moments": moments,
      activations: Math.max(...instants.map(([bytes]) => bytes)),
      loss: instants[0][1],
    };
    const atPeak = {
      ...weights,
      gradients,
      "AdamW moments": settings.isPaged ? 0 : moments,
      activations,
      loss,
    };
    return { components, atPeak, peak: sum(atPeak) };
  },

  mount(root, table) {
    const { controls, stage } = page.frame(
      root,
      "Price a training step",
      "Which card does a step fit on? The bytes follow from the shape of the model; shown are " +
        "those that exist when the step needs most.",
    );
    const settings = () => ({
      method: this.methods[bits.value],
      r: 2 ** rank.value,
      batch: Number(batch.value),
      length: 2 ** length.value,
      isDouble: isDouble.checked,
      isCheckpointing: isCheckpointing.checked,
      isPaged: isPaged.checked,
      blockSize: 64,
      rows: table.rows,
    });
    const update = () => {
      isDouble.disabled = bits.value !== "4 bits";
      rank.disabled = bits.value === "16 bits, all trained";
      this.shown = this.predict(this.shape, settings());
      drawing.redraw();
      const parts = Object.entries(this.shown.atPeak);
      show(Object.fromEntries(parts.map(([name, bytes]) => [name, page.gigabytes(bytes)])));
      show({ peak: page.gigabytes(this.shown.peak) });
      const card = table.cards.find((size) => this.fits(table, size));
      said.textContent = card
        ? `The smallest card it fits on has ${card} GiB = ${page.gigabytes(card * 2 ** 30)}; ` +
          "1 GiB of it is left to CUDA."
        : `It fits on none of these cards; the largest has ${table.cards.at(-1)} GiB.`;
    };
    const choose = () => {
      this.shape = { ...table.shapes[model.value] };
      for (const [name, input] of Object.entries(sizes)) {
        if (name === "tied") input.checked = this.shape.tied;
        else input.value = this.shape[name];
      }
      update();
    };
    const model = page.select(controls, "model", Object.keys(table.shapes), choose);
    const bits = page.choice(controls, "weights in", Object.keys(this.methods), update);
    const rank = page.slider(
      controls,
      "rank of the adapters",
      { min: 0, max: 8, value: 6 },
      (i) => `r = ${2 ** i}`,
      update,
    );
    const batch = page.slider(
      controls,
      "sequences in a batch",
      { min: 1, max: 32, value: 1 },
      String,
      update,
    );
    const length = page.slider(
      controls,
      "length of a sequence",
      { min: 7, max: 14, value: 9 },
      (i) => `${2 ** i} tokens`,
      update,
    );
    const checks = page.element("div", { class: "checks" });
    controls.append(checks);
    const isDouble = page.checkbox(checks, "double quantization", true, update);
    const isCheckpointing = page.checkbox(checks, "gradient checkpointing", true, update);
    const isPaged = page.checkbox(checks, "AdamW's moments paged out", false, update);
    const sizes = this.inputs(stage, table, update);
    page.legend(stage, [
      ["unused", "CUDA"],
      ["part0", "weights"],
      ["part1", "adapters, gradients, moments"],
      ["part2", "activations, loss, buffer"],
    ]);
    const drawing = page.drawing(stage, `${26 * table.cards.length + 6}px`, (svg, width) =>
      this.draw(svg, width, table),
    );
    const said = page.element("p", { class: "said short", role: "status" });
    stage.append(said);
    this.said = said;
    const any = this.predict(Object.values(table.shapes)[0], settings());
    const show = page.numbers(stage, ["peak", ...Object.keys(any.atPeak)]);
    choose();
  },

  // The sizes of the model, to change one by one.
  inputs(stage, table, update) {
    const fold = page.element(
      "details",
      {},
      page.element("summary", {}, "Sizes of the model: change them"),
    );
    const grid = page.element("div", { class: "sizes" });
    fold.append(grid);
    stage.append(fold);
    const inputs = {};
    for (const name of Object.keys(Object.values(table.shapes)[0])) {
      const label = name.replace("_", " ");
      if (name === "tied") {
        inputs.tied = page.checkbox(grid, "head is the embedding", false, () => {
          this.shape.tied = inputs.tied.checked;
          update();
        });
        continue;
      }
      const input = page.element("input", { type: "number", min: 1, step: 1 });
      input.addEventListener("input", () => {
        if (!input.checkValidity() || !input.value) {
          this.said.textContent = `${label}: give a whole number from 1 on; shown is the step before.`;
          return;
        }
        this.shape[name] = Number(input.value);
        update();
      });
      grid.append(page.element("label", {}, label, input));
      inputs[name] = input;
    }
    return inputs;
  },

  fits(table, size) {
    return this.shown.peak <= size * 2 ** 30 - table.outside;
  },

  // A bar per card: how much of it the step takes, split by component.
  draw(svg, width, table) {
    const { atPeak, peak } = this.shown;
    const left = 72;
    const room = width - left - 96;
    const groups = [
      ["base", "constants", "embedding, head", "norms"],
      ["adapters", "gradients", "AdamW moments"],
      ["activations", "loss", "buffer"],
    ].map((parts) => parts.reduce((sum, part) => sum + atPeak[part], 0));
    table.cards.forEach((size, row) => {
      const y = 4 + 26 * row;
      const bytes = size * 2 ** 30;
      const scale = room / Math.max(bytes, peak + table.outside);
      svg.add("text", { class: "end", x: left - 8, y: y + 15 }, `${size} GiB`);
      svg.add("rect", { class: "empty", x: left, y, width: bytes * scale, height: 20, rx: 3 });
      svg.add("rect", {
        class: "unused",
        x: left,
        y: y + 3,
        width: table.outside * scale,
        height: 14,
      });
      let x = left + table.outside * scale;
      groups.forEach((part, i) => {
        svg.add("rect", { class: `part${i}`, x, y: y + 3, width: part * scale, height: 14 });
        x += part * scale;
      });
      const end = left + bytes * scale;
      svg.add("line", { class: "mark", x1: end, x2: end, y1: y - 2, y2: y + 22 });
      const [style, answer] = this.fits(table, size) ? ["", "✓ fits"] : ["quiet", "✗ too large"];
      svg.add("text", { class: style, x: width - 88, y: y + 15 }, answer);
    });
    svg.setAttribute("aria-label", `the step needs ${page.gigabytes(peak)}`);
  },
};
