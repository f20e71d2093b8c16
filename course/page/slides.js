// Slides: the arrow keys go to the next and the previous section, as a presenter's remote does.
// What is longer than the window is scrolled through first.
"use strict";

page.turn = function (event) {
  const steps = { ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1 };
  // A slider, a choice or a list needs these keys itself.
  if (!(event.key in steps) || event.target.matches("input, select")) return;
  event.preventDefault();
  const slides = [...document.querySelectorAll(".slide")];
  const isPast = (slide) => slide.getBoundingClientRect().top < innerHeight / 2;
  const at = slides.findLastIndex(isPast);
  const { top, bottom } = slides[at].getBoundingClientRect();
  const left = steps[event.key] > 0 ? bottom - innerHeight : top; // of this slide
  if (left * steps[event.key] > 1) {
    const most = 0.8 * innerHeight;
    scrollBy({ top: Math.max(-most, Math.min(most, left)), behavior: "instant" });
    return;
  }
  const next = Math.min(Math.max(at + steps[event.key], 0), slides.length - 1);
  slides[next].scrollIntoView({ behavior: "instant" });
};

document.addEventListener("keydown", page.turn);
document.documentElement.classList.add("slides");
