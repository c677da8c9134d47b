"use strict";
// The text coloured by how long each token was read in one layer; a token pointed at says who dropped it, and whom it dropped.
(() => {
  const MOST_NAMED = 12;
  const tip = document.getElementById("tip"), slider = document.getElementById("layer"), shown = document.getElementById("shown");
  const names = JSON.parse(slider.dataset.names), levels = JSON.parse(slider.dataset.levels);
  const quoted = (text) => "“" + text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\u200b/g, "") + "”";
  const texts = [...document.querySelectorAll("div.tokens")].map((element) => ({
    element,
    spans: [...element.querySelectorAll("span.token")],
    reads: JSON.parse(element.dataset.reads),
    here: null,
  }));
  const layer = () => Number(slider.value);
  // queries j to j + r - 1 read token j; the next one, if the text has it, dropped it
  const dropperOf = (text, token) => {
    const next = token + text.reads[layer()][token];
    return next < text.spans.length ? next : null;
  };
  const levelOf = (text, token) => {
    if (dropperOf(text, token) === null) return levels.length + 1;
    const level = levels.findIndex((limit) => text.reads[layer()][token] - 1 < limit);
    return level < 0 ? levels.length : level;
  };
  const paint = (text, marks) => {
    text.spans.forEach((span, token) => {
      const mark = marks.get(token);
      span.setAttribute("class", "token life-" + levelOf(text, token) + (mark ? " " + mark : ""));
    });
  };
  const place = (span) => {
    const at = span.getBoundingClientRect(), box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(at.left, window.innerWidth - box.width - 4)) + "px";
    tip.style.top = Math.max(4, at.top + at.height + 8 + box.height > window.innerHeight ? at.top - box.height - 8 : at.top + at.height + 8) + "px";
  };
  const named = (text, token) => quoted(text.spans[token].textContent) + " (" + token + ")";
  const say = (text, token) => {
    const dropper = dropperOf(text, token), victims = [];
    for (let other = 0; other < token; other++) if (dropperOf(text, other) === token) victims.push(other);
    const marks = new Map(victims.map((victim) => [victim, "dropped"]));
    if (dropper !== null) marks.set(dropper, "dropper");
    marks.set(token, "here");
    paint(text, marks);
    const after = text.reads[layer()][token];
    const lines = [names[layer()] + ": " + named(text, token)];
    lines.push(
      dropper === null
        ? "dropped by none: read by all " + (after - 1) + " later tokens"
        : "dropped by " + named(text, dropper) + ", " + after + " tokens later; read by " + (after - 1),
    );
    if (victims.length) {
      const more = victims.length > MOST_NAMED ? " and " + (victims.length - MOST_NAMED) + " more" : "";
      lines.push("drops " + victims.slice(-MOST_NAMED).map((victim) => named(text, victim)).join(", ") + more);
    } else lines.push("drops none");
    text.here = token;
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    place(text.spans[token]);
  };
  const leave = (text) => {
    text.here = null;
    tip.hidden = true;
    paint(text, new Map());
  };
  const show = () => {
    let read = 0, all = 0;
    for (const text of texts) {
      const length = text.spans.length;
      read += text.reads[layer()].reduce((sum, count) => sum + count, 0);
      all += (length * (length + 1)) / 2;
      if (text.here === null) paint(text, new Map());
      else say(text, text.here);
    }
    shown.textContent = names[layer()] + ", " + ((100 * read) / all).toFixed(1) + "% of the context kept";
  };
  slider.addEventListener("input", show);
  for (const text of texts) {
    text.spans.forEach((span, token) => {
      span.addEventListener("pointerenter", () => say(text, token));
      span.addEventListener("pointerdown", () => say(text, token));
    });
    text.element.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") leave(text); // a finger that is lifted leaves what it tapped on the screen
    });
    text.element.addEventListener("blur", () => leave(text));
    text.element.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") leave(text);
      if (!step) return;
      event.preventDefault();
      const next = text.here === null ? 0 : text.here + step;
      say(text, Math.max(0, Math.min(text.spans.length - 1, next)));
    });
  }
  show();
})();
