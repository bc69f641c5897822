// The model table: state, memory, traffic, and the three actions of an operator.

import { now } from "./api.js";
import { h, keyed, set, show, text } from "./dom.js";
import { bytes, causeWords, duration, latency, number, perSecondWords } from "./format.js";
import { sparkline } from "./sparkline.js";
import { copyText } from "./snippets.js";
import { keyOf } from "./store.js";
import { minuteOf } from "./traffic.js";
import { t } from "./words.js";

const AWAY = ["absent", "cold", "failed"];
const EVICTABLE = ["waiting_space", "loading", "warming", "ready", "parked", "waking"];
const TIMED = ["waiting_space", "loading", "warming", "draining", "parking", "waking", "unloading"];
const IN_MEMORY = ["ready", "draining"];

export function modelsPanel(store, act) {
  const count = h("span", { class: "quiet" });
  const filter = h("input", { type: "search", "aria-label": t("models.filter"), placeholder: t("models.filter") });
  const list = h("ul", { class: "models" });
  const absent = foldedModels(store, act);
  const nothing = h("p", { class: "quiet" }, t("models.nothing"));
  const draw = keyed(list, (model) => model.id, (model) => modelRow(store, model.id, act));
  const heads = ["model", "dimensions", "memory", "load", "traffic", "used", "actions"];
  const update = () => {
    const models = store.models();
    const wanted = models.filter((model) => model.id.toLowerCase().includes(filter.value.trim().toLowerCase()));
    text(count, t("models.count", { ready: models.filter(isInMemory).length, all: models.length }));
    show(nothing, wanted.length === 0 && models.length > 0);
    const [away, shown] = [wanted.filter(isAbsent), wanted.filter((model) => !isAbsent(model))];
    draw(shown);
    absent.update(away, shown.length === 0 || Boolean(filter.value.trim()));
  };
  filter.addEventListener("input", update);
  const node = h("section", { class: "panel", "aria-labelledby": "models-title" },
    h("div", { class: "panel-head" }, h("h2", { id: "models-title" }, t("models.title")), count, filter),
    h("div", { class: "model heads", "aria-hidden": "true" }, heads.map((key) => h("span", {}, t(`col.${key}`)))),
    list, absent.node, nothing);
  return { node, update };
}

/** The models that are not on this machine, in one line that opens. Opened for the reader while nothing else is shown. */
function foldedModels(store, act) {
  const count = h("span");
  const names = h("span", { class: "quiet names" });
  const list = h("ul", { class: "models" });
  const node = h("details", { class: "absent" }, h("summary", {}, count, " ", names), list);
  const draw = keyed(list, (model) => model.id, (model) => modelRow(store, model.id, act));
  let wasWanted = null;
  const update = (models, isWanted) => {
    show(node, models.length > 0);
    text(count, t("models.absent", { count: number(models.length) }));
    text(names, models.map((model) => model.id).join(", "));
    draw(models);
    if (isWanted !== wasWanted) node.open = isWanted; // else it is the reader's choice
    wasWanted = isWanted;
  };
  return { node, update };
}

function isAbsent(model) {
  return model.slots.every((slot) => slot.state === "absent");
}

function isInMemory(model) {
  return model.slots.some((slot) => IN_MEMORY.includes(slot.state));
}

