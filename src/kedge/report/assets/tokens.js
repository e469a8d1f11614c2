"use strict";
// Text as tokens: coloured by their KL, explained under the mouse, at a tap, with the arrow keys.
Kedge.tokens = (() => {
  const { figure, node } = Kedge.format;
  const state = Kedge.state;
  const tip = node("div", "tip");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");

  // Full colour at the scale's end; the root makes small drifts visible.
  const opacity = (kl, scale) => 0.85 * Math.sqrt(Math.min(1, Math.max(0, kl) / scale));

  const shade = (kl, scale) => `rgba(${state.css("--kl")}, ${opacity(kl, scale).toFixed(3)})`;

  function scaleBar(scale) {
    const element = node("div", "scale");
    const bar = node("span");
    const count = 14;
    for (let i = 0; i < count; i++) {
      const step = node("i");
      step.style.backgroundColor = shade((scale * i) / (count - 1), scale);
      bar.append(step);
    }
    const end = figure(scale * state.factor("nats")).replace(/(\.\d*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, "");
    element.append("KL of a token  0", bar, `${end} ${state.unit}`);
    return element;
  }

  // Put tokens (spans) and what stands between them (text) together; one stop of the tab key for all.
  function list(parts) {
    const element = node("div", "tokens");
    element.dir = "auto";
    const spans = parts.filter((part) => typeof part !== "string");
    spans.forEach((span, index) => (span.tabIndex = index === 0 ? 0 : -1));
    const fragment = document.createDocumentFragment();
    fragment.append(...parts);
    element.append(fragment);
    return element;
  }

  // Show what describe(span) gives for the token under the mouse, else for the one with the focus.
  function explain(root, describe) {
    let hovered = null;
    let focused = null;

    function update() {
      const span = hovered || focused;
      if (!span || !span.isConnected) return tip.remove();
      tip.replaceChildren(...describe(span));
      document.body.append(tip);
      const box = span.getClientRects()[0] || span.getBoundingClientRect();
      const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
      const above = box.top - tip.offsetHeight - 6;
      tip.style.left = Math.max(8, left) + "px";
      tip.style.top = (above > 0 ? above : box.bottom + 6) + "px";
    }

    const token = (event) => event.target.closest(".tokens > span");

    function focus(span) {
      span.parentNode.querySelector("[tabindex='0']").tabIndex = -1;
      span.tabIndex = 0;
      span.focus();
    }

    // The tip is one for the page: it is touched only by the part of the page that it speaks of.
    function hover(span) {
      if (span === hovered) return;
      hovered = span;
      update();
    }

    root.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch") hover(token(event));
    });
    root.addEventListener("pointerleave", () => hover(null));
    root.addEventListener("click", (event) => {
      if (token(event)) focus(token(event));
    });
    root.addEventListener("focusin", (event) => {
      focused = token(event);
      if (!focused) return;
      focused.setAttribute("aria-describedby", tip.id);
      update();
    });
    root.addEventListener("focusout", () => {
      if (!focused) return;
      focused.removeAttribute("aria-describedby");
      focused = null;
      update();
    });
    root.addEventListener("keydown", (event) => {
      const span = token(event);
      if (!span) return;
      const spans = [...span.parentNode.querySelectorAll(":scope > [tabindex]")];
      const place = spans.indexOf(span);
      const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (event.key === "Escape") span.blur();
      if (next === undefined) return;
      event.preventDefault();
      hovered = null;
      if (spans[next]) focus(spans[next]);
    });
    document.addEventListener("pointerdown", (event) => {
      if (focused && !event.target.closest(".tokens > span")) focused.blur();
    });
    addEventListener(
      "scroll",
      () => {
        if (!hovered && !focused) return;
        hovered = null;
        update();
      },
      { passive: true, capture: true },
    );
  }

  return { list, shade, scaleBar, explain };
})();
