"use strict";
// What the reader has chosen, and who must hear of it.
Kedge.state = (() => {
  const listeners = [];
  const state = {
    unit: "nats",
    smooth: 0,
    hidden: new Set(),
    zoom: {},
    data: JSON.parse(document.getElementById("data").textContent),

    listen(listener) {
      listeners.push(listener);
    },
    // change: "view" (rebuild what is drawn), "runs" (which runs are shown), "zoom"
    tell(change) {
      for (const listener of listeners) listener(change);
    },
    shown(run) {
      return run === null || !state.hidden.has(run);
    },
    // nats → the unit chosen; other units stay as they are
    factor(unit) {
      return unit.startsWith("nats") && state.unit === "bits" ? 1 / Math.LN2 : 1;
    },
    unitName(unit) {
      return unit.startsWith("nats") && state.unit === "bits" ? unit.replace("nats", "bits") : unit;
    },
    colour(run) {
      return getComputedStyle(document.documentElement).getPropertyValue("--c" + (run % 8)).trim();
    },
    css(name) {
      return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    },
  };
  return state;
})();
