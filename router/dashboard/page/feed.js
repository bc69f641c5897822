// The event list. Intermediate steps are not shown.

import { h, show, text } from "./dom.js";
import { bytes, causeWords, clockTime, duration } from "./format.js";
import { t } from "./words.js";

const SHOWN = 60;

export function feedPanel(store) {
  const list = h("ol", { class: "feed", tabindex: "0", "aria-label": t("feed.title") });
  const empty = h("p", { class: "quiet" }, t("feed.empty"));
  const live = h("p", { class: "unseen", "aria-live": "polite" });
  const node = h("section", { class: "panel feed-panel", "aria-labelledby": "feed-title" },
    h("h2", { id: "feed-title" }, t("feed.title")), empty, list, live);
  let newest = null;

  function update() {
    if (store.feed[0] === newest) return;
    newest = store.feed[0];
    const shown = store.feed.map((entry) => ({ entry, words: sentence(entry) })).filter((each) => each.words);
    list.replaceChildren(...shown.slice(0, SHOWN).map(({ entry, words }) =>
      h("li", { class: kindOf(entry) }, h("time", {}, clockTime(entry.time_s)), h("span", {}, words))));
    text(live, shown[0]?.words);
    show(empty, shown.length === 0);
    show(list, shown.length > 0);
  }
  return { node, update };
}

function kindOf(entry) {
  if (entry.target === "failed") return "bad";
  return entry.target === "ready" ? "good" : entry.target === "unloading" ? "gone" : "plain";
}

/** Returns the text of an event; null for an intermediate step. */
export function sentence(entry) {
  if (entry.kind === "note") return t(entry.words);
  const model = entry.model_id;
  const step = `${entry.source} ${entry.target}`;
  if (step === "warming ready") {
    return t("feed.ready", { model, bytes: bytes(entry.measured_bytes), time: duration(entry.seconds) });
  }
  if (step === "waking ready") return t("feed.woken", { model, time: duration(entry.seconds) });
  if (["unloading", "parking"].includes(entry.target) && entry.reason) return evictionSentence(entry);
  if (entry.target === "failed") return t("feed.failed", { model, cause: causeWords(entry.cause) });
  if (step === "fetching cold") return t("feed.fetched", { model });
  return ["loading", "fetching", "parked", "retired"].includes(entry.target) ? t(`feed.${entry.target}`, { model }) : null;
}

function evictionSentence(entry) {
  const stay = entry.idle_s !== null ? t("devices.idle", { time: duration(entry.idle_s) })
    : t("feed.stayed", { time: duration(entry.seconds) });
  const facts = [entry.weight_bytes && bytes(entry.weight_bytes), stay].filter(Boolean).join(", ");
  const words = t(`feed.${entry.reason}`, { model: entry.model_id, claimant: entry.claimant, facts });
  return entry.missing_bytes ? words + t("feed.turns", { bytes: bytes(entry.missing_bytes) }) : words;
}
