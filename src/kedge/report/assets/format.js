"use strict";
// How numbers and text are written for people.
const Kedge = {};

Kedge.format = (() => {
  const MISSING = "–";

  function figure(value) {
    if (value === null || value === undefined || !Number.isFinite(value)) return MISSING;
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size >= 100 ? value.toFixed(1) : size >= 10 ? value.toFixed(2) : value.toFixed(3);
  }

  // With so many decimals, as the tables are written (numbers.py).
  function fixed(value, decimals) {
    const size = Math.abs(value);
    if (size >= 1000) return size < 1e9 ? Math.round(value).toLocaleString("en") : value.toExponential(2);
    if (size >= 0.5 * 10 ** -decimals) return value.toFixed(decimals);
    return value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
  }

  function tick(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size >= 1e6) return trim((value / 1e6).toPrecision(3)) + "M";
    if (size >= 1e4) return trim((value / 1e3).toPrecision(3)) + "k";
    return size < 1e-3 ? value.toExponential(0) : trim(value.toPrecision(4));
  }

  const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

  // Characters that are invisible, or that would reorder what surrounds them, are shown by their code.
  const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;

  function pieces(text) {
    const found = [];
    let plain = "";
    for (const character of text) {
      if (!INVISIBLE.test(character)) {
        plain += character;
        continue;
      }
      if (plain) found.push({ text: plain });
      plain = "";
      found.push({ code: character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") });
    }
    if (plain) found.push({ text: plain });
    return found;
  }

  // Append text to an element as text, never as markup.
  function write(element, text) {
    for (const piece of pieces(text)) {
      if (piece.code === undefined) {
        element.append(piece.text);
      } else {
        element.append(node("em", "", piece.code));
      }
    }
    return element;
  }

  const quoted = (text) =>
    JSON.stringify(text).slice(1, -1).replace(/[\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g,
      (character) => "\\u" + character.codePointAt(0).toString(16).padStart(4, "0"));

  function node(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  return { figure, fixed, tick, write, quoted, node };
})();
