"use strict";
// Responses before and after, token by token.
Kedge.samples = (() => {
  const { figure, write, quoted, node } = Kedge.format;
  const { list, shade, scaleBar, explain } = Kedge.tokens;
  const state = Kedge.state;
  const FIRST = 4;

  function tokens(cell, scale) {
    const parts = cell.tokens.flatMap((text, index) => {
      const span = node("span");
      write(span, text);
      const kl = cell.kl[index];
      if (kl !== undefined && kl !== null) {
        span.style.backgroundColor = shade(kl, scale);
        span.dataset.kl = kl;
      }
      span.dataset.token = text;
      return [cell.gaps[index], span];
    });
    const element = list(parts);
    if (cell.more) element.append(node("em", "", ` + ${cell.more} tokens`));
    return element;
  }

  function describe(span) {
    const found = [node("code", "", quoted(span.dataset.token))];
    if (span.dataset.kl !== undefined) {
      found.push("  ", figure(span.dataset.kl * state.factor("nats")) + " " + state.unit);
    }
    return found;
  }

  function foot(cell) {
    const element = node("div", "cell-foot");
    const add = (name, value) => {
      const item = node("span", "", name + " ");
      item.append(node("b", "", value));
      element.append(item);
    };
    const names = Object.keys(cell.rewards);
    if (names.length === 0 && cell.reward !== undefined) add("reward", figure(cell.reward));
    for (const name of names) add(name, figure(cell.rewards[name]));
    if (cell.total !== null) add("KL", figure(cell.total * state.factor("nats")) + " " + state.unit);
    if (!cell.finished) element.append(node("span", "", "cut by the length limit"));
    return element;
  }

  function prompt(messages) {
    const element = node("div", "prompt");
    for (const message of messages) {
      const part = node("div");
      part.dir = "auto";
      if (message.role) part.append(node("b", "", message.role));
      if (message.text) write(part, message.text);
      else part.append(node("span", "empty", "empty prompt"));
      element.append(part);
    }
    return element;
  }

  function sample(row, table) {
    const element = node("article", "sample");
    element.append(prompt(row.prompt));
    const cells = node("div", "cells");
    table.columns.forEach((column, index) => {
      if (!state.shown(column.run)) return;
      const cell = node("div", "cell");
      const head = node("div", "cell-head" + (column.run === null ? "" : " c" + (column.run % 8)));
      head.append(node("i", "dot"), column.title, node("span", "", "step " + column.step.toLocaleString("en")));
      cell.append(head);
      const content = row.cells[index];
      if (content) cell.append(tokens(content, table.scale), foot(content));
      else cell.append(node("div", "note", "–"));
      cells.append(cell);
    });
    element.append(cells);
    return element;
  }

  function section(table) {
    const element = node("section");
    let all = false;
    function build() {
      const head = node("div", "samples-head");
      head.append(node("h2", "", "Samples"));
      head.append(node("span", "note", "the same held-out prompts at the first and the last evaluation"));
      head.append(scaleBar(table.scale));
      const rows = all ? table.rows : table.rows.slice(0, FIRST);
      element.replaceChildren(head, ...rows.map((row) => sample(row, table)));
      if (!all && table.rows.length > FIRST) {
        const more = node("button", "more", `Show all ${table.rows.length} prompts`);
        more.type = "button";
        more.addEventListener("click", () => {
          all = true;
          build();
        });
        element.append(more);
      } else if (table.left_out) {
        element.append(node("p", "note", `${table.left_out} more prompts are in samples.jsonl.`));
      }
    }
    state.listen((change) => {
      if (change !== "zoom") build();
    });
    explain(element, describe);
    return element;
  }

  return { section };
})();
