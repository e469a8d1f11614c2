"use strict";
// The page about runs: what stands where, and its own controls.
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

  document.getElementById("smooth").addEventListener("input", (event) => {
    state.smooth = Number(event.target.value);
    state.tell("view");
  });

  const reset = document.getElementById("zoom");
  reset.addEventListener("click", () => {
    state.zoom = {};
    state.tell("zoom");
  });
  state.listen(() => {
    reset.hidden = !Object.values(state.zoom).some(Boolean);
  });

  state.tell("view"); // everything has its place: draw
})();
