// Shows scores of documents and of labels as bars, best first.

import { h } from "./dom.js";
import { number } from "./format.js";
import { t } from "./words.js";

/** Builds the documents of a ranking, best first; each number is the document's place among the texts. */
export function rankingList(texts, results) {
  const bar = scale(results.map((result) => result.relevance_score));
  const entries = results.map(({ index, relevance_score: score }) => entry(index + 1, texts[index], score, bar(score)));
  return h("div", {}, h("h3", {}, t("play.ranking")), h("ol", { class: "scores" }, entries));
}

/** Builds the most probable label of each text, with its probability. */
export function labelList(texts, data) {
  const entries = data.map(({ index, label, probs }) => {
    const probability = Math.max(...probs);
    return entry(index + 1, [h("span", { class: "tag" }, label), " ", texts[index]], probability, probability);
  });
  return h("div", {}, h("h3", {}, t("play.labels")), h("ol", { class: "scores" }, entries));
}

/** Builds one bar; `place` may be empty, `share` is its length from 0 to 1. */
export function entry(place, words, score, share) {
  const fill = h("span", { class: "fill" });
  fill.style.setProperty("--share", Math.max(0, Math.min(1, share)).toFixed(4));
  return h("li", {}, h("span", place === "" ? {} : { class: "index" }, place), h("span", { class: "words" }, words),
    h("span", { class: "strong" }, number(score, 4)), h("span", { class: "track", "aria-hidden": "true" }, fill));
}

/** Returns the length of a score's bar: the score itself from 0 to 1, else its place between the lowest and highest. */
function scale(scores) {
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  if (low >= 0 && high <= 1) return (score) => score;
  return (score) => (high > low ? 0.02 + (0.98 * (score - low)) / (high - low) : 1);
}
