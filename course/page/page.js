// What the widgets share: controls, numbers, drawings. A widget is an object with two parts:
//   mount(root, table)   fills an empty element; `table` is what course/page/export.py made for it
//   other functions      the formulas, which the tests compare with the Python code
"use strict";

const page = { widgets: {} };

page.mount = function (name) {
  const tables = JSON.parse(document.getElementById("tables").textContent);
  page.widgets[name].mount(document.getElementById("widget-" + name), tables[name]);
};

// element("p", {class: "note"}, "text", child): an HTML element.
page.element = function (tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// Shape of a widget: a title, controls, what it shows, a sentence on how to use it.
page.frame = function (root, title, hint) {
  const controls = page.element("div", { class: "controls" });
  const stage = page.element("div", { class: "stage" });
  root.setAttribute("aria-label", title);
  root.append(page.element("h3", {}, title), page.element("p", { class: "hint" }, hint));
  root.append(controls, stage);
  return { controls, stage };
};

// A slider whose value `say` puts into words. Returns the <input>.
page.slider = function (parent, label, range, say, changed) {
  const id = "slider-" + document.querySelectorAll("input").length;
  const input = page.element("input", { type: "range", id, ...range });
  const value = page.element("output", { for: id });
  const name = page.element("label", { for: id }, label);
  parent.append(page.element("div", { class: "slider" }, name, value, input));
  input.say = function () {
    value.textContent = say(Number(input.value));
    input.setAttribute("aria-valuetext", value.textContent);
  };
  input.say();
  input.addEventListener("input", function () {
    input.say();
    changed();
  });
  return input;
};

page.checkbox = function (parent, label, checked, changed) {
  const input = page.element("input", { type: "checkbox" });
  input.checked = checked;
  input.addEventListener("change", changed);
  parent.append(page.element("label", { class: "check" }, input, label));
  return input;
};

// One of several values, as radio buttons in a row. Returns {value}, kept up to date.
page.choice = function (parent, label, values, changed) {
  const group = page.element("fieldset", { class: "choice" }, page.element("legend", {}, label));
  const state = { value: values[0] };
  const name = "choice-" + document.querySelectorAll("fieldset").length + "-" + label;
  for (const value of values) {
    const input = page.element("input", { type: "radio", name, value });
    input.checked = value === state.value;
    input.addEventListener("change", function () {
      state.value = value;
      changed();
    });
    group.append(page.element("label", {}, input, page.element("span", {}, value)));
  }
  parent.append(group);
  return state;
};

page.select = function (parent, label, values, changed) {
  const select = page.element("select", {});
  for (const value of values) select.append(page.element("option", { value }, value));
  select.addEventListener("change", changed);
  parent.append(
    page.element("label", { class: "select" }, page.element("span", {}, label), select),
  );
  return select;
};

page.button = function (parent, label, pressed) {
  const button = page.element("button", { type: "button" }, label);
  button.addEventListener("click", pressed);
  parent.append(button);
  return button;
};

// Named numbers. Returns a function that shows {name: text}, or a dash for each if it gets null.
page.numbers = function (parent, names) {
  const list = page.element("dl", { class: "numbers" });
  const cells = {};
  for (const name of names) {
    cells[name] = page.element("dd", { "data-name": name });
    list.append(page.element("div", {}, page.element("dt", {}, name), cells[name]));
  }
  parent.append(list);
  return function (values) {
    for (const name of names) {
      if (!values) cells[name].textContent = "–";
      else if (name in values) cells[name].textContent = values[name];
    }
  };
};

// What colours mean: [[style, text], ...]. The styles are those of the shapes in style.css.
page.legend = function (parent, entries) {
  const legend = page.element("p", { class: "legend" });
  for (const [style, text] of entries) {
    const swatch = page.element("span", { class: "swatch " + style });
    legend.append(page.element("span", {}, swatch, text));
  }
  parent.append(legend);
};

// A drawing as wide as its parent and of a height in CSS, drawn again when its size changes.
// draw(svg, width, height) adds shapes by svg.add(tag, attributes, text).
page.drawing = function (parent, height, draw) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("role", "img");
  svg.style.height = height;
  parent.append(svg);
  svg.add = function (tag, attributes, text) {
    const shape = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) {
      shape.setAttribute(name, typeof value === "number" ? Math.round(value * 100) / 100 : value);
    }
    if (text !== undefined) shape.textContent = text;
    svg.append(shape);
    return shape;
  };
  svg.redraw = function () {
    svg.replaceChildren();
    const { clientWidth: width, clientHeight: height } = svg;
    if (width) draw(svg, width, height); // 0 in a window that is not shown
  };
  window.addEventListener("resize", svg.redraw);
  return svg;
};

// The integer with commas between thousands.
page.integer = function (number) {
  return number.toLocaleString("en-US");
};

page.gigabytes = function (bytes) {
  return (bytes / 1e9).toFixed(3) + " GB";
};

// Light, dark or as the system: what the reader chose is kept.
page.theme = function () {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const button = document.getElementById("theme");
  const say = function () {
    button.textContent = isDark() ? "Light" : "Dark";
  };
  button.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    page.remember("theme", root.dataset.theme);
    say();
  });
  system.addEventListener("change", say);
  say();
};

// Some browsers have no storage for files; then nothing is kept.
page.remember = function (name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    return;
  }
};

page.recall = function (name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
};

if (page.recall("theme")) document.documentElement.dataset.theme = page.recall("theme");
document.addEventListener("DOMContentLoaded", page.theme);