function modelRow(store, id, act) {
  const name = h("h3", { id: `model-${id}` }, id);
  const state = h("span", { class: "state" });
  const pinned = h("span", { class: "tag" }, t("devices.pinned"));
  const task = h("span", { class: "tag" });
  const places = h("span", { class: "quiet small" });
  const progress = progressLine(store, id);
  const error = h("p", { class: "error" });
  const about = h("p", { class: "quiet small about" });
  const precision = h("p", { class: "quiet small precision" });
  const notes = h("p", { class: "quiet small" });
  const space = spaceLine(id);
  const cells = Object.fromEntries(["dimensions", "memory", "load", "used"].map((key) => [key, cell(key)]));
  const traffic = trafficCell(id);
  const buttons = Object.fromEntries(["preload", "evict", "pin"].map((verb) => [verb, button(verb, id, act)]));
  const head = h("div", { class: "what" }, name,
    h("div", { class: "states" }, state, task, pinned, places), progress.node, precision, notes);
  const node = h("li", { class: "model", "aria-labelledby": `model-${id}`, "data-model": id }, head, about, space.node, error,
    cells.dimensions.node, cells.memory.node, cells.load.node, traffic.node, cells.used.node,
    h("div", { class: "actions" }, Object.values(buttons)));

  function update({ slots, slot }) {
    set(node, "data-state", slot.state);
    text(state, t(`state.${slot.state}`));
    const words = [slot.description, slot.license && t("models.licence", { name: slot.license })].filter(Boolean);
    text(about, words.join(" · "));
    show(about, words.length > 0);
    const isPinned = slots.some((each) => each.pinned);
    show(pinned, isPinned);
    const scores = slot.task === "rerank" || slot.task === "classify";
    text(task, scores ? t(`task.${slot.task}`) : "");
    show(task, scores);
    const hosts = slots.filter((each) => !AWAY.includes(each.state)).map((each) => store.deviceName(each.host_id));
    text(places, store.devices.length > 1 && hosts.length ? t("models.on", { device: hosts.join(", ") }) : "");
    text(precision, precisionWords(slot.info));
    show(precision, Boolean(slot.info?.precision));
    text(notes, slot.info?.notes.join("; "));
    show(notes, Boolean(slot.info?.notes.length));
    space.update(slot);
    progress.update(slot);
    const left = slot.retry_at && store.connection.live ? slot.retry_at - now() : 0;
    const retry = left > 0 ? t("models.retry", { time: duration(left) }) : "";
    const shown = slot.state === "failed" && slot.last_error;
    text(error, shown ? [causeWords(slot.last_error), retry].filter(Boolean).join(" – ") : "");
    show(error, Boolean(shown));
    text(cells.dimensions.value, widthWords(slot.info));
    text(cells.memory.value, memoryWords(slots, slot));
    text(cells.load.value, loadWords(slots));
    text(cells.used.value, usedWords(slots));
    for (const each of Object.values(cells)) set(each.node, "data-empty", ["–", t("models.calm")].includes(each.value.textContent));
    traffic.update();
    buttons.preload.disabled = !AWAY.includes(slot.state);
    buttons.evict.disabled = !slots.some((each) => EVICTABLE.includes(each.state));
    buttons.pin.disabled = isPinned;
  }
  return { node, update };
}

/** Shows the space of a model's vectors without a prompt, shortened, and copies the whole of it. */
function spaceLine(id) {
  const whole = h("code", { class: "whole" });
  const short = h("code");
  const copy = h("button", { type: "button", class: "small", "aria-label": t("models.copySpace", { model: id }) }, t("do.copy"));
  copy.addEventListener("click", async () => {
    await copyText(whole);
    text(copy, t("do.copied"));
    setTimeout(() => text(copy, t("do.copy")), 1500);
  });
  const node = h("p", { class: "quiet small space" }, t("models.space"), " ", short, whole, " ", copy);
  const update = (slot) => {
    show(node, Boolean(slot.space));
    text(whole, slot.space ?? "");
    text(short, slot.space ? `${slot.space.slice(0, 9)}…${slot.space.slice(-4)}` : "");
    set(node, "title", slot.space);
  };
  return { node, update };
}

function cell(key) {
  const value = h("span", { class: "value" });
  return { node: h("div", { class: `cell ${key}` }, h("span", { class: "label" }, t(`col.${key}`)), value), value };
}

function button(verb, id, act) {
  const words = t(`do.${verb}`);
  return h("button", { type: "button", "aria-label": t("do.for", { verb: words, model: id }), "data-do": verb,
    onclick: () => act(verb, id) }, words);
}

/** Formats the full dimensions and the smaller ones on offer. */
function widthWords(info) {
  if (!info?.dimensions) return "–";
  const { widths, minimum } = info.matryoshka;
  const below = minimum ? t("models.from", { width: number(minimum) }) : widths.filter((width) => width < info.dimensions).map((width) => number(width)).join(", ");
  return [number(info.dimensions), below].filter(Boolean).join("\n");
}

