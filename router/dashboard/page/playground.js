// The playground: embeds, ranks or labels texts; shows vectors, similarities or scores, and timings.

import { get, post, setEmbedKey } from "./api.js";
import { h, set, show, text } from "./dom.js";
import { latency, number } from "./format.js";
import { heatMap, vectorList } from "./results.js";
import { labelList, rankingList } from "./scores.js";
import { snippets } from "./snippets.js";
import { termLists } from "./terms.js";
import { timingsBar } from "./timings.js";
import { t } from "./words.js";

const PATHS = { embed: "/v1/embeddings", sparse: "/v1/embeddings", rerank: "/v1/rerank", classify: "/v1/classify" };
const TERMS = { outputs: ["sparse"], sparse_top_k: 12, return_tokens: true };

let draft = null; // these survive a change of language
let draftQuery = null;

export function playground(store) {
  const form = fields();
  const refusal = h("p", { class: "error", role: "alert" });
  const result = h("div", { class: "result", "aria-live": "polite" }, h("p", { class: "quiet nothing" }, t("play.empty")));
  const code = snippets();
  const node = h("section", { class: "panel", "aria-labelledby": "play-title" },
    h("h2", { id: "play-title" }, t("play.title")),
    h("div", { class: "play" }, h("div", {}, form.node, refusal), result, code.node));
  const known = new Map(); // prompts and dimensions from /v1/models, which needs a key that may embed
  show(refusal, false);

  const redraw = () => code.update(PATHS[form.mode()], form.request());
  const facts = () => withOutputs(known.get(form.model.value), fromSlots(store, form.model.value));
  form.node.addEventListener("input", redraw);
  form.node.addEventListener("change", redraw);
  form.model.addEventListener("change", () => {
    form.offer(facts());
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
    form.offer(facts());
  }

  async function run() {
    const mode = form.mode();
    const request = form.request();
    const missing = missingWords(request);
    text(refusal, missing);
    show(refusal, Boolean(missing));
    if (missing) return;
    form.busy(true);
    markOld(true);
    try {
      if (form.key.value) setEmbedKey(form.key.value);
      const answer = await post(PATHS[mode], request);
      result.replaceChildren(...outcome(mode, request, answer));
      markOld(false);
      if (!known.size) learn();
    } catch (error) {
      text(refusal, error.words ?? error.message);
      show(refusal, true);
      if (error.status === 401 || error.status === 403) form.askForKey();
    } finally {
      set(result, "aria-busy", false);
      form.busy(false);
    }
  }

  /** Dims the results of an earlier request, until there are new ones; also when the new one fails. */
  function markOld(isOld) {
    set(result, "data-old", isOld);
    set(result, "aria-busy", isOld && "true");
  }

  let asked = false;
  let offered = "";
  function update() {
    const isNew = form.list(store.models().map((model) => model.id));
    const uses = usesOf(facts()).join();
    if ((isNew && known.size) || uses !== offered) form.offer(facts()); // a model's outputs are known once it is loaded
    offered = uses;
    redraw();
    if (asked || !store.slots.length) return;
    asked = true;
    learn();
  }
  return { node, update };
}

function fromSlots(store, modelId) {
  const slot = store.slot(modelId);
  return slot ? { ...slot.info, task: slot.task } : null;
}

/** Returns what /v1/models said, with the outputs of a model that has been loaded since. */
function withOutputs(learnt, live) {
  return learnt && live ? { ...learnt, task: learnt.task ?? live.task, outputs: live.outputs ?? learnt.outputs } : learnt ?? live;
}

/** Returns what a model can be used for; of one that embeds, by its outputs, which are unknown until it is loaded. */
function usesOf(facts) {
  if (facts?.task === "rerank" || facts?.task === "classify") return [facts.task];
  const has = (output) => facts?.outputs?.includes(output);
  if (!facts?.outputs?.length) return ["embed", "rerank"];
  return [has("dense") && "embed", has("sparse") && "sparse", (has("dense") || has("multi_vector")) && "rerank"].filter(Boolean);
}

function missingWords({ query, input, documents }) {
  if (!(input ?? documents).length) return t("play.noTexts");
  return query === "" ? t("play.noQuery") : "";
}

function fields() {
  const texts = h("textarea", { id: "play-texts", rows: "6", spellcheck: "false" });
  texts.value = draft ?? t("play.example");
  texts.addEventListener("input", () => (draft = texts.value));
  const query = h("input", { id: "play-query", spellcheck: "false" });
  query.value = draftQuery ?? t("play.exampleQuery");
  query.addEventListener("input", () => (draftQuery = query.value));
  const model = h("select", { id: "play-model" });
  const use = h("select", { id: "play-use" });
  const type = h("select", { id: "play-type" });
  const widths = h("datalist", { id: "play-widths" });
  const dimensions = h("input", { id: "play-dimensions", type: "number", min: "1", inputmode: "numeric", list: "play-widths" });
  const key = h("input", { id: "play-key", type: "password", autocomplete: "off" });
  const keyField = h("div", { class: "field" }, label(key, "play.key"), key, h("p", { class: "quiet small" }, t("play.keyHint")));
  const button = h("button", { type: "submit", class: "primary", id: "play-run" }, t("run.embed"));
  show(keyField, false);
  const textsLabel = label(texts, "play.texts");
  const queryField = h("div", { class: "field wide" }, label(query, "play.query"), query);
  const vectorFields = [h("div", { class: "field" }, label(type, "play.type"), type),
    h("div", { class: "field" }, label(dimensions, "play.dimensions"), dimensions, widths)];
  const node = h("form", { class: "fields" },
    h("div", { class: "field" }, label(model, "play.model"), model),
    h("div", { class: "field" }, label(use, "play.use"), use),
    queryField, h("div", { class: "field wide" }, textsLabel, texts),
    vectorFields, keyField, button);
  use.addEventListener("change", arrange);
  texts.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) node.requestSubmit();
  });

  const mode = () => use.value || "embed";

  /** Shows the fields of the chosen use. */
  function arrange() {
    const isRanking = mode() === "rerank";
    show(queryField, isRanking);
    show(vectorFields[0], mode() === "embed" || mode() === "sparse");
    show(vectorFields[1], mode() === "embed");
    text(textsLabel, t(isRanking ? "play.documents" : "play.texts"));
    text(button, t(`run.${mode()}`));
  }

  function request() {
    const input = texts.value.split("\n").map((line) => line.trim()).filter(Boolean);
    if (mode() === "rerank") return { model: model.value, query: query.value.trim(), documents: input };
    const made = { model: model.value, input };
    if (mode() === "classify") return made;
    if (type.value) made.input_type = type.value;
    if (mode() === "sparse") return { ...made, ...TERMS };
    if (dimensions.value) made.dimensions = Number(dimensions.value);
    return made;
  }

  function list(ids) {
    if (ids.join("\n") === [...model.options].map((option) => option.value).join("\n")) return false;
    const chosen = model.value;
    options(model, ids.map((id) => [id, id]), chosen);
    return true;
  }

  function offer(facts) {
    options(use, usesOf(facts).map((name) => [name, t(`use.${name}`)]), use.value);
    arrange();
    options(type, [["", t("play.noType")], ...Object.keys(facts?.prompts ?? {}).map((name) => [name, name])], type.value);
    const matryoshka = facts?.matryoshka;
    const all = [...(matryoshka?.widths ?? []), facts?.dimensions].filter(Boolean);
    widths.replaceChildren(...all.map((width) => h("option", { value: width })));
    set(dimensions, "placeholder", facts?.dimensions ?? t("play.native"));
    set(dimensions, "max", facts?.dimensions ?? null);
  }

  return {
    node, model, key, request, list, offer, mode,
    askForKey: () => show(keyField, true),
    busy(isBusy) {
      button.disabled = isBusy;
      text(button, isBusy ? t("play.running") : t(`run.${mode()}`));
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

function outcome(mode, request, { data, headers, seconds }) {
  const [summary, facts, parts] = { embed: vectorsOf, sparse: termsOf, rerank: rankingOf, classify: labelsOf }[mode](request, data);
  const cut = headers.get("x-embed-truncated");
  const used = { tokens: number(data.usage.prompt_tokens), time: latency(seconds) };
  return [
    h("p", { class: "strong" }, t(summary, { ...facts, ...used })),
    cut && h("p", { class: "error" }, t("play.truncated", { indexes: cut })),
    timingsBar(headers.get("server-timing") ?? "", seconds),
    ...parts,
  ].filter(Boolean);
}

function vectorsOf({ input }, answer) {
  const { data } = answer;
  if (data[0].sparse_embedding) return termsOf({ input }, answer); // a model whose outputs were not known yet
  if (data[0].multi_vector_embedding) return tokensOf(data);
  const vectors = data.map((item) => item.embedding);
  const facts = { count: number(vectors.length), width: number(vectors[0].length) };
  return ["play.summary", facts, [vectors.length > 1 && heatMap(input, vectors), vectorList(input, vectors)]];
}

function termsOf({ input }, { data }) {
  const count = data.reduce((sum, item) => sum + item.sparse_embedding.indices.length, 0);
  const facts = { count: number(data.length), terms: number(count) };
  return ["play.summaryTerms", facts, data[0].sparse_embedding.tokens ? [termLists(input, data)] : []];
}

function tokensOf(data) {
  const vectors = data.flatMap((item) => item.multi_vector_embedding);
  return ["play.summaryTokens", { count: number(data.length), vectors: number(vectors.length), width: number(vectors[0]?.length ?? 0) }, []];
}

function rankingOf({ documents }, { results, method }) {
  const words = { cosine: "play.summaryCosine", maxsim: "play.summaryMaxsim", meanmaxsim: "play.summaryMaxsim" }[method] ?? "play.summaryRanking";
  return [words, { count: number(results.length) }, [rankingList(documents, results)]];
}

function labelsOf({ input }, { data }) {
  return ["play.summaryLabels", { count: number(data.length) }, [labelList(input, data)]];
}
