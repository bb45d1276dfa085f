// Creates DOM elements, and updates a DOM tree to match a new one. Text is always set as text, never as HTML, so user
// input cannot become markup.

const SVG = "http://www.w3.org/2000/svg";

/** Creates an element. `props`: attributes, `on...` handlers, `style` as an object; null and false are skipped. */
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
const OWN = new Set(["open"]); // attributes that the user changes are kept

/** Updates the children of `place` to match `fresh`. Unchanged nodes keep focus, scroll position and selection.
 *
 * A child with `data-key` is matched by its key; the others are matched in order. */
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
