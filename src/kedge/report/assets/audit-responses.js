"use strict";
// Responses and texts of an audit, token by token, with everything that is known of each.
Kedge.auditResponses = (() => {
  const { figure, write, quoted, node } = Kedge.format;
  const { list, shade, scaleBar, explain } = Kedge.tokens;
  const state = Kedge.state;
  const PAIRS = { reverse_kl: "KL(policy ‖ reference)", forward_kl: "KL(reference ‖ policy)" };
  const FIRST = 6;
  const MORE = 24;

  const nats = (value) => figure(value === null ? null : value * state.factor("nats"));

  function section(table) {
    const element = node("div");
    const many = table.rows.length > 1;
    let shown = FIRST;
    let order = "data";

    function build() {
      const head = node("div", "samples-head");
      head.append(node("h3", "", "Token by token"), note(table));
      if (many) head.append(sorting());
      head.append(scaleBar(table.scale));
      const rows = [...table.rows];
      if (order === "kl") rows.sort((a, b) => b.means[state.direction] - a.means[state.direction]);
      element.replaceChildren(head, ...rows.slice(0, shown).map((row) => sample(row, table)));
      if (rows.length > shown) element.append(more(rows.length));
    }

    function sorting() {
      const group = node("div", "switch");
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", "Order");
      for (const [value, text] of [["data", "in order"], ["kl", "largest KL first"]]) {
        const button = node("button", "", text);
        button.type = "button";
        button.setAttribute("aria-pressed", String(value === order));
        button.addEventListener("click", () => {
          order = value;
          build();
        });
        group.append(button);
      }
      return group;
    }

    function more(count) {
      const button = node("button", "more", `Show ${Math.min(MORE, count - shown)} more of ${count}`);
      button.type = "button";
      button.addEventListener("click", () => {
        shown += MORE;
        build();
      });
      return button;
    }

    state.listen((change) => {
      if (change === "view" || change === "direction") build();
    });
    explain(element, (span) => describe(table, span));
    return element;
  }

  function note(table) {
    const unit = table.cluster === "text" ? "windows" : "responses";
    const tokens = table.rows.reduce((sum, row) => sum + row.text.length, 0);
    const count = (value) => value.toLocaleString("en");
    if (table.rows.length === table.total && tokens === table.total_tokens) {
      return node("span", "note", `all ${count(table.total)} ${unit}`);
    }
    return node(
      "span",
      "note",
      `${count(table.rows.length)} of ${count(table.total)} ${unit}, ${count(tokens)} of ${count(table.total_tokens)} ` +
        "tokens: those of the largest KL, then the first ones; all are in tokens.parquet",
    );
  }

  function sample(row, table) {
    const element = node("article", "sample");
    const name = table.cluster === "text" ? "window" : "response";
    const head = node("div", "cell-head");
    const title = `${table.cluster} ${row.cluster + 1} · ${name} ${row.nth + 1}`;
    head.append(title, node("span", "", `${row.count.toLocaleString("en")} tokens`));
    for (const [pair, title] of Object.entries(PAIRS)) {
      head.append(node("span", "", `${title} ${nats(row.means[pair])}`));
    }
    element.append(head);
    if (table.texts[row.before]) {
      const before = node("div", "prompt");
      before.dir = "auto";
      element.append(write(before, table.texts[row.before]));
    }
    element.append(tokens(row, table));
    return element;
  }

  function tokens(row, table) {
    const spans = row.text.map((place, index) => {
      const span = node("span");
      const text = table.texts[place];
      write(span, text);
      if (text === "") span.className = "part";
      else if (/^\s*\n\s*$/.test(text)) span.className = "newline";
      const kl = row[state.direction][index];
      if (kl !== null) span.style.backgroundColor = shade(kl, table.scale);
      span.dataset.index = index;
      return span;
    });
    const element = list(spans);
    element.dataset.row = table.rows.indexOf(row);
    if (row.count > spans.length) {
      element.append(node("em", "", ` + ${(row.count - spans.length).toLocaleString("en")} tokens`));
    }
    return element;
  }

  function describe(table, span) {
    const row = table.rows[span.parentNode.dataset.row];
    const index = Number(span.dataset.index);
    const text = table.texts[row.text[index]];
    const head = node("div", "tip-head");
    if (text) head.append(node("code", "", quoted(text)));
    else head.append("part of a character");
    head.append(` id ${row.id[index]}, position ${index.toLocaleString("en")}`);
    const grid = node("dl");
    const line = (name, ...values) => {
      grid.append(node("dt", "", name));
      for (const value of values) {
        const cell = node("dd");
        cell.append(value);
        grid.append(cell);
      }
    };
    line("", "policy", "reference");
    const both = (name) => [row["policy_" + name][index], row["reference_" + name][index]];
    const percent = (value) => (value === null ? "–" : figure(100 * Math.exp(value)) + " %");
    line("probability", ...both("log_prob").map(percent));
    line("log", ...both("log_prob").map(nats));
    line("entropy", ...both("entropy").map(nats));
    line("top token", ...both("top").map((place) => node("code", "", quoted(table.texts[place]))));
    const divergences = node("dl", "pairs");
    for (const [pair, title] of Object.entries(PAIRS)) {
      divergences.append(node("dt", "", title), node("dd", "", `${nats(row[pair][index])} ${state.unit}`));
    }
    return [head, grid, divergences];
  }

  return { section };
})();
