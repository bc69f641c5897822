// The last minute of each model, as the server counts it.

import { get } from "./api.js";

let minutes = new Map();

/** Ask for it again. When that fails, what is known stays. */
export async function pollTraffic() {
  const { data } = await get("/admin/traffic");
  minutes = new Map(data.map((minute) => [minute.id, minute]));
}

/** {texts_per_s, tokens_per_s, texts_per_s_by_step, p50_s, p95_s}; undefined for a model that answered nothing. */
export function minuteOf(modelId) {
  return minutes.get(modelId);
}
