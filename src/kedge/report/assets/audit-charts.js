"use strict";
// Charts of an audit: steps over powers of ten, and means by position with their bands.
Kedge.auditCharts = (() => {
  const { figure, tick, node } = Kedge.format;
  const { axes, padded } = Kedge.axes;
  const state = Kedge.state;

  const swatch = (colour) => node("i", "swatch c" + colour);

  function frame(chart) {
    const element = node("figure", "chart");
    const head = node("div", "chart-head");
    const unit = node("span");
    const where = node("span", "at");
    const legend = node("div", "legend");
    const plot = node("div", "plot");
    head.append(node("h3", "", chart.title), unit, where);
    element.append(head, legend, plot);
    return { element, unit, where, legend, plot };
  }

  function legend(element, chart, value) {
    element.replaceChildren(
      ...chart.lines.map((line) => {
        const item = node("span", "c" + line.colour);
        item.append(swatch(line.colour), line.quantity, node("b", "", value(line)));
        return item;
      }),
    );
  }

  function create(chart) {
    const parts = frame(chart);
    const kind = chart.kind === "bins" ? bins : position;
    let u = null;

    function build() {
      parts.unit.textContent = [state.unitName(chart.unit), chart.note].filter(Boolean).join(" · ");
      if (u) u.destroy();
      const drawn = kind(chart, parts);
      const options = {
        width: parts.plot.clientWidth,
        height: parts.plot.clientHeight,
        padding: [8, 14, 0, 0],
        legend: { show: false },
        ...drawn.options,
        cursor: { y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
        hooks: {
          draw: [drawn.draw || (() => {})],
          setCursor: [(self) => drawn.read(self.cursor.left >= 0 ? self.cursor.idx : null)],
        },
      };
      drawn.read(null);
      u = new uPlot(options, drawn.data, parts.plot);
    }

    state.listen((change) => {
      if (change === "view") build();
    });
    new ResizeObserver(() => {
      if (u) u.setSize({ width: parts.plot.clientWidth, height: parts.plot.clientHeight });
    }).observe(parts.plot);
    return parts.element;
  }

  // Steps over the logarithm of the KL; the unit moves them sideways.
  function bins(chart, parts) {
    const shift = Math.log10(state.factor("nats"));
    const edges = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const columns = chart.lines.map((line) => {
      const values = new Map(line.x.map((x, i) => [x, line.y[i] === undefined ? 0 : line.y[i]]));
      return edges.map((edge) => (values.has(edge) ? values.get(edge) : 0));
    });
    const [bottom, left] = axes(false);
    const power = (value) => tick(10 ** value).replace("e-", "e−");
    return {
      data: [edges.map((edge) => edge + shift), ...columns],
      options: {
        scales: {
          x: { time: false, range: [Math.floor(edges[0] + shift), Math.ceil(edges[edges.length - 1] + shift)] },
          y: { range: (u, low, high) => [0, Math.max(1e-3, high) * 1.07] },
        },
        axes: [{ ...bottom, incrs: [1, 2, 3], space: 44, values: (u, splits) => splits.map(power) }, left],
        series: [
          {},
          ...chart.lines.map((line) => ({
            stroke: state.colour(line.colour),
            fill: state.colour(line.colour) + "1c",
            width: 1.5,
            paths: uPlot.paths.stepped({ align: 1 }),
            points: { show: false },
          })),
        ],
      },
      draw: (u) => means(u, chart, shift),
      read(index) {
        const inside = index !== null && index !== undefined && index < edges.length;
        parts.where.textContent = inside ? `from ${tick(10 ** (edges[index] + shift))} ${state.unit}` : "";
        legend(parts.legend, chart, (line) => {
          if (!inside) return "mean " + figure(line.mean === null ? null : line.mean * state.factor("nats"));
          return figure(columns[chart.lines.indexOf(line)][index]) + " %";
        });
      },
    };
  }

  function means(u, chart, shift) {
    u.ctx.save();
    u.ctx.lineWidth = 1.25 * devicePixelRatio;
    u.ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const line of chart.lines) {
      if (!(line.mean > 0)) continue;
      const x = Math.round(u.valToPos(Math.log10(line.mean) + shift, "x", true)) + 0.5;
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      u.ctx.strokeStyle = state.colour(line.colour);
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    }
    u.ctx.restore();
  }

  function position(chart, parts) {
    const factor = state.factor("nats");
    const scaled = (values) => values.map((value) => (value === null ? null : value * factor));
    const x = chart.lines[0].x;
    const data = [x];
    const series = [{}];
    const bands = [];
    for (const line of chart.lines) {
      const colour = state.colour(line.colour);
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      bands.push({ series: [data.length + 1, data.length], fill: colour + "26" });
      data.push(scaled(line.low), scaled(line.high), scaled(line.y));
      series.push(edge, { ...edge }, { stroke: colour, width: 1.75, points: { show: x.length === 1, size: 6 } });
    }
    return {
      data,
      options: {
        scales: {
          x: { time: false, range: [Math.min(0, x[0]), Math.max(x[0] + 1, x[x.length - 1])] },
          y: { range: (u, low, high) => (low === null ? [0, 1] : [0, padded(0, high)[1]]) },
        },
        axes: axes(false),
        series,
        bands,
      },
      read(index) {
        const inside = index !== null && index !== undefined;
        parts.where.textContent = inside
          ? `at ${tick(Math.floor(x[index]))}, n = ${chart.tokens[index].toLocaleString("en")}`
          : "";
        legend(parts.legend, chart, (line) => {
          if (!inside || line.y[index] === null) return "";
          const half = line.high[index] === null ? "" : ` ± ${figure((line.high[index] - line.y[index]) * factor)}`;
          return figure(line.y[index] * factor) + half;
        });
      },
    };
  }

  return { create };
})();
