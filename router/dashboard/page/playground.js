// The playground: embeds texts, shows vectors, cosine similarities and timings.

import { get, post, setEmbedKey } from "./api.js";
import { h, set, show, text } from "./dom.js";
import { latency, number } from "./format.js";
import { heatMap, vectorList } from "./results.js";
import { snippets } from "./snippets.js";
import { timingsBar } from "./timings.js";
import { t } from "./words.js";

const PATH = "/v1/embeddings";

let draft = null; // survives a change of language

export function playground(store) {
  const form = fields();
  const refusal = h("p", { class: "error", role: "alert" });
  const result = h("div", { class: "result", "aria-live": "polite" }, h("p", { class: "quiet nothing" }, t("play.empty")));
  const code = snippets();
  const node = h("section", { class: "panel", "aria-labelledby": "play-title" },
    h("h2", { id: "play-title" }, t("play.title")),
    h("div", { class: "play" }, h("div", {}, form.node, refusal, code.node), result));
  const known = new Map(); // prompts and dimensions from /v1/models, which needs a key that may embed
  show(refusal, false);

  const redraw = () => code.update(PATH, form.request());
  form.node.addEventListener("input", redraw);
  form.model.addEventListener("change", () => {
    form.offer(known.get(form.model.value) ?? fromSlots(store, form.model.value));
    redraw();
  });
  form.node.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });

  async function learn() {
    try {
      for (const model of (await get("/v1/models")).data) known.set(model.id, model);
    } catch {
      form.askForKey();
    }
    form.offer(known.get(form.model.value) ?? fromSlots(store, form.model.value));
  }

  async function run() {
    const request = form.request();
    text(refusal, request.input.length ? "" : t("play.noTexts"));
    show(refusal, !request.input.length);
    if (!request.input.length) return;
    form.busy(true);
    try {
      if (form.key.value) setEmbedKey(form.key.value);
      const answer = await post(PATH, request);
      result.replaceChildren(...outcome(request, answer));
      if (!known.size) learn();
    } catch (error) {
      text(refusal, error.message);
      show(refusal, true);
      if (error.status === 401 || error.status === 403) form.askForKey();
    } finally {
      form.busy(false);
    }
  }

  let asked = false;
  function update() {
    form.list(store.models().map((model) => model.id));
    redraw();
    if (asked || !store.slots.length) return;
    asked = true;
    learn();
  }
  return { node, update };
}

function fromSlots(store, modelId) {
  return store.slot(modelId)?.info ?? null;
}

function fields() {
  const texts = h("textarea", { id: "play-texts", rows: "6", spellcheck: "false" });
  texts.value = draft ?? t("play.example");
  texts.addEventListener("input", () => (draft = texts.value));
  const model = h("select", { id: "play-model" });
  const type = h("select", { id: "play-type" });
  const widths = h("datalist", { id: "play-widths" });
  const dimensions = h("input", { id: "play-dimensions", type: "number", min: "1", inputmode: "numeric", list: "play-widths" });
  const key = h("input", { id: "play-key", type: "password", autocomplete: "off" });
  const keyField = h("div", { class: "field" }, label(key, "play.key"), key, h("p", { class: "quiet small" }, t("play.keyHint")));
  const button = h("button", { type: "submit", class: "primary", id: "play-run" }, t("play.run"));
  show(keyField, false);
  const node = h("form", { class: "fields" },
    h("div", { class: "field wide" }, label(texts, "play.texts"), texts),
    h("div", { class: "field wide" }, label(model, "play.model"), model),
    h("div", { class: "field" }, label(type, "play.type"), type),
    h("div", { class: "field" }, label(dimensions, "play.dimensions"), dimensions, widths),
    keyField, button);
  texts.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) node.requestSubmit();
  });

  function request() {
    const input = texts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const made = { model: model.value, input };
    if (type.value) made.input_type = type.value;
    if (dimensions.value) made.dimensions = Number(dimensions.value);
    return made;
  }

  function list(ids) {
    if (ids.join("\n") === [...model.options].map((option) => option.value).join("\n")) return;
    const chosen = model.value;
    options(model, ids.map((id) => [id, id]), chosen);
  }

  function offer(facts) {
    options(type, [["", t("play.noType")], ...Object.keys(facts?.prompts ?? {}).map((name) => [name, name])], type.value);
    const matryoshka = facts?.matryoshka;
    const all = [...(matryoshka?.widths ?? []), facts?.dimensions].filter(Boolean);
    widths.replaceChildren(...all.map((width) => h("option", { value: width })));
    set(dimensions, "placeholder", facts?.dimensions ?? t("play.native"));
    set(dimensions, "max", facts?.dimensions ?? null);
  }

  return {
    node, model, key, request, list, offer,
    askForKey: () => show(keyField, true),
    busy(isBusy) {
      button.disabled = isBusy;
      text(button, t(isBusy ? "play.running" : "play.run"));
    },
  };
}

function label(field, words) {
  return h("label", { for: field.id }, t(words));
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, words]) => h("option", { value }, words)));
  select.value = pairs.some(([value]) => value === chosen) ? chosen : pairs[0]?.[0] ?? "";
}

function outcome(request, { data, headers, seconds }) {
  const vectors = data.data.map((item) => item.embedding);
  const facts = { count: number(vectors.length), width: number(vectors[0].length), tokens: number(data.usage.prompt_tokens), time: latency(seconds) };
  const cut = headers.get("x-embed-truncated");
  return [
    h("p", { class: "strong" }, t("play.summary", facts)),
    cut && h("p", { class: "error" }, t("play.truncated", { indexes: cut })),
    timingsBar(headers.get("server-timing") ?? "", seconds),
    vectors.length > 1 && heatMap(request.input, vectors),
    vectorList(request.input, vectors),
  ].filter(Boolean);
}
