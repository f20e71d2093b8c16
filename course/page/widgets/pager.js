// The pager of paged_optim.py: within a byte budget, the least recently used page leaves first.
"use strict";

page.widgets.pager = {
  // The same rules and counters as paged_optim.Pager, for pages given by their bytes.
  pager(pages, budget) {
    const state = { cache: [], resident: 0, saved: pages.map(() => false), events: [] };
    state.counters = { hits: 0, faults: 0, evictions: 0, bytes_in: 0, bytes_out: 0 };
    const counters = state.counters;
    const evict = function () {
      const oldest = state.cache.shift();
      if (state.saved[oldest]) {
        state.events.push(`page ${oldest} leaves`);
      } else {
        state.events.push(`page ${oldest} leaves and is written to the store`);
        counters.bytes_out += pages[oldest];
        state.saved[oldest] = true;
      }
      state.resident -= pages[oldest];
      counters.evictions += 1;
    };
    state.fetch = function (index) {
      state.events = [];
      const place = state.cache.indexOf(index);
      if (place >= 0) {
        counters.hits += 1;
        state.cache.splice(place, 1);
        state.events.push(`page ${index} is on the device, a hit`);
      } else {
        counters.faults += 1;
        state.events.push(`page ${index} is not on the device, a fault`);
        while (state.resident + pages[index] > budget) evict();
        state.resident += pages[index];
        if (state.saved[index]) {
          state.events.push(`page ${index} is read from the store`);
          counters.bytes_in += pages[index];
        } else {
          state.events.push(`page ${index} is created`);
        }
      }
      state.cache.push(index);
      state.saved[index] = false; // AdamW writes to it
    };
    return state;
  },

  mount(root, table) {
    const pages = Object.values(table).flat();
    const mebibytes = (bytes) => `${bytes / 2 ** 20} MiB`;
    const whole = pages.reduce((a, b) => a + b) / 2 ** 20;
    const { controls, stage } = page.frame(
      root,
      "The pager in an optimizer step",
      "A step of AdamW needs every page once, always in the same order. Give it less memory than " +
        "all pages need, and see what two steps cost.",
    );
    const restart = () => {
      this.state = this.pager(pages, budget.value * 2 ** 20);
      this.visits = 0;
      update();
    };
    const advance = (visits) => {
      for (let i = 0; i < visits; i++) {
        this.state.fetch(this.visits % pages.length);
        this.visits += 1;
      }
      update();
    };
    const update = () => {
      drawing.redraw();
      const { counters, events } = this.state;
      const step = Math.ceil(this.visits / pages.length);
      said.textContent = this.visits
        ? `Step ${step}: ${events.join("; ")}.`
        : "Nothing is on the device yet. Press Next page.";
      show({
        hits: counters.hits,
        faults: counters.faults,
        evictions: counters.evictions,
        "read from the store": mebibytes(counters.bytes_in),
        "written to the store": mebibytes(counters.bytes_out),
      });
    };
    const budget = page.slider(
      controls,
      "budget on the device",
      { min: 2, max: whole, value: 8 },
      (x) => `${x} MiB of ${whole}`,
      restart,
    );
    const buttons = page.element("div", { class: "buttons" });
    controls.append(buttons);
    page.button(buttons, "Next page", () => advance(1));
    page.button(buttons, "End of step", () => advance(pages.length - (this.visits % pages.length)));
    page.button(buttons, "Start again", restart);
    const drawing = page.drawing(stage, "186px", (svg, width) =>
      this.draw(svg, width, table, budget.value * 2 ** 20),
    );
    const said = page.element("p", { class: "said", role: "status" });
    stage.append(said);
    const show = page.numbers(stage, [
      "hits",
      "faults",
      "evictions",
      "read from the store",
      "written to the store",
    ]);
    restart();
  },

  // Above the pages of each parameter, below the device with the least recently used page at left.
  draw(svg, width, table, budget) {
    const pages = Object.values(table).flat();
    const scale = width / pages.reduce((a, b) => a + b);
    const { cache, saved, resident } = this.state;
    const current = cache.at(-1);
    const box = (index, x, y, style) => {
      const size = pages[index] * scale;
      svg.add("rect", { class: style, x: x + 1, y, width: size - 2, height: 34, rx: 4 });
      svg.add("text", { class: "middle", x: x + size / 2, y: y + 22 }, index);
    };
    let x = 0;
    let index = 0;
    for (const [name, sizes] of Object.entries(table)) {
      const space = sizes.reduce((a, b) => a + b) * scale;
      const title = space > 70 ? name : name.replace("lora_", "");
      svg.add("text", { class: "quiet middle", x: x + space / 2, y: 12 }, title);
      for (const size of sizes) {
        box(index, x, 18, index === current ? "chosen" : cache.includes(index) ? "bar" : "empty");
        if (saved[index])
          svg.add("circle", { class: "dot", cx: x + size * scale - 9, cy: 27, r: 3 });
        x += size * scale;
        index += 1;
      }
    }
    svg.add(
      "text",
      { class: "quiet", x: 2, y: 72 },
      "all pages; a dot: the store has its latest value",
    );
    svg.add("rect", { class: "frame", x: 1, y: 96, width: budget * scale - 2, height: 44, rx: 6 });
    x = 0;
    for (const index of cache) {
      box(index, x, 101, index === current ? "chosen" : "bar");
      x += pages[index] * scale;
    }
    svg.add("text", { class: "quiet", x: 2, y: 158 }, "the device: the page at left leaves next");
    svg.add(
      "text",
      { class: "quiet", x: 2, y: 176 },
      `${resident / 2 ** 20} of ${budget / 2 ** 20} MiB used`,
    );
    svg.setAttribute("aria-label", `on the device: pages ${cache.join(", ") || "none"}`);
  },
};
