// Devices: a memory bar, to scale, and the models in eviction order.

import { now } from "./api.js";
import { h, keyed, set, show, text } from "./dom.js";
import { bytes, duration } from "./format.js";
import { t } from "./words.js";

const LEAVING = ["draining", "parking", "unloading"];
const COMING = ["loading", "warming", "waking"];

export function devicesPanel(store) {
  const list = h("div", { class: "devices" });
  const none = h("p", { class: "quiet" }, t("devices.none"));
  const draw = keyed(list, (item) => item.device.host_id, () => deviceCard(store));
  const node = h("section", { class: "panel devices-panel", "aria-labelledby": "devices-title" },
    h("h2", { id: "devices-title" }, t("devices.title")), none, list);
  let marked = [];
  const update = () => {
    show(none, store.devices.length === 0);
    draw(store.devices.map((device) => ({ device, marked })));
  };
  return { node, update, mark: (victims) => { marked = victims; update(); } };
}

function deviceCard(store) {
  const name = h("h3");
  const used = h("span", { class: "strong" });
  const rest = h("span", { class: "quiet" });
  const bar = h("div", { class: "bar", role: "img" });
  const blocks = keyed(bar, (block) => block.key, makeBlock);
  const order = h("ol", { class: "order", role: "list" }); // explicit, because `list-style: none` removes the role in some browsers
  const rows = keyed(order, (row) => row.key, makeRow);
  const reserved = h("span", { class: "quiet facts" });
  const legend = h("div", { class: "legend" }, order,
    h("p", { class: "reserved" }, h("i", { class: "swatch workspace", "aria-hidden": "true" }), t("devices.workspace"), reserved));
  const hostWords = h("p", { class: "quiet small" });
  const hostBar = h("div", { class: "bar", role: "img" });
  const hostBlocks = keyed(hostBar, (block) => block.key, makeBlock);
  const hostOrder = h("ol", { class: "order", role: "list" });
  const hostRows = keyed(hostOrder, (row) => row.key, makeRow);
  const hostLegend = h("div", { class: "legend" }, hostOrder);
  const host = h("div", { class: "host" }, hostWords, hostBar, hostLegend);
  const empty = h("p", { class: "quiet small" }, t("devices.empty"));
  const node = h("article", { class: "device" }, h("div", { class: "device-head" }, name, used, rest), bar, empty, legend, host);

  function update({ device, marked }) {
    const residents = device.residents.map((id) => resident(store, device, id, marked));
    const next = isUnderPressure(store, device) && residents.find((each) => each.mayLeave);
    if (next) next.isNext = true;
    const taken = device.used_bytes + device.workspace_bytes;
    const title = store.deviceName(device.host_id);
    text(name, title);
    text(used, t("devices.used", { used: bytes(taken), budget: bytes(device.budget_bytes) }));
    text(rest, [
      t("devices.free", { free: bytes(device.free_bytes) }),
      t("devices.total", { total: bytes(device.total_bytes) }),
      ...(device.is_draining ? [t("devices.draining")] : []),
    ].join(" · "));
    const words = [...residents.map((each) => `${each.name} ${each.size}`),
      `${t("devices.workspace")} ${bytes(device.workspace_bytes)}`, `${t("devices.freeRoom")} ${bytes(device.free_bytes)}`];
    set(bar, "aria-label", t("devices.bar", { device: title, words: words.join(", ") }));
    blocks([...residents, workspace(device)].filter((each) => each.bytes));
    bar.style.setProperty("--scale", Math.max(device.budget_bytes, taken));
    show(empty, residents.length === 0);
    show(legend, residents.length > 0);
    text(reserved, bytes(device.workspace_bytes));
    set(order, "aria-label", t("devices.order"));
    rows(residents);
    updateHost(device, title);
  }

  function updateHost(device, title) {
    const parked = device.parked.map((id) => ({ ...resident(store, device, id, []), ...hostSize(store, device, id), state: "ready" }));
    show(host, device.host_budget_bytes > 0);
    show(hostLegend, parked.length > 0);
    text(hostWords, t("devices.host", { used: bytes(device.host_used_bytes), budget: bytes(device.host_budget_bytes) }));
    const words = [...parked.map((each) => `${each.name} ${each.size}`),
      `${t("devices.freeRoom")} ${bytes(Math.max(0, device.host_budget_bytes - device.host_used_bytes))}`];
    set(hostBar, "aria-label", t("devices.hostBar", { device: title, words: words.join(", ") }));
    set(hostOrder, "aria-label", t("devices.hostOrder"));
    hostBlocks(parked);
    hostRows(parked);
    hostBar.style.setProperty("--scale", Math.max(device.host_budget_bytes, device.host_used_bytes));
  }
  return { node, update };
}

