"use strict";
// Controls that every page has: nats or bits, light or dark.
(() => {
  const { fixed } = Kedge.format;
  const state = Kedge.state;

  document.getElementById("unit").addEventListener("click", (event) => {
    const unit = event.target.dataset.value;
    if (!unit || unit === state.unit) return;
    state.unit = unit;
    for (const button of event.currentTarget.children) {
      button.setAttribute("aria-pressed", String(button.dataset.value === unit));
    }
    state.tell("view");
  });

  // The tables are written in nats; in bits, their cells are worked out from the values beside them.
  const written = new Map();
  for (const element of document.querySelectorAll("[data-unit], [data-nats]")) {
    written.set(element, element.textContent);
  }
  state.listen((change) => {
    if (change !== "view") return;
    for (const [element, text] of written) {
      const value = Number(element.dataset.nats);
      if (element.dataset.unit) element.textContent = state.unitName(element.dataset.unit);
      else if (state.unit === "nats" || !Number.isFinite(value) || value === 0) element.textContent = text;
      else element.textContent = fixed(value * state.factor("nats"), Number(element.dataset.decimals));
    }
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    state.tell("view");
  });
  dark.addEventListener("change", () => state.tell("view"));
})();
