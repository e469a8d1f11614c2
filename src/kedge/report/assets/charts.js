"use strict";
// Charts over steps: one uPlot each, with a shared cursor and a shared zoom.
Kedge.charts = (() => {
  const { figure, node } = Kedge.format;
  const { axes, padded, paddedLog } = Kedge.axes;
  const state = Kedge.state;
  const LABELS = { solid: "training", points: "held out", dash: "budget" };

  // Exponential moving average that starts without bias; gaps stay gaps.
  function smoothed(values, weight) {
    let average = 0;
    let total = 0;
    return values.map((value) => {
      if (value === null) return null;
      average = weight * average + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return average / total;
    });
  }

  function spread(chart) {
    const values = chart.lines.flatMap((line) => line.y).filter((value) => value > 0);
    return values.length ? Math.max(...values) / Math.min(...values) : 1;
  }

  // All lines on one axis of steps; undefined: this line has no such step; null: it has, without a value.
  function align(lines) {
    const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const place = new Map(steps.map((step, index) => [step, index]));
    const columns = lines.map((line) => {
      const column = new Array(steps.length).fill(undefined);
      line.x.forEach((step, index) => (column[place.get(step)] = line.y[index]));
      return column;
    });
    return [steps, ...columns];
  }

  // The lines to draw: in the unit chosen, smoothed ones above their faint originals, constants to the end.
  function drawn(chart, log, end) {
    const factor = state.factor(chart.unit);
    const found = [];
    for (const line of chart.lines) {
      const scale = (value) => (value === null || (log && value <= 0) ? null : value * factor);
      const scaled = { ...line, y: line.y.map(scale), error: line.error && line.error.map(scale) };
      if (state.smooth > 0 && line.style === "solid") {
        found.push({ ...scaled, faint: true }, { ...scaled, y: smoothed(scaled.y, state.smooth) });
      } else if (line.style === "points") {
        found.push({ ...scaled, alone: !chart.lines.some((other) => other.run === line.run && other.style === "solid") });
      } else {
        const constant = line.style === "dash";
        found.push(constant ? { ...scaled, x: [...line.x, end], y: [...scaled.y, lastOf(scaled.y)] } : scaled);
      }
    }
    return found;
  }

  function series(line) {
    const colour = state.colour(line.run);
    const points = line.style === "points";
    return {
      show: state.shown(line.run),
      stroke: line.faint ? colour + "40" : colour,
      width: points ? 1 : line.style === "solid" && !line.faint ? 1.75 : 1.25,
      dash: { dash: [6, 4], dot: [2, 3] }[line.style],
      points: { show: points || line.x.length === 1, size: 6, width: 1.5, stroke: colour, fill: state.css("--bg") },
      alpha: line.style === "dash" ? 0.85 : 1,
      paths: points && !line.alone ? () => null : undefined,
    };
  }

  const within = (u, step) => step >= u.scales.x.min && step <= u.scales.x.max;

  function whiskers(lines) {
    return (u, index) => {
      const line = lines[index - 1];
      if (!line || !line.error || !state.shown(line.run)) return;
      u.ctx.save();
      u.ctx.strokeStyle = state.colour(line.run);
      u.ctx.lineWidth = devicePixelRatio;
      u.ctx.globalAlpha = 0.55;
      u.ctx.beginPath();
      line.x.forEach((step, i) => {
        if (line.y[i] === null || !line.error[i] || !within(u, step)) return;
        const x = Math.round(u.valToPos(step, "x", true)) + 0.5;
        u.ctx.moveTo(x, u.valToPos(line.y[i] - line.error[i], "y", true));
        u.ctx.lineTo(x, u.valToPos(line.y[i] + line.error[i], "y", true));
      });
      u.ctx.stroke();
      u.ctx.restore();
    };
  }

  // A linear axis: room above, down to zero where that is near; standard errors fit in.
  const linear = (lines) => (u, low, high) => {
    const ends = lines
      .filter((line) => line.error && state.shown(line.run))
      .flatMap((line) =>
        line.y.flatMap((y, i) => (y === null || !within(u, line.x[i]) ? [] : [y - line.error[i], y + line.error[i]])),
      );
    return low === null ? [0, 1] : padded(Math.min(low, ...ends), Math.max(high, ...ends));
  };

  // The value of a line at a step: the last one at or before it, none after the line's end.
  function at(line, step) {
    if (step === null) return lastOf(line.y);
    if (step > line.x[line.x.length - 1] && line.style !== "dash") return null;
    let found = null;
    for (let i = 0; i < line.x.length && line.x[i] <= step; i++) found = line.y[i];
    return found;
  }

  function lastOf(values) {
    for (let i = values.length - 1; i >= 0; i--) if (values[i] !== null) return values[i];
    return null;
  }

  function legend(element, chart, step) {
    const factor = state.factor(chart.unit);
    const value = (line) => {
      const found = at(line, step);
      return found === null ? figure(null) : figure(found * factor);
    };
    const runs = [...new Set(chart.lines.map((line) => line.run))];
    const styles = new Set(chart.lines.map((line) => line.style));
    element.replaceChildren();
    if (runs.length === 1) {
      for (const line of chart.lines) {
        const item = entry(element, line.run, line.style);
        if (chart.lines.length > 1) item.append(label(line));
        item.append(node("b", "", value(line)));
      }
      return;
    }
    for (const run of runs.filter(state.shown)) {
      const lines = chart.lines.filter((line) => line.run === run && line.style !== "dash");
      if (!lines.length) continue;
      const item = entry(element, run, lines[0].style);
      item.append(state.data.runs[run].name);
      lines.forEach((line, index) => {
        if (line.style !== "points") item.append(node("b", "", value(line)));
        else if (index === 0 || line.x.includes(step)) item.append(node("b", "eval", value(line)));
      });
    }
    if (styles.size > 1) {
      for (const style of styles) {
        if (style === "solid") continue;
        const item = node("span", "key");
        item.append(node("i", "swatch s-" + style), label(chart.lines.find((line) => line.style === style)));
        element.append(item);
      }
    }
  }

  const label = (line) => (line.style === "points" ? LABELS.points : line.quantity || LABELS[line.style]);

  function entry(element, run, style) {
    const item = node("span", "c" + (run % 8));
    item.append(node("i", "swatch s-" + style));
    element.append(item);
    return item;
  }

  function create(chart, group, full) {
    const figureElement = node("figure", "chart");
    const head = node("div", "chart-head");
    const unit = node("span");
    const where = node("span", "at");
    const logarithmic = node("button", "log", "log");
    logarithmic.type = "button";
    logarithmic.addEventListener("click", () => {
      log = !log;
      build();
    });
    head.append(node("h3", "", chart.title), unit, where, logarithmic);
    const legendElement = node("div", "legend");
    const plot = node("div", "plot");
    figureElement.append(head, legendElement, plot);
    let u = null;
    let log = chart.log && spread(chart) > 5;

    function build() {
      logarithmic.hidden = !(log || spread(chart) > 3);
      logarithmic.setAttribute("aria-pressed", String(log));
      const lines = drawn(chart, log, full[1]);
      unit.textContent = [state.unitName(chart.unit), chart.note].filter(Boolean).join(" · ");
      legend(legendElement, chart, null);
      if (u) u.destroy();
      u = new uPlot(options(lines), align(lines), plot);
    }

    function options(lines) {
      return {
        width: plot.clientWidth,
        height: plot.clientHeight,
        padding: [8, 14, 0, 0],
        legend: { show: false },
        cursor: {
          y: false,
          points: {
            size: (self, index) => (lines[index - 1].style === "solid" && !lines[index - 1].faint ? 6 : 0),
            fill: (self, index) => state.colour(lines[index - 1].run),
            width: 0,
          },
          drag: { x: true, y: false, setScale: false },
          sync: { key: "steps-" + group, scales: ["x", null], setSeries: false },
          bind: { dblclick: () => () => zoom(group, null) },
        },
        scales: {
          x: { time: false, range: () => state.zoom[group] || full },
          y: log ? { distr: 3, range: (u, low, high) => paddedLog(low, high) } : { range: linear(lines) },
        },
        axes: axes(log),
        series: [{}, ...lines.map(series)],
        hooks: {
          drawSeries: [whiskers(lines)],
          setCursor: [
            (self) => {
              const index = self.cursor.left >= 0 ? self.cursor.idx : null;
              const step = index === null || index === undefined ? null : self.data[0][index];
              where.textContent = step === null ? "" : "step " + step.toLocaleString("en");
              legend(legendElement, chart, step);
            },
          ],
          setSelect: [
            (self) => {
              if (self.select.width < 4) return;
              const low = self.posToVal(self.select.left, "x");
              const high = self.posToVal(self.select.left + self.select.width, "x");
              self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
              zoom(group, [low, high]);
            },
          ],
        },
      };
    }

    state.listen((change) => {
      if (change === "zoom") u.setScale("x", { min: 0, max: 1 });
      else build();
    });
    new ResizeObserver(() => u.setSize({ width: plot.clientWidth, height: plot.clientHeight })).observe(plot);
    return figureElement;
  }

  function zoom(group, range) {
    state.zoom[group] = range;
    state.tell("zoom");
  }

  function section(data) {
    const element = node("section");
    element.append(node("h2", "", data.title));
    const grid = node("div", "chart-grid");
    const lines = data.charts.flatMap((chart) => chart.lines);
    const group = state.data.runs[lines[0].run].kind;
    const peers = state.data.sections.flatMap((other) => other.charts).filter((chart) => chart.kind === "steps");
    const steps = peers
      .flatMap((chart) => chart.lines)
      .filter((line) => state.data.runs[line.run].kind === group)
      .flatMap((line) => [line.x[0], line.x[line.x.length - 1]]);
    const low = Math.min(...steps);
    const full = [low, Math.max(low + 1, ...steps)];
    for (const chart of data.charts) {
      grid.append(chart.kind === "steps" ? create(chart, group, full) : Kedge.frontier.create(chart));
    }
    element.append(grid);
    return element;
  }

  return { section, legendEntry: entry, zoom };
})();
