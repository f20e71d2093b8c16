// A warp of kernel v4 in cuda_kernels/dequantize.py: 32 lanes decode 1024 weights to bfloat16.
"use strict";

page.widgets.warp = {
  // The words, of 8 codes each, that a lane reads at once; those that it decodes one by one.
  reads: (lane) => [0, 1, 2, 3].map((i) => 4 * lane + i),
  decodes: (lane) => [0, 1, 2, 3].map((i) => 32 * i + lane),

  // The scale of a block, by double_quant.py: product and sum are rounded one after the other.
  scale(table, block) {
    const f = Math.fround;
    const level = f(table.levels8[table.codes[block]]);
    const sum = f(f(level * f(table["nested absmax"][block >> 8])) + f(table.offset[0]));
    return Math.max(sum, 0);
  },

  // The float32 number rounded to bfloat16: to nearest, ties to even.
  bfloat16(number) {
    const words = new Uint32Array(new Float32Array([number]).buffer);
    words[0] += 0x7fff + ((words[0] >>> 16) & 1);
    words[0] &= 0xffff0000;
    return new Float32Array(words.buffer)[0];
  },

  // What a lane does with one byte of a word: two codes, two levels, two numbers.
  decode(table, word, byte) {
    const packed = table.packed[4 * word + byte];
    const element = 8 * word + 2 * byte;
    const block = Math.floor(element / table["block size"]);
    const scale = this.scale(table, block);
    const codes = [packed >> 4, packed & 15];
    const levels = codes.map((code) => Math.fround(table.levels[code]));
    const products = levels.map((level) => Math.fround(level * scale));
    const written = products.map((product) => this.bfloat16(product));
    return { packed, element, block, scale, codes, levels, products, written };
  },

  mount(root, table) {
    const { controls, stage } = page.frame(
      root,
      "A warp dequantizes",
      "32 lanes read 16 bytes each, exchange words through shared memory, and write 16 bytes in " +
        "each of four stores. In red this lane, in blue what all lanes do at the same time.",
    );
    const last = 16;
    const names = ["byte read", "codes", "levels", "absmax", "written as bfloat16", "elements"];
    const now = () => [Number(lane.value), Number(step.value)];
    const update = () => {
      input.redraw();
      one.redraw();
      output.redraw();
      this.say(said, show, table, ...now());
      back.disabled = Number(step.value) === 0;
      next.disabled = Number(step.value) === last;
    };
    const move = (steps) => {
      step.value = Number(step.value) + steps;
      step.say();
      update();
    };
    const lane = page.slider(controls, "lane", { min: 0, max: 31, value: 1 }, String, update);
    const step = page.slider(
      controls,
      "step",
      { min: 0, max: last, value: 0 },
      (i) => (i ? `store ${Math.ceil(i / 4)}, byte ${((i - 1) % 4) + 1} of 4` : "read"),
      update,
    );
    const buttons = page.element("div", { class: "buttons" });
    controls.append(buttons);
    const back = page.button(buttons, "Back", () => move(-1));
    const next = page.button(buttons, "Next", () => move(1));
    const input = page.drawing(stage, "98px", (svg, width) => this.drawInput(svg, width, ...now()));
    const one = page.drawing(stage, "92px", (svg, width) =>
      this.drawWord(svg, width, table, ...now()),
    );
    const output = page.drawing(stage, "98px", (svg, width) =>
      this.drawOutput(svg, width, ...now()),
    );
    const said = page.element("p", { class: "said", role: "status" });
    stage.append(said);
    const show = page.numbers(stage, names);
    update();
  },

  // The word and the byte of a step after the first.
  at(lane, step) {
    return [this.decodes(lane)[Math.floor((step - 1) / 4)], (step - 1) % 4];
  },

  say(said, show, table, lane, step) {
    if (step === 0) {
      const [first, , , end] = this.reads(lane);
      said.textContent =
        `Lane ${lane} reads words ${first} to ${end}, bytes ${4 * first} to ${4 * end + 3}, ` +
        "and puts them into shared memory. Then all lanes wait for each other.";
      show(null);
      return;
    }
    const [word, byte] = this.at(lane, step);
    const { packed, element, block, scale, codes, levels, written } = this.decode(
      table,
      word,
      byte,
    );
    said.textContent =
      `Lane ${lane} decodes word ${word}, which lane ${word >> 2} read. Its 8 codes are in block ` +
      `${block}. The 32 lanes decode words ${word - lane} to ${word - lane + 31}, so their store ` +
      "writes 512 bytes in one piece.";
    show({
      "byte read": `0x${packed.toString(16).padStart(2, "0")}`,
      codes: codes.join(", "),
      levels: levels.map((level) => level.toFixed(4)).join(", "),
      absmax: scale.toFixed(6),
      "written as bfloat16": written.map((number) => number.toFixed(4)).join(", "),
      elements: `${element}, ${element + 1}`,
    });
  },

  // The 128 words that the warp reads, four rows of 32: the columns are words, the rows stores.
  grid(svg, width, title, style) {
    const size = width / 32;
    svg.add("text", { class: "quiet", x: 0, y: 11 }, title);
    for (let word = 0; word < 128; word++) {
      const shape = {
        x: (word % 32) * size + 0.75,
        y: 18 + 20 * (word >> 5),
        width: size - 1.5,
        height: 17,
      };
      svg.add("rect", { class: style(word), rx: 2, ...shape });
    }
  },

  drawInput(svg, width, lane, step) {
    const word = step ? this.at(lane, step)[0] : -1;
    const read = this.reads(lane);
    this.grid(svg, width, "packed: 128 words of 8 codes", (each) => {
      if (each === word) return "chosen";
      if (read.includes(each)) return step ? "outlined" : "chosen";
      return !step || each >> 5 === word >> 5 ? "bar" : "empty";
    });
    svg.setAttribute("aria-label", `lane ${lane} reads words ${read.join(", ")}`);
  },

  // The four bytes of the word, their codes, and the numbers decoded so far.
  drawWord(svg, width, table, lane, step) {
    const [word, current] = step ? this.at(lane, step) : [-1, -1];
    const title = step
      ? `word ${word}: 4 bytes, 8 codes, and level × absmax`
      : "a word: 4 bytes, 8 codes";
    svg.add("text", { class: "quiet", x: 0, y: 12 }, title);
    const size = width / 8;
    for (let byte = 0; byte < 4; byte++) {
      const left = 2 * size * byte;
      svg.add("rect", {
        class: byte === current ? "chosen" : "empty",
        x: left + 1,
        y: 20,
        width: 2 * size - 2,
        height: 24,
        rx: 3,
      });
      if (!step) continue;
      const { packed, codes, written } = this.decode(table, word, byte);
      svg.add(
        "text",
        { class: "middle", x: left + size, y: 37 },
        "0x" + packed.toString(16).padStart(2, "0"),
      );
      codes.forEach((code, i) => {
        const x = left + size * (i + 0.5);
        svg.add("text", { class: "middle quiet", x, y: 64 }, code);
        if (byte <= current) svg.add("text", { class: "middle", x, y: 86 }, written[i].toFixed(2));
      });
    }
    svg.setAttribute("aria-label", step ? `byte ${current + 1} of word ${word}` : "no word yet");
  },

  drawOutput(svg, width, lane, step) {
    const [word, byte] = step ? this.at(lane, step) : [-1, 0];
    const stored = step ? Math.floor((step - 1) / 4) : -1;
    this.grid(svg, width, "out: 128 units of 8 numbers, 16 bytes each", (each) => {
      if (each === word) return "chosen";
      return each >> 5 < stored || (each >> 5 === stored && byte === 3) ? "bar" : "empty";
    });
    svg.setAttribute(
      "aria-label",
      step ? `lane ${lane} writes unit ${word}` : "nothing is written yet",
    );
  },
};
