"use strict";
// What a reader can do with the page: point at a map or a curve (mouse, finger or arrow keys) and read its values; sort a table.
(() => {
  const MOST_ROWS = 8; // of many curves those nearest to the pointer
  const tip = document.getElementById("tip");
  const digits = (value) => (value === null ? "undefined" : Number(value.toPrecision(5)).toString());
  const place = (left, top) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(left + 14, window.innerWidth - box.width - 4)) + "px";
    tip.style.top = Math.max(4, top + 18 + box.height > window.innerHeight ? top - box.height - 12 : top + 18) + "px";
  };
  const say = (text, left, top) => {
    tip.textContent = text;
    tip.hidden = false;
    place(left, top);
  };
  const marker = (svg, tag, name) => {
    let found = svg.querySelector("." + name);
    if (!found) {
      found = document.createElementNS("http://www.w3.org/2000/svg", tag);
      found.setAttribute("class", name);
      svg.appendChild(found);
    }
    return found;
  };
  const set = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  };
  const hide = (svg) => {
    tip.hidden = true;
    for (const found of svg.querySelectorAll(".mark, .ruler")) found.remove();
  };
  // a place on the screen in the drawing's own units, and back
  const inside = (svg, event) => {
    const box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const scale = width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const outside = (svg, x, y) => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    return [box.left + x * scale, box.top + y * scale];
  };
  // both kinds of chart: `at(x, y)` finds what is there, `show(found)` says it, `step(found, keys)` goes to the next
  const listen = (svg, at, show, step) => {
    let current = null;
    const go = (found) => {
      current = found;
      if (found === null) hide(svg);
      else show(found);
    };
    const point = (event) => go(at(...inside(svg, event)));
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", () => go(null));
    svg.addEventListener("blur", () => go(null));
    svg.addEventListener("keydown", (event) => {
      const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") go(null);
      if (!keys) return;
      event.preventDefault();
      go(step(current, keys));
    });
  };

  for (const svg of document.querySelectorAll("svg.map")) {
    const map = JSON.parse(svg.dataset.map), count = map.steps.length, cell = map.size / count;
    const clamp = (i) => Math.max(0, Math.min(count - 1, i));
    const at = (x, y) => {
      const column = Math.floor((x - map.left) / cell), row = Math.floor((y - map.top) / cell);
      return row >= 0 && row < count && column >= 0 && column < count ? [row, column] : null;
    };
    const show = ([row, column]) => {
      set(marker(svg, "rect", "mark"), { x: map.left + column * cell, y: map.top + row * cell, width: cell, height: cell });
      const where = outside(svg, map.left + (column + 0.5) * cell, map.top + (row + 0.5) * cell);
      say(`steps ${map.steps[row]} and ${map.steps[column]}\ncosine ${digits(map.values[row][column])}`, ...where);
    };
    listen(svg, at, show, (now, [right, down]) => (now ? [clamp(now[0] + down), clamp(now[1] + right)] : [0, 0]));
  }

  for (const svg of document.querySelectorAll("svg.lines")) {
    const series = JSON.parse(svg.dataset.series), label = svg.dataset.x;
    const places = [...new Set(series.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
    if (!places.length) continue;
    const near = (x) => places.reduce((best, here) => (Math.abs(here - x) < Math.abs(best - x) ? here : best));
    const show = ([x, y]) => {
      let rows = [];
      let value = null, top = Infinity;
      for (const line of series) {
        // of each curve the nearest point, if it is there: curves are not measured at the same places
        const point = line.points.reduce((best, here) => (Math.abs(here[0] - x) < Math.abs(best[0] - x) ? here : best));
        if (Math.abs(point[0] - x) > 4) continue;
        if (value === null || point[0] === x) value = point[2];
        top = Math.min(top, point[1]);
        rows.push({ text: `${line.label}: ${digits(point[3])}`, far: Math.abs(point[1] - y) });
      }
      if (rows.length > MOST_ROWS) rows = rows.sort((a, b) => a.far - b.far).slice(0, MOST_ROWS);
      const height = svg.viewBox.baseVal.height;
      set(marker(svg, "line", "ruler"), { x1: x, x2: x, y1: 14, y2: height - 42 });
      say([`${label} ${digits(value)}`, ...rows.map((row) => row.text)].join("\n"), ...outside(svg, x, top));
    };
    const at = (x, y) => (x < places[0] - 12 || x > places[places.length - 1] + 12 ? null : [near(x), y]);
    listen(svg, at, show, (now, [right]) => {
      const i = now === null ? -1 : places.indexOf(now[0]);
      return [places[Math.max(0, Math.min(places.length - 1, i + (right || 1)))], now === null ? 0 : now[1]];
    });
  }

  // "1.3M", "2,048" and "84.5%" are numbers, "–" comes last whichever way
  const number = (text) => {
    const match = /^[-+−]?[\d,]*\.?\d+(?:e[-+]?\d+)?/i.exec(text);
    if (!match) return null;
    const factor = { k: 1e3, M: 1e6, B: 1e9, T: 1e12 }[text[match[0].length]] || 1;
    return Number(match[0].replace(/,/g, "").replace("−", "-")) * factor;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.querySelectorAll("th")], body = table.querySelector("tbody");
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const rows = [...body.querySelectorAll("tr")].map((row) => {
          const text = row.children[column].textContent.trim();
          return { row, text, value: number(text) };
        });
        const numeric = rows.some((item) => item.value !== null) && rows.every((item) => item.value !== null || /^[–-]?$/.test(item.text));
        // numbers the largest first, words from a to z; pressed again the other way
        const usual = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
        const direction = head.getAttribute("aria-sort") === usual ? other : usual, sign = direction === "ascending" ? 1 : -1;
        const order = (a, b) => {
          if (!numeric) return sign * a.text.localeCompare(b.text, "en", { numeric: true });
          if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
          return sign * (a.value - b.value);
        };
        rows.sort(order).forEach((item) => body.appendChild(item.row));
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
      });
    });
  }
})();
