// As much of a browser as analysis/page.js and context_page.js ask for, so that Node runs the script of a page where no browser is installed.
// stdin: {"tree": [tag, {attributes}, [children or text]], "script": "...", "actions": [...]}; stdout: what each action shows.
"use strict";
const { tree, script, actions } = JSON.parse(require("fs").readFileSync(0, "utf8"));

class Element {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, nodes: [], parent: null, listeners: {}, style: {}, hidden: false });
  }
  get children() { return this.nodes.filter((node) => node instanceof Element); }
  get dataset() { return new Proxy({}, { get: (_, name) => this.attributes["data-" + name] }); }
  get viewBox() {
    const [, , width, height] = this.attributes.viewBox.split(" ").map(Number);
    return { baseVal: { width, height } };
  }
  get textContent() { return this.nodes.map((node) => (node instanceof Element ? node.textContent : node)).join(""); }
  set textContent(text) { this.nodes = [text]; }
  get value() { return this.attributes.value; }
  getAttribute(name) { return name in this.attributes ? this.attributes[name] : null; }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  removeAttribute(name) { delete this.attributes[name]; }
  appendChild(child) {
    child.remove();
    child.parent = this;
    this.nodes.push(child);
  }
  remove() {
    if (this.parent) this.parent.nodes = this.parent.nodes.filter((node) => node !== this);
    this.parent = null;
  }
  // a chart lies at (100, 50), at half its own size
  getBoundingClientRect() {
    const { width, height } = this.attributes.viewBox ? this.viewBox.baseVal : { width: 120, height: 40 };
    return { left: 100, top: 50, width: width / 2, height: height / 2 };
  }
  matches(selector) {
    const [tag, name] = selector.split(".");
    return (!tag || tag === this.tag) && (!name || (this.attributes.class || "").split(" ").includes(name));
  }
  querySelectorAll(selectors) {
    const wanted = selectors.split(",").map((selector) => selector.trim());
    return this.children.flatMap((child) => [
      ...(wanted.some((selector) => child.matches(selector)) ? [child] : []),
      ...child.querySelectorAll(selectors),
    ]);
  }
  querySelector(selectors) { return this.querySelectorAll(selectors)[0] || null; }
  addEventListener(kind, listener) { (this.listeners[kind] ||= []).push(listener); }
  dispatch(kind, event) { for (const listener of this.listeners[kind] || []) listener({ preventDefault() {}, ...event }); }
}

const build = ([tag, attributes, nodes]) => {
  const element = new Element(tag);
  element.attributes = attributes;
  element.nodes = nodes.map((node) => (typeof node === "string" ? node : build(node)));
  for (const child of element.children) child.parent = element;
  return element;
};
const root = build(tree);
const everything = [root, ...root.querySelectorAll("")];
globalThis.document = {
  querySelectorAll: (selectors) => root.querySelectorAll(selectors),
  getElementById: (id) => everything.find((element) => element.attributes.id === id),
  createElementNS: (_, tag) => new Element(tag),
};
globalThis.window = { innerWidth: 1200, innerHeight: 900 };
new Function(script)();

const tip = document.getElementById("tip");
const results = actions.map(({ selector, index, kind, x, y, key, head, value }) => {
  const element = root.querySelectorAll(selector)[index];
  if (kind === "class") return element.getAttribute("class");
  if (kind === "text") return element.textContent;
  if (value !== undefined) element.setAttribute("value", value);
  if (kind === "sort") {
    element.querySelectorAll("th")[head].querySelector("button").dispatch("click", {});
    const rows = element.querySelector("tbody").querySelectorAll("tr");
    return rows.map((row) => row.children[head].textContent.trim());
  }
  element.dispatch(kind, { clientX: 100 + x / 2, clientY: 50 + y / 2, key });
  return tip.hidden ? null : tip.textContent;
});
console.log(JSON.stringify(results));
