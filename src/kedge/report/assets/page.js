"use strict";
// The page's own controls.
(() => {
  const { node } = Kedge.format;
  const state = Kedge.state;

  for (const section of state.data.sections) {
    document.getElementById(section.detail ? "details" : "charts").append(Kedge.charts.section(section));
  }
  if (state.data.samples.rows.length) {
    document.getElementById("samples").append(Kedge.samples.section(state.data.samples));
  }

  const toggles = document.getElementById("toggles");
  state.data.runs.forEach((run, index) => {
    const button = node("button", "toggle c" + (index % 8));
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(node("i", "dot"), run.name);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(index)) state.hidden.add(index);
      button.setAttribute("aria-pressed", String(state.shown(index)));
      state.tell("runs");
    });
    toggles.append(button);
  });

  document.getElementById("unit").addEventListener("click", (event) => {
    const unit = event.target.dataset.value;
    if (!unit || unit === state.unit) return;
    state.unit = unit;
    for (const button of event.currentTarget.children) {
      button.setAttribute("aria-pressed", String(button.dataset.value === unit));
    }
    state.tell("view");
  });

  document.getElementById("smooth").addEventListener("input", (event) => {
    state.smooth = Number(event.target.value);
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
      else element.textContent = (value * state.factor("nats")).toFixed(Number(element.dataset.decimals));
    }
  });

  const reset = document.getElementById("zoom");
  reset.addEventListener("click", () => {
    state.zoom = {};
    state.tell("zoom");
  });
  state.listen(() => {
    reset.hidden = !Object.values(state.zoom).some(Boolean);
  });

  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    state.tell("view");
  });
  dark.addEventListener("change", () => state.tell("view"));

  state.tell("view"); // everything has its place: draw
})();
