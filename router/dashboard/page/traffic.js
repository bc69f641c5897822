// Statistics of the last minute per model, from the server.

import { get } from "./api.js";

let minutes = new Map();

/** Refreshes the statistics; keeps the old ones on failure. */
export async function pollTraffic() {
  const { data } = await get("/admin/traffic");
  minutes = new Map(data.map((minute) => [minute.id, minute]));
}

/** {texts_per_s, tokens_per_s, texts_per_s_by_step, p50_s, p95_s}; undefined for a model without traffic. */
export function minuteOf(modelId) {
  return minutes.get(modelId);
}
