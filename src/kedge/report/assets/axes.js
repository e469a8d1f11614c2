"use strict";
// Axes as every chart has them: what stands at them, where they begin and end.
Kedge.axes = (() => {
  const { tick } = Kedge.format;
  const state = Kedge.state;

  function axes(log) {
    const base = {
      stroke: state.css("--muted"),
      grid: { stroke: state.css("--grid"), width: 1 },
      ticks: { show: false },
      font: "11px " + state.css("--sans"),
    };
    const left = { ...base, grid: { ...base.grid }, size: 46, gap: 4, space: 34, values: (u, splits) => splits.map(tick) };
    if (log) left.filter = left.grid.filter = logarithmicTicks;
    return [{ ...base, size: 24, gap: 4, space: 60, values: (u, splits) => splits.map(tick) }, left];
  }

  // Over a few decades 1, 2 and 5 times each power of ten; over more, the powers alone.
  function logarithmicTicks(u, splits) {
    const wide = u.scales.y.max / u.scales.y.min > 300;
    return splits.map((value) => {
      const digit = Math.round(value / 10 ** Math.floor(Math.log10(value) + 1e-9));
      return digit === 1 || (!wide && (digit === 2 || digit === 5)) ? value : null;
    });
  }

  function padded(low, high) {
    const room = high - low || Math.abs(high) || 1;
    const bottom = low >= 0 && low - 0.5 * room <= 0 ? 0 : low - 0.07 * room;
    return [bottom, high + 0.07 * room];
  }

  // Logarithmic axes begin and end at 1, 2 or 5 times a power of ten, less than four powers apart.
  function paddedLog(low, high) {
    if (low === null) return [0.1, 1];
    const round = (value, up) => {
      const power = 10 ** Math.floor(Math.log10(value));
      const steps = [1, 2, 5, 10].map((step) => step * power);
      return up ? steps.find((step) => step >= value * 0.999) : steps.findLast((step) => step <= value * 1.001);
    };
    const bottom = round(low / 1.1, false);
    const top = Math.max(round(high * 1.1, true), bottom * 2);
    return [Math.max(bottom, top / 5000), top];
  }

  return { axes, padded, paddedLog };
})();
