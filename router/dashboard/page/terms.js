// Shows sparse outputs: the heaviest terms of each text as bars.

import { h } from "./dom.js";
import { entry } from "./scores.js";
import { t } from "./words.js";

const BLANK = /[▁Ġ]/g; // how vocabularies write the space before a word

/** Builds a list for each text, its heaviest term first; the bars of all texts have one scale. */
export function termLists(texts, data) {
  const most = Math.max(...data.flatMap((item) => item.sparse_embedding.values), 1e-12);
  const lists = data.map(({ sparse_embedding: terms }, index) => h("div", {},
    h("p", { class: "quiet small text" }, h("span", { class: "index" }, index + 1), " ", texts[index]),
    terms.indices.length ? h("ol", { class: "scores terms" }, heaviestFirst(terms).map(([name, weight, id]) =>
      entry("", h("span", { title: id }, name), weight, weight / most))) : h("p", { class: "quiet" }, t("play.noTerms"))));
  return h("div", {}, h("h3", {}, t("play.terms")), h("div", { class: "term-lists" }, lists));
}

function heaviestFirst({ indices, values, tokens }) {
  const terms = indices.map((id, place) => [tokens[place].replace(BLANK, "␣"), values[place], id]);
  return terms.sort((one, other) => other[1] - one[1]);
}
