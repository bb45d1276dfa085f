// Elements from plain calls, and a tree that is changed to look like a fresh one. Text is always set as text, never
// as HTML, so nothing that a user named can become markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: attributes; `on...` handlers; `style` an object; null and false are left out. */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node[name] = value;
    else if (name === "style") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...flat(children));
  return node;
}

function flat(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false && child !== "");
}

const HANDLERS = ["onclick", "onchange", "onkeydown", "onpointerenter", "onpointerleave", "onscroll", "ontoggle"];
const OWN = new Set(["open"]); // what the user changes by hand stays

/** Makes the children of `place` look like `fresh`. What stays the same keeps focus, scroll and selection.
 *
 * A child with `data-key` is found again wherever it moved; the others are compared in order. */
export function patch(place, ...fresh) {
  const keyed = new Map();
  for (const child of place.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
  let at = place.firstChild;
  for (const child of flat(fresh)) {
    const node = child instanceof Node ? child : document.createTextNode(String(child));
    const old = counterpart(node, at, keyed);
    if (old && old === at) at = at.nextSibling;
    else place.insertBefore(old || node, at);
    if (old) sync(old, node);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function counterpart(node, at, keyed) {
  const key = node.dataset?.key;
  const old = key === undefined ? at : keyed.get(key);
  return old && old.nodeName === node.nodeName && old.dataset?.key === key ? old : null;
}

function sync(old, node) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== node.data) old.data = node.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!node.hasAttribute(name) && !OWN.has(name)) old.removeAttribute(name);
  for (const { name, value } of node.attributes) {
    if (name === "style" || OWN.has(name)) continue;
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  if (old.style && old.style.cssText !== node.style.cssText) old.style.cssText = node.style.cssText;
  for (const name of HANDLERS) if (old[name] !== node[name]) old[name] = node[name];
  patch(old, ...[...node.childNodes].map((child) => (child.remove(), child)));
}