/** Formats what a reduced dtype costs and gains against float32. */
function precisionWords(info) {
  if (!info?.precision) return "";
  const { dtype, worst_cosine: worst, recall_at_10: recall, speedup, texts } = info.precision;
  return t("models.precision", { dtype, worst: number(worst, 4), recall: number(recall, 3), speed: number(speedup, 1), texts: t(texts === "own" ? "texts.own" : "texts.builtin") });
}

function memoryWords(slots, slot) {
  const held = slots.reduce((sum, each) => sum + each.weight_bytes, 0);
  if (held) return bytes(held);
  return slot.need_bytes ? t("models.needs", { bytes: bytes(slot.need_bytes) }) : "–";
}

function loadWords(slots) {
  const sum = (field) => slots.reduce((total, slot) => total + slot[field], 0);
  const [leases, queue, waiters] = [sum("leases"), sum("queue_items"), sum("waiters")];
  const parts = [leases && t("models.leases", { leases }), queue && t("models.queue", { queue }),
    waiters && t("models.waiters", { waiters })].filter(Boolean);
  return parts.join(" · ") || (slots.some((slot) => slot.state === "ready") ? t("models.calm") : "–");
}

function usedWords(slots) {
  const last = Math.max(...slots.map((slot) => slot.last_used_at ?? 0));
  return last ? t("models.ago", { time: duration(now() - last) }) : t("models.never");
}

function trafficCell(id) {
  const { node, value } = cell("traffic");
  const line = sparkline();
  const rate = h("span", { class: "rate" });
  const marks = h("span", { class: "quiet small marks" });
  value.append(line.node, rate, marks);
  const update = () => {
    const minute = minuteOf(id);
    show(line.node, Boolean(minute));
    show(marks, Boolean(minute));
    set(node, "data-empty", !minute);
    if (!minute) return text(rate, "–");
    const perSecond = perSecondWords(minute.texts_per_s);
    line.update(minute.texts_per_s_by_step, t("models.spark", { rate: perSecond }));
    text(rate, t("models.rate", { rate: perSecond }));
    text(marks, t("models.percentiles", { p50: latency(minute.p50_s), p95: latency(minute.p95_s) }));
  };
  return { node, update };
}

/** Shows the bytes of a download, or the seconds of a load against those of the last load. */
function progressLine(store, id) {
  const bar = h("progress", { max: "1", "aria-label": t("models.progress", { model: id }) });
  const words = h("span", { class: "quiet small" });
  const node = h("div", { class: "progress" }, bar, words);
  const update = (slot) => {
    const isFetching = slot.state === "fetching";
    show(node, isFetching || TIMED.includes(slot.state));
    if (isFetching) fetching(slot);
    else if (TIMED.includes(slot.state)) timed(slot);
  };
  const share = (value) => (value === null ? bar.removeAttribute("value") : set(bar, "value", Math.min(1, value).toFixed(3)));

  function fetching(slot) {
    const [done, total] = [slot.fetched_bytes, slot.fetch_total_bytes];
    const rate = store.rates.get(keyOf(slot.id, slot.host_id))?.rate ?? 0;
    share(total ? done / total : null);
    const left = rate ? t("models.rateLeft", { speed: bytes(rate), left: duration((total - done) / rate) }) : "";
    const so = total ? t("models.fetched", { done: bytes(done), total: bytes(total) }) : "";
    text(words, [so, left].filter(Boolean).join(" · "));
  }

  function timed(slot) {
    if (!store.connection.live) return text(words, ""); // it may have ended long ago
    const seconds = store.secondsInState(slot);
    const expected = slot.state === "loading" ? slot.load_s : null;
    share(expected ? seconds / expected : null);
    const time = duration(seconds);
    text(words, expected ? t("models.elapsedOf", { time, expected: duration(expected) }) : t("models.elapsed", { time }));
  }
  return { node, update };
}
