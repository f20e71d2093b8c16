// Slides: the arrow keys go to the next and the previous section, as a presenter's remote does.
"use strict";

page.turn = function (event) {
  const steps = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1 };
  // A slider, a choice or a list needs these keys itself.
  if (!(event.key in steps) || event.target.matches("input, select")) return;
  event.preventDefault();
  const slides = [...document.querySelectorAll(".slide")];
  const isPast = (slide) => slide.getBoundingClientRect().top < innerHeight / 2;
  const at = slides.findLastIndex(isPast);
  const next = Math.min(Math.max(at + steps[event.key], 0), slides.length - 1);
  slides[next].scrollIntoView({ behavior: "instant" });
};

document.addEventListener("keydown", page.turn);
document.documentElement.classList.add("slides");