function hostSize(store, device, id) {
  const size = store.slot(id, device.host_id)?.host_bytes ?? 0;
  return { bytes: size, size: bytes(size) };
}

/** Whether a model may soon be evicted: one waits for memory, or less than an eighth of the budget is free. */
function isUnderPressure(store, device) {
  const waits = (slot) => slot.host_id === device.host_id && slot.state === "waiting_space";
  return device.free_bytes < device.budget_bytes / 8 || store.slots.some(waits);
}

function resident(store, device, id, marked) {
  const split = store.splitSlot(id, device.host_id);
  const slot = split ?? store.slot(id, device.host_id);
  const place = split?.shares.findIndex((share) => share.host_id === device.host_id);
  const size = place > 0 ? split.shares[place].device_bytes : slot?.weight_bytes ?? 0;
  const idle = slot?.last_used_at ? now() - slot.last_used_at : null;
  const isBusy = Boolean(slot?.leases || slot?.queue_items);
  return {
    key: id,
    name: split ? t("devices.part", { model: id, part: place + 1, parts: split.shares.length }) : id,
    bytes: size,
    size: bytes(size),
    state: slot?.state ?? "ready",
    mayLeave: slot?.state === "ready" && !slot.pinned,
    isPinned: Boolean(slot?.pinned),
    isMarked: marked.includes(id),
    note: isBusy ? t("devices.busy") : idle === null ? "" : t("devices.idle", { time: duration(idle) }),
  };
}

function workspace(device) {
  const size = device.workspace_bytes;
  return { key: "\nworkspace", name: t("devices.workspace"), bytes: size, size: bytes(size), state: "workspace" };
}

function makeBlock() {
  const label = h("span");
  const node = h("div", {}, label);
  const update = (block, index) => {
    set(node, "class", `block ${look(block)}`);
    set(node, "title", `${block.name}: ${block.size}`);
    node.style.setProperty("--bytes", block.bytes);
    node.style.setProperty("--tint", index % 3);
    text(label, block.name);
  };
  return { node, update };
}

function makeRow() {
  const swatch = h("i", { "aria-hidden": "true" });
  const name = h("span", { class: "name" });
  const tag = h("span", { class: "tag" });
  const facts = h("span", { class: "quiet facts" });
  const node = h("li", {}, swatch, name, tag, facts);
  const update = (row, index) => {
    set(swatch, "class", `swatch ${look(row)}`);
    swatch.style.setProperty("--tint", index % 3);
    text(name, row.name);
    const words = row.isMarked ? "devices.would" : row.isNext ? "devices.next" : row.isPinned ? "devices.pinned"
      : row.state === "ready" ? "" : `state.${row.state}`;
    text(tag, words && t(words));
    show(tag, Boolean(words));
    text(facts, [row.size, row.note].filter(Boolean).join(" · "));
  };
  return { node, update };
}

function look(block) {
  if (block.state === "workspace") return "workspace";
  if (block.isMarked || LEAVING.includes(block.state)) return "leaving";
  if (COMING.includes(block.state)) return "coming";
  return block.isNext ? "next" : block.isPinned ? "pinned" : "stays";
}
