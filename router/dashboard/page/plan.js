// Shows the effect of an operator's action and asks for confirmation.

import { get, modelPath, now, post } from "./api.js";
import { h } from "./dom.js";
import { bytes, duration } from "./format.js";
import { t } from "./words.js";

const IN_MEMORY = ["loading", "warming", "waking", "ready", "draining", "parking", "unloading"];
const ACTIONS = {
  preload: (model) => post(modelPath(model.id, "preload"), { wait: false }),
  pin: (model) => post(modelPath(model.id, "preload"), { wait: false, pin: true }),
  evict: (model) => post(modelPath(model.id, "evict"), { force: model.slots.some((slot) => slot.pinned) }),
};

/** `mark(victims)`: highlights the models that would be evicted. `tell(message)`: shows an error. */
export function planner(store, mark, tell) {
  return async (verb, modelId) => {
    const model = store.models().find((each) => each.id === modelId);
    try {
      const plan = verb === "evict" ? null : await get(`/admin/plan?model=${encodeURIComponent(modelId)}`);
      mark(verb === "evict" ? [modelId] : plan.evict);
      const lines = verb === "evict" ? evictWords(store, model) : planWords(store, verb, plan);
      if (await confirmed(verb, modelId, lines, !plan || plan.fits)) await ACTIONS[verb](model);
      tell("");
    } catch (error) {
      tell(error.words ?? error.message);
    } finally {
      mark([]);
    }
    await store.refresh().catch(() => {});
  };
}

function planWords(store, verb, plan) {
  const lines = [];
  if (!plan.fits) lines.push(t("plan.never", { reason: plan.reason }));
  if (IN_MEMORY.includes(plan.state)) lines.push(t("plan.ready"));
  else if (plan.fits) {
    const host = store.deviceName(plan.host_id);
    const [need, free] = [bytes(plan.need_bytes), bytes(plan.free_bytes)];
    lines.push(plan.need_bytes ? t("plan.needs", { need, free, host }) : t("plan.unknown"));
    if (plan.shares?.length) lines.push(plan.shares.flatMap((share) => shareWords(store, share)));
    if (plan.state === "absent") lines.push(t("plan.download"));
    lines.push(plan.evict.length ? t("plan.leaves") : t("plan.nobody"));
    if (plan.evict.length) lines.push(plan.evict.map((id) => victimWords(store.slot(id, plan.host_id), id)));
    lines.push(plan.seconds ? t("plan.seconds", { time: duration(plan.seconds) }) : t("plan.secondsUnknown"));
  }
  if (verb === "pin") lines.push(t("plan.pinned"));
  return lines;
}

function shareWords(store, share) {
  const host = store.deviceName(share.host_id);
  const places = [["plan.share", share.device_bytes], ["plan.shareHost", share.host_bytes]];
  return places.filter(([, size]) => size).map(([word, size]) => t(word, { bytes: bytes(size), host }));
}

function victimWords(slot, id) {
  const idle = slot?.last_used_at ? t("devices.idle", { time: duration(now() - slot.last_used_at) }) : "";
  return [id, bytes(slot?.weight_bytes ?? 0), idle].filter(Boolean).join(" · ");
}

function evictWords(store, model) {
  const held = model.slots.filter((slot) => IN_MEMORY.includes(slot.state) || slot.host_bytes);
  const leases = held.reduce((sum, slot) => sum + slot.leases, 0);
  const lines = held.map((slot) => t("plan.frees", { bytes: bytes(slot.weight_bytes || slot.host_bytes), host: store.deviceName(slot.host_id) }));
  if (!held.length) lines.push(t("plan.drops"));
  if (leases) lines.push(t("plan.running", { leases }));
  if (held.some((slot) => slot.pinned)) lines.push(t("plan.unpins"));
  if (model.slot.load_s) lines.push(t("plan.again", { time: duration(model.slot.load_s) }));
  return lines;
}

/** Opens a modal dialog; resolves to whether it was confirmed. Escape and Cancel decline. */
function confirmed(verb, modelId, lines, isPossible) {
  const title = h("h2", { id: "plan-title" }, t(`plan.${verb}`, { model: modelId }));
  const words = lines.map((line) => (Array.isArray(line) ? h("ul", {}, line.map((item) => h("li", {}, item))) : h("p", {}, line)));
  const cancel = h("button", { type: "button" }, t("do.cancel"));
  const go = h("button", { type: "button", class: "primary", "data-do": "confirm" }, t(`do.${verb}`));
  go.disabled = !isPossible;
  const dialog = h("dialog", { "aria-labelledby": "plan-title", class: "plan" }, title, words, h("div", { class: "buttons" }, cancel, go));
  document.body.append(dialog);
  return new Promise((resolve) => {
    cancel.addEventListener("click", () => dialog.close());
    go.addEventListener("click", () => dialog.close("go"));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "go");
    });
    dialog.showModal();
    (isPossible ? go : cancel).focus();
  });
}
