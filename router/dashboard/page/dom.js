// Creates elements without markup strings: all text is set as text, so no name or message can become HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Creates an element. `properties`: attributes; `on…` adds a listener; null, undefined and false are skipped. */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

export function svg(tag, properties, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) set(node, name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Sets an attribute or listener only when it changes, so that focus and animations survive. */
export function set(node, name, value) {
  if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
  else if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
}

export function text(node, value) {
  const wanted = String(value ?? "");
  if (node.textContent !== wanted) node.textContent = wanted;
}

export function show(node, visible) {
  node.toggleAttribute("hidden", !visible); // SVG has no such property
}

/**
 * Keeps one child of `parent` per item, in order; children are created once and then updated.
 * `make(item)` returns {node, update(item)}; `key(item)` identifies an item's child.
 */
export function keyed(parent, key, make) {
  const kept = new Map();
  return (items) => {
    const keys = new Set(items.map(key));
    for (const [old, part] of kept) {
      if (keys.has(old)) continue;
      part.node.remove();
      kept.delete(old);
    }
    items.forEach((item, index) => {
      const id = key(item);
      if (!kept.has(id)) kept.set(id, make(item));
      const part = kept.get(id);
      part.update(item, index);
      if (parent.children[index] !== part.node) parent.insertBefore(part.node, parent.children[index] ?? null);
    });
  };
}
