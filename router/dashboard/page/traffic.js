// The last minute of each model, from the counters of /metrics. A server without them, or a key without the right to
// read them, leaves these figures out.

import { getText } from "./api.js";

const MINUTE_MS = 60000;
const TEXTS = "embedyard_inputs_total";
const SECONDS = "embedyard_request_seconds_bucket";
const LINE = /^(\w+)\{(.*)\} (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

let samples = []; // {at, models: Map(model → {texts, buckets: Map(bound → count)})}, oldest first
let refusals = 0;

export function forgetTraffic() {
  samples = [];
  refusals = 0;
}

export async function pollTraffic() {
  if (refusals > 2) return; // it will not change its mind: asking on would only fill its log
  try {
    samples.push({ at: Date.now(), models: parse(await getText("/metrics")) });
    refusals = 0;
  } catch {
    refusals += 1;
  }
  while (samples.length > 2 && samples[1].at <= Date.now() - MINUTE_MS) samples.shift();
}

export function parse(exposition) {
  const models = new Map();
  for (const line of exposition.split("\n")) {
    const match = LINE.exec(line);
    if (!match || (match[1] !== TEXTS && match[1] !== SECONDS)) continue;
    const labels = Object.fromEntries([...match[2].matchAll(LABEL)].map(([, name, value]) => [name, value]));
    const entry = models.get(labels.model) ?? { texts: 0, buckets: new Map() };
    models.set(labels.model, entry);
    if (match[1] === TEXTS) entry.texts += Number(match[3]);
    else entry.buckets.set(labels.le === "+Inf" ? Infinity : Number(labels.le), Number(match[3]));
  }
  return models;
}

/** {rate, points (texts/s between samples), p50, p95 (seconds, null without requests)}; null: nothing is known. */
export function trafficOf(modelId) {
  if (samples.length < 2) return null;
  const texts = samples.map((sample) => sample.models.get(modelId)?.texts ?? 0);
  const points = texts.slice(1).map((count, index) => {
    return Math.max(0, count - texts[index]) / ((samples[index + 1].at - samples[index].at) / 1000);
  });
  const seconds = (samples.at(-1).at - samples[0].at) / 1000;
  const newest = samples.at(-1).models.get(modelId)?.buckets ?? new Map();
  const oldest = samples[0].models.get(modelId)?.buckets ?? new Map();
  const counts = [...newest].map(([bound, count]) => [bound, count - (oldest.get(bound) ?? 0)]);
  return {
    rate: Math.max(0, texts.at(-1) - texts[0]) / seconds,
    points,
    p50: quantile(counts, 0.5),
    p95: quantile(counts, 0.95),
  };
}

/** As Prometheus' histogram_quantile: linear within the bucket. `counts`: cumulative, by upper bound. */
export function quantile(counts, share) {
  const sorted = [...counts].sort(([a], [b]) => a - b);
  const total = sorted.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  let [lower, below] = [0, 0];
  for (const [bound, count] of sorted) {
    if (count >= share * total) {
      if (bound === Infinity) return lower;
      return lower + ((bound - lower) * (share * total - below)) / Math.max(1, count - below);
    }
    [lower, below] = [bound, count];
  }
  return lower;
}
