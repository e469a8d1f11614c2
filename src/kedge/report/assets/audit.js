"use strict";
// The page about an audit: what stands where, and its own controls.
(() => {
  const state = Kedge.state;
  state.direction = "reverse_kl";

  for (const element of document.querySelectorAll("[data-charts]")) {
    const { charts } = state.data.questions[element.dataset.charts];
    element.append(...charts.filter((chart) => chart.lines.length).map(Kedge.auditCharts.create));
  }
  for (const element of document.querySelectorAll("[data-responses]")) {
    element.append(Kedge.auditResponses.section(state.data.questions[element.dataset.responses].responses));
  }

  document.getElementById("direction").addEventListener("click", (event) => {
    const direction = event.target.dataset.value;
    if (!direction || direction === state.direction) return;
    state.direction = direction;
    for (const button of event.currentTarget.children) {
      button.setAttribute("aria-pressed", String(button.dataset.value === direction));
    }
    state.tell("direction");
  });

  state.tell("view"); // everything has its place: draw
})();
