"use strict";
// Rewards against distance: each run's way through the plane, evaluation by evaluation.
Kedge.frontier = (() => {
  const { figure, node } = Kedge.format;
  const state = Kedge.state;

  function create(chart) {
    const element = node("figure", "chart");
    const head = node("div", "chart-head");
    const unit = node("span");
    const where = node("span", "at");
    head.append(node("h3", "", chart.title), unit, where);
    const legend = node("div", "legend");
    const plot = node("div", "plot");
    const ring = node("div", "ring");
    element.append(head, legend, plot);
    let u = null;

    const factor = () => Math.sqrt(state.factor("nats"));
    const shown = () => chart.lines.filter((line) => state.shown(line.run));

    function build() {
      unit.textContent = chart.unit + (state.unit === "bits" ? ", √bits" : ", √nats");
      name(null, null);
      if (u) u.destroy();
      const data = [null, ...chart.lines.map((line) => [line.x.map((x) => x * factor()), line.y])];
      u = new uPlot(options(), data, plot);
      ring.hidden = true;
      u.over.append(ring);
      u.over.addEventListener("mousemove", (event) => point(event.offsetX, event.offsetY));
      u.over.addEventListener("mouseleave", () => point(null, null));
    }

    function options() {
      const x = shown().flatMap((line) => line.x.map((value) => value * factor()));
      const y = shown().flatMap((line) => line.y);
      const low = Math.min(0, ...y);
      const high = Math.max(low + 1e-6, ...y);
      return {
        mode: 2,
        width: plot.clientWidth,
        height: plot.clientHeight,
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: { x: false, y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
        scales: {
          x: { time: false, range: () => [0, Math.max(1e-6, ...x) * 1.06] },
          y: { range: () => [low - (low < 0 ? 0.07 : 0) * (high - low), high + 0.07 * (high - low)] },
        },
        axes: Kedge.axes.axes(false),
        series: [null, ...chart.lines.map((line) => ({ stroke: state.colour(line.run), paths: path(line) }))],
      };
    }

    function path(line) {
      return (self) => {
        if (!state.shown(line.run)) return null;
        const c = self.ctx;
        const place = line.x.map((x, i) => [
          self.valToPos(x * factor(), "x", true),
          self.valToPos(line.y[i], "y", true),
        ]);
        c.save();
        c.strokeStyle = c.fillStyle = state.colour(line.run);
        c.lineWidth = 1.25 * devicePixelRatio;
        c.globalAlpha = 0.55;
        c.beginPath();
        place.forEach(([x, y]) => c.lineTo(x, y));
        c.stroke();
        c.globalAlpha = 1;
        place.forEach(([x, y], i) => {
          c.beginPath();
          c.arc(x, y, (i === place.length - 1 ? 4.5 : 2.5) * devicePixelRatio, 0, 2 * Math.PI);
          c.fill();
        });
        c.restore();
        return null;
      };
    }

    function point(left, top) {
      let best = { distance: left === null ? 0 : 28 ** 2 };
      for (const line of left === null ? [] : shown()) {
        line.x.forEach((value, i) => {
          const x = u.valToPos(value * factor(), "x");
          const y = u.valToPos(line.y[i], "y");
          const distance = (x - left) ** 2 + (y - top) ** 2;
          if (distance < best.distance) best = { distance, line, i, x, y };
        });
      }
      ring.hidden = best.line === undefined;
      if (best.line) {
        ring.className = "ring c" + (best.line.run % 8);
        ring.style.left = best.x + "px";
        ring.style.top = best.y + "px";
      }
      name(best.line, best.i);
    }

    function name(line, index) {
      where.textContent = line ? "step " + line.step[index].toLocaleString("en") : "";
      legend.replaceChildren();
      for (const each of line ? [line] : shown()) {
        const item = Kedge.charts.legendEntry(legend, each.run, "path");
        item.append(state.data.runs[each.run].name);
        const i = line ? index : each.y.length - 1;
        item.append(node("b", "", figure(each.y[i])));
        if (line) item.append(" at √KL", node("b", "", figure(each.x[i] * factor())));
      }
    }

    state.listen((change) => {
      if (change !== "zoom") build();
    });
    new ResizeObserver(() => u.setSize({ width: plot.clientWidth, height: plot.clientHeight })).observe(plot);
    return element;
  }

  return { create };
})();
